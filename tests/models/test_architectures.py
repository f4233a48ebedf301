"""Every architecture of architectures.py through the code that trains it, against its own full
logits.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, NEVER_TIED, SCALED_OR_CAPPED, build
from transformers import PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from kd.data.collate import Batch, Place
from kd.engine.zero3 import decoder_layers, set_leaf_modules
from kd.errors import UserError
from kd.losses import DenseTargets
from kd.models.head import backbone, head_of
from kd.models.probe import reference_of
from kd.models.student import StudentModule
from kd.recipe import LossSection

pytestmark = pytest.mark.slow

LOSS = LossSection(temperature=2.0, kd_weight=0.7, ce_weight=0.3, chunk_size=7)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


def batch_of(num_rows: int, length: int, padded_to: int) -> Batch:
    """Random rows whose second half is supervised, padded to the right."""
    random = torch.Generator().manual_seed(0)
    input_ids = torch.zeros(num_rows, padded_to, dtype=torch.int64)
    input_ids[:, :length] = torch.randint(1, 160, (num_rows, length), generator=random)
    labels = torch.full_like(input_ids, -100)
    labels[:, length // 2 : length - 1] = input_ids[:, length // 2 + 1 : length]
    row_index = (labels.flatten() != -100).nonzero().squeeze(1)
    return Batch(
        {"input_ids": input_ids},
        labels,
        row_index,
        torch.zeros_like(row_index),
        tuple(Place(row, 0, length) for row in range(num_rows)),
    )


def sums(
    student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, ...]:
    """(loss, kd, ce, rows of diagnostics) as training computes them."""
    with torch.no_grad():
        teacher_hidden = backbone(teacher)(
            input_ids=batch.input_ids, use_cache=False
        ).last_hidden_state
    targets = DenseTargets(teacher_hidden, head_of(teacher))
    return student(batch.model_inputs, batch.labels, batch.row_index, targets)


def sums_of_full_logits(
    student: torch.nn.Module, teacher: torch.nn.Module, batch: Batch
) -> tuple[torch.Tensor, ...]:
    """(loss, kd, ce, rows of diagnostics) of what the models themselves return."""
    logits = student(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[
        batch.row_index
    ]
    with torch.no_grad():
        teacher_logits = teacher(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)[
            batch.row_index
        ]
    log_p, log_q = (
        torch.log_softmax(row / LOSS.temperature, dim=-1) for row in (teacher_logits, logits)
    )
    kd = LOSS.temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    ce = F.cross_entropy(logits, batch.labels.flatten()[batch.row_index], reduction="sum")
    with torch.no_grad():
        p, q = log_p.exp(), log_q.exp()
        agrees = (logits.argmax(-1) == teacher_logits.argmax(-1)).float()
        terms = [p * (log_p - log_q), q * (log_q - log_p), -q * log_q, -p * log_p]
        rows = torch.stack([*(term.sum(-1) for term in terms), agrees])
    return LOSS.kd_weight * kd + LOSS.ce_weight * ce, kd, ce, rows


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_loss_and_its_gradients_are_those_of_the_models_own_logits(
    architecture: str, tied: bool
) -> None:
    batch = batch_of(num_rows=3, length=20, padded_to=20)
    student, teacher = (
        build(architecture, tied=tied, seed=0),
        build(architecture, tied=tied, seed=1).eval(),
    )
    tied = tied and architecture not in NEVER_TIED
    assert (student.get_output_embeddings().weight is student.get_input_embeddings().weight) == tied
    expected = sums_of_full_logits(student, teacher, batch)
    expected[0].backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert min(term / batch.num_supervised_tokens for term in expected[:3]) > 0.05
    assert "lm_head.weight" in gradients or tied

    student.zero_grad(set_to_none=True)
    if student.supports_gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    actual = sums(StudentModule(student, LOSS), teacher, batch)
    torch.testing.assert_close(actual[:3], expected[:3], rtol=2e-5, atol=0.0)
    torch.testing.assert_close(actual[3], expected[3], rtol=1e-4, atol=1e-5)
    actual[0].backward()
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if parameter.grad is not None:
            assert (parameter.grad - gradients[name]).norm() < 2e-5 * total, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_accepts_every_known_head(architecture: str, dtype: torch.dtype) -> None:
    model = build(architecture, tied=False, seed=0).to(dtype)
    assert reference_of(model, role="student").probed.hidden_BLH.shape == (1, 16, 32)


def test_padding_does_not_change_the_sums(architecture: str) -> None:
    student, teacher = (build(architecture, tied=False, seed=seed).eval() for seed in (0, 1))
    student = StudentModule(student, LOSS)
    short, long = (
        sums(student, teacher, batch_of(num_rows=2, length=20, padded_to=size)) for size in (20, 37)
    )
    torch.testing.assert_close(long[:3], short[:3], rtol=2e-5, atol=0.0)
    torch.testing.assert_close(long[3], short[3], rtol=1e-4, atol=1e-5)


# A state or a convolution that runs on, a bias by distance, or a mask made without positions
MIXES_PACKED = {
    "afmoe",
    "bloom",
    "falcon",
    "falcon_h1",
    "gpt_oss",
    "granitemoehybrid",
    "inkling_text",
    "jamba",
    "mpt",
    "opt",
    "qwen3_next",
    "recurrent_gemma",
    "xlstm",
}
WINDOWS = {
    "sliding_window": 5,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 5,
}


def test_packed_sequences_have_the_states_and_gradients_of_separate_ones(architecture: str) -> None:
    """Sequences longer than the windows, in float64 where experts are not in the way."""
    known = CONFIG_MAPPING[architecture]()
    windows = {name: value for name, value in WINDOWS.items() if hasattr(known, name)}
    model = build(architecture, tied=False, seed=0, **windows).eval()
    assert reference_of(model, role="student").keeps_packed_apart == (
        architecture not in MIXES_PACKED
    )
    if architecture in MIXES_PACKED:
        return
    if not any(name.endswith("experts") for name, _ in model.named_modules()):
        model.double()
    random = torch.Generator().manual_seed(0)
    lengths = (11, 7, 9)
    rows = [torch.randint(1, 160, (1, length), generator=random) for length in lengths]
    run, weights = backbone(model), torch.randn(1, sum(lengths), 32, generator=random)
    separate = torch.cat(
        [run(input_ids=row, use_cache=False).last_hidden_state for row in rows], dim=1
    )
    gradients = torch.autograd.grad((separate * weights).sum(), list(used(model)))
    packed = run(
        input_ids=torch.cat(rows, dim=1),
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        use_cache=False,
    ).last_hidden_state
    torch.testing.assert_close(packed, separate, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad((packed * weights).sum(), list(used(model)))
    total = torch.stack([gradient.norm() for gradient in gradients]).norm()
    for ours, theirs in zip(actual, gradients, strict=True):
        assert (ours - theirs).norm() < 5e-6 * total


def used(model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    """The parameters of the backbone that hold a gradient, experts that see no token too."""
    head = model.get_output_embeddings()
    own = set(head.parameters())
    return (p for p in model.parameters() if p.requires_grad and p not in own)


@pytest.mark.parametrize("architecture", SCALED_OR_CAPPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_probe_would_see_a_scale_or_softcap_left_out(
    architecture: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kd.models.probe.head_of", lambda model: head_of(model)._replace(softcap=None, scale=1.0)
    )
    with pytest.raises(UserError, match=r"add it to kd/models/head\.py"):
        reference_of(build(architecture, tied=True, seed=0).to(dtype), role="student")


def test_every_layer_and_with_it_its_experts_is_gathered_at_once(architecture: str) -> None:
    model = build(architecture, tied=False, seed=0)
    kinds = set_leaf_modules(model)
    leaves = [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)]
    assert (
        len(leaves)
        == model.config.get_text_config().num_hidden_layers
        == len(decoder_layers(model))
    )
    assert {type(model.get_submodule(name)).__name__ for name in leaves} == set(kinds)
    for name, _ in model.named_modules():
        if name.endswith("experts"):
            assert sum(name.startswith(f"{leaf}.") for leaf in leaves) == 1, name


def test_without_known_layers_each_block_of_experts_is_gathered_at_once() -> None:
    model = build("qwen3_moe", tied=False, seed=0)
    model._no_split_modules = None
    assert set_leaf_modules(model) == ["Qwen3MoeSparseMoeBlock"]


def test_a_layer_that_shares_a_parameter_is_not_gathered_at_once() -> None:
    model = build("llama", tied=False, seed=0)
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    assert set_leaf_modules(model) == []


def test_experts_without_a_known_block_are_refused() -> None:
    model = build("llama", tied=False, seed=0)
    model.config.num_experts = 8
    model._no_split_modules = None
    with pytest.raises(
        UserError, match="LlamaForCausalLM has experts, but no mixture-of-experts block"
    ):
        set_leaf_modules(model)
