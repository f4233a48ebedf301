"""train_step() with a fake teacher and a plain engine, against full logits: no ZeRO."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import free_port, layout_of, tiny_config
from transformers import Qwen3ForCausalLM

from kd.constants import IGNORE_INDEX
from kd.data.collate import collate
from kd.data.dataset import Example
from kd.losses import DenseTargets, Head, TopKTargets
from kd.losses.chunk_plan import plan_chunks
from kd.models.student import Student, StudentModule
from kd.recipe import LossSection
from kd.training.step import train_step, validate

LAYOUT = layout_of(0, 1)
VOCAB_SIZE = 160
RATE = 0.5


class PlainEngine:
    """Of a DeepSpeed engine what train_step() uses, with SGD that steps at the boundary."""

    skipped_steps = 0

    def __init__(self, module):
        self.module, self.boundaries = module, []
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.0)

    def __call__(self, *arguments):
        return self.module(*arguments)

    def train(self, mode=True):
        self.module.train(mode)

    def eval(self):
        self.module.eval()

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.boundaries.append(is_boundary)

    def backward(self, loss, *, scale_wrt_gas):
        assert not scale_wrt_gas, "DeepSpeed would divide by its accumulation steps"
        loss.backward()

    def step(self):
        if self.boundaries[-1]:
            self.gradients = {n: p.grad.clone() for n, p in self.module.model.named_parameters()}
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return torch.stack([g.norm() for g in self.gradients.values()]).norm().item()


class FakeTeacher:
    """Hands out what it is given, and writes down where it was asked for."""

    def __init__(self, make_targets):
        self.make_targets, self.places, self.open = make_targets, [], 0

    @contextlib.contextmanager
    def targets(self, batch):
        self.places.append(batch.places)
        self.open += 1
        yield self.make_targets(batch)
        self.open -= 1


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """Of this process only: the sums of a step go through it."""
    store = dist.TCPStore("127.0.0.1", int(free_port()), 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def student():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(tiny_config(vocab_size=VOCAB_SIZE, tie_word_embeddings=False))
    settings = LossSection(kd_weight=0.7, ce_weight=0.3)
    return Student(model, PlainEngine(StudentModule(model, settings)))


@pytest.fixture
def batches():
    return [make_batch(index, lengths) for index, lengths in enumerate([(9, 5), (12,), (4, 4, 4)])]


def make_batch(index, lengths):
    random = np.random.default_rng(index)
    examples = []
    for row, length in enumerate(lengths):
        ids = random.integers(0, VOCAB_SIZE, length)
        labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids)
        examples.append(Example(ids, labels, 10 * index + row, np.array([1, length, 2]), 0))
    return collate(examples, pad_token_id=0)


def dense(batch):
    generator = torch.Generator().manual_seed(batch.places[0].row)
    hidden = torch.randn(*batch.labels.shape, 24, generator=generator)
    weight = torch.randn(VOCAB_SIZE, 24, generator=torch.Generator().manual_seed(7))
    return DenseTargets(hidden, Head(weight, None, None, 1.0))


def log_p_of(targets):
    return (targets.hidden_BLH @ targets.head.weight_VH.T).log_softmax(-1)


def all_tokens(batch):
    """The same teacher, by the log-probabilities of all of its tokens."""
    log_p_BLV = log_p_of(dense(batch))
    return TopKTargets(*reversed(log_p_BLV.topk(VOCAB_SIZE, dim=-1)))


def expected_step(student, batches, kd_weight=0.7, ce_weight=0.3):
    """Loss, kd, ce and gradients by full logits, in plain torch."""
    model, kd, ce = student.model, torch.zeros(()), torch.zeros(())
    for batch in batches:
        logits = model(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.row_index]
        ce = ce + F.cross_entropy(logits, batch.labels.flatten()[batch.row_index], reduction="sum")
        log_p = log_p_of(dense(batch)).flatten(0, 1)[batch.row_index]
        kd = kd + F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="sum")
    num_tokens = sum(batch.num_supervised_tokens for batch in batches)
    loss = (kd_weight * kd + ce_weight * ce) / num_tokens
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return (loss.item(), kd.item() / num_tokens, ce.item() / num_tokens), gradients


@pytest.mark.parametrize("make_targets", [dense, all_tokens], ids=["dense", "top-k"])
def test_a_step_learns_from_what_the_teacher_hands_out(student, batches, make_targets):
    expected, gradients = expected_step(student, batches)
    teacher = FakeTeacher(make_targets)
    result = train_step(student, teacher, batches, RATE, LAYOUT)
    assert expected[0] > 1.0
    assert (result.loss, result.kd, result.ce) == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        error = (student.engine.gradients[name] - gradient).norm()
        assert error < 1e-5 * gradient.norm(), name
    assert teacher.places == [batch.places for batch in batches]
    assert teacher.open == 0, "targets are let go before the backward pass"
    assert (result.diagnostics is None) == (make_targets is all_tokens)
    assert result.num_supervised_tokens == sum(b.num_supervised_tokens for b in batches)
    assert result.num_input_tokens == 9 + 5 + 12 + 4 + 4 + 4
    assert not result.skipped


def test_the_loop_says_which_micro_batch_is_the_last(student, batches):
    for number in (3, 1, 2):
        student.engine.boundaries.clear()
        train_step(student, FakeTeacher(dense), batches[:number], RATE, LAYOUT)
        assert student.engine.boundaries == [False] * (number - 1) + [True]
        assert student.engine.optimizer.param_groups[0]["lr"] == RATE


@pytest.mark.parametrize("make_targets", [dense, all_tokens])
def test_the_loss_takes_the_recipes_share_of_memory(batches, monkeypatch, make_targets):
    budgets = []

    def plan(*sizes, logits_gib, **options):
        budgets.append(logits_gib)
        return plan_chunks(*sizes, logits_gib=logits_gib, **options)

    for module in ("distillation", "sparse"):
        monkeypatch.setattr(f"kd.losses.{module}.plan_chunks", plan)
    model = Qwen3ForCausalLM(tiny_config(vocab_size=VOCAB_SIZE))
    student = Student(model, PlainEngine(StudentModule(model, LossSection(logits_gib=1e-5))))
    train_step(student, FakeTeacher(make_targets), batches, RATE, LAYOUT)
    assert budgets == [1e-5] * len(batches)


def test_without_a_teacher_only_cross_entropy_is_left(batches):
    model = Qwen3ForCausalLM(tiny_config(vocab_size=VOCAB_SIZE))
    settings = LossSection(kd_weight=0.0, ce_weight=1.0)
    student = Student(model, PlainEngine(StudentModule(model, settings)))
    result = train_step(student, None, batches, RATE, LAYOUT)
    assert result.kd == 0.0
    assert result.loss == result.ce > 1.0
    assert result.diagnostics is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_told_and_poisons_the_gradient(student, batches, poison):
    loss_of = student.loss

    def poisoned(*arguments):
        result = loss_of(*arguments)
        return result._replace(loss=result.loss * poison)

    student.loss = poisoned
    result = train_step(student, FakeTeacher(dense), batches, 0.0, LAYOUT)
    assert result.skipped
    assert all(gradient.isnan().any() for gradient in student.engine.gradients.values())


def test_validation_gives_the_losses_of_a_step_and_changes_nothing(student, batches):
    before = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    validation = validate(student, FakeTeacher(dense), iter(batches), LAYOUT)
    assert student.model.training
    assert all(torch.equal(p, before[name]) for name, p in student.model.named_parameters())
    result = train_step(student, FakeTeacher(dense), batches, 0.0, LAYOUT)
    assert validation.loss == pytest.approx(result.loss, rel=1e-6)
    assert validation.diagnostics.keys() == result.diagnostics.keys()
    for measure in ("forward_kl", "student_entropy"):
        expected = pytest.approx(result.diagnostics[measure], rel=1e-6)
        assert validation.diagnostics[measure] == expected


def test_a_student_in_its_module_is_the_model_that_it_was(student):
    """Nothing of the model is replaced: it answers, generates, and is saved under its own names."""
    ids = torch.arange(1, 9)[None]
    twin = Qwen3ForCausalLM(student.model.config)
    twin.load_state_dict(student.model.state_dict())
    student.model.eval(), twin.eval()
    assert torch.equal(student.model(input_ids=ids).logits, twin(input_ids=ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = twin.generate(input_ids=ids, **options)
    assert torch.equal(student.model.generate(input_ids=ids, **options), expected)
    with student.generating(whole=True) as (model, in_step):
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
        assert not in_step
    assert student.model.training


def test_a_loss_that_fails_leaves_the_model_as_it_was(student, batches):
    with (
        pytest.raises(ValueError, match="labels"),
        FakeTeacher(dense).targets(batches[0]) as targets,
    ):
        student.engine.module(batches[0].model_inputs, batches[1].labels, None, targets)
    assert "forward" not in vars(student.model.lm_head)


def test_the_state_of_the_module_names_each_weight_once_and_loads_back(student):
    module = student.engine.module
    state = module.state_dict()
    names = {f"model.{name}" for name in student.model.state_dict()}
    assert state.keys() == names
    changed = {name: tensor + 1.0 for name, tensor in state.items()}
    module.load_state_dict(changed, strict=True)
    assert torch.equal(student.model.lm_head.weight, changed["model.lm_head.weight"])


def test_trainable_parameters_are_those_with_a_gradient(student):
    assert len(student.trainable_parameters) == len(list(student.model.parameters()))
    student.model.lm_head.requires_grad_(False)
    assert all(p is not student.model.lm_head.weight for p in student.trainable_parameters)


def test_export_goes_through_the_engine(student, monkeypatch):
    calls = []
    monkeypatch.setattr("kd.models.student.export_student", lambda *call: calls.append(call))
    tokenizer, folder = SimpleNamespace(), SimpleNamespace()
    student.export(tokenizer, folder)
    assert calls == [(student.engine, student.model, tokenizer, folder)]


def test_a_validation_looks_at_signals_and_leaves_the_model_training(student, batches):
    asked = []

    def is_interrupted():
        asked.append(True)
        return len(asked) == 2

    result = validate(student, FakeTeacher(dense), batches * 10, LAYOUT, is_interrupted)
    assert result is None
    assert len(asked) == 2
    assert student.model.training
    assert validate(student, FakeTeacher(dense), batches, LAYOUT, lambda: True) is not None, "short"
