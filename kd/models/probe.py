"""Check, before a GPU hour is spent, that the weights were loaded and that the loss knows the
model's head.

transformers 5 under ZeRO-3 has silently left weights at their random initial values; and an
architecture that does something unknown between lm_head and softmax would be trained on wrong
logits. A few tokens show both.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kd.errors import UserError
from kd.losses.reference import full_logits
from kd.models.head import backbone, head_of

NUM_PROBE_TOKENS = 16
# Relative L2 errors. Another attention kernel or reduction order moves bf16 states by some 0.01,
# fp32 by 1e-6; one layer left random moves them by more than 0.5.
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}
# Logits from the same hidden states: only the rounding of the head's own few operations.
HEAD_TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
# Half of the probe against all of it; models that attend to both sides are beyond 0.5.
CAUSAL_TOLERANCE = 0.3


class Probed(NamedTuple):
    """What a model makes of the probe: last hidden states (1, 16, H), and their product with the
    lm_head (1, 16, V).
    """

    hidden_BLH: Tensor
    logits_BLV: Tensor


class Reference(NamedTuple):
    """What a probe finds of a whole model. keeps_packed_apart: whether sequences that are packed,
    with positions that restart, have the states that each has by itself.
    """

    probed: Probed
    keeps_packed_apart: bool


def run_probe(model: PreTrainedModel, input_ids: Tensor) -> Probed:
    """Under ZeRO-3 inside the forward() of what its engine wraps, so that its hooks gather."""
    hidden_BLH = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    return Probed(hidden_BLH, model.get_output_embeddings()(hidden_BLH))


@torch.no_grad()
def reference_of(model: PreTrainedModel, *, role: str) -> Reference:
    """What the whole model makes of the probe.

    Raises UserError for a weight that is not finite, for a head that is not known here, and for a
    model whose tokens see what follows them.
    """
    _check_finite(model, role)
    input_ids, run = _probe(model, "cpu"), backbone(model.eval())
    with _runs_on_cpu(model):
        outputs: Any = run(input_ids=input_ids, use_cache=False)
        hidden = getattr(outputs, "last_hidden_state", None)
        logits = model(input_ids=input_ids, use_cache=False).logits
        _check_head(model, hidden, logits, role)
        prefix = run(
            input_ids=input_ids[:, : NUM_PROBE_TOKENS // 2], use_cache=False
        ).last_hidden_state
        probed = run_probe(model, input_ids)
        keeps_packed_apart = _keeps_packed_apart(run, input_ids)
    whole = probed.hidden_BLH[:, : prefix.shape[1]]
    if not _relative_error(prefix, whole) <= CAUSAL_TOLERANCE:
        raise UserError(
            f"{role}.model: {type(model).__name__} lets a token see the tokens after it: choose a "
            "causal model"
        )
    return Reference(probed, keeps_packed_apart)


@torch.no_grad()
def verify_weights(
    model: PreTrainedModel,
    run: Callable[[Tensor], Probed],
    reference: Probed | None,
    *,
    role: str,
    device: torch.device,
) -> float:
    """Run the probe through the model's engine; where a reference is given, compare and return the
    larger relative L2 error, of states and of logits (0.0 elsewhere). Raises UserError when they
    differ: the weights did not arrive.

    Collective: every rank must call this.
    run: the engine around the model, ids (B, L) to what run_probe() returns in it.
    """
    training = model.training
    model.eval()
    probed = run(_probe(model, device))
    model.train(training)
    if reference is None:
        return 0.0
    largest = 0.0
    for what, ours, theirs in zip(("hidden states", "logits"), probed, reference, strict=True):
        error = _relative_error(ours.cpu(), theirs)
        if not error <= TOLERANCE[ours.dtype]:
            raise UserError(
                f"{role}.model: {what} after loading differ from those of the checkpoint "
                f"(relative error {error:.2g}): the weights were not loaded correctly. Try the "
                "versions in constraints.txt"
            )
        largest = max(largest, error)
    return largest


def _keeps_packed_apart(run: nn.Module, input_ids: Tensor) -> bool:
    """The second half alone, against itself packed behind the first: a state (Mamba), a bias by
    distance (ALiBi) or a mask made without positions carries the first into it.
    """
    half = NUM_PROBE_TOKENS // 2
    position_ids = torch.arange(half, device=input_ids.device).repeat(2)[None]
    try:
        packed = run(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    except TypeError:  # takes no positions
        return False
    alone = run(input_ids=input_ids[:, half:], use_cache=False).last_hidden_state
    error = _relative_error(packed.last_hidden_state[:, half:], alone)
    return error <= TOLERANCE[alone.dtype]


def _check_finite(model: PreTrainedModel, role: str) -> None:
    for name, parameter in model.named_parameters():
        low, high = torch.aminmax(parameter) if parameter.numel() else (parameter, parameter)
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise UserError(
                f"{role}.model: {name} has values that are not finite (NaN or infinity): the "
                "checkpoint is damaged, or comes from a run that had diverged"
            )


def _check_head(model: PreTrainedModel, hidden: Tensor | None, logits: Tensor, role: str) -> None:
    lm_head, error = model.get_output_embeddings(), math.inf
    if (
        hidden is not None
        and lm_head is not None
        and lm_head.weight.shape == (logits.shape[-1], hidden.shape[-1])
    ):
        ours = full_logits(hidden.flatten(0, 1), head_of(model), torch.float32)
        error = _relative_error(ours, logits.flatten(0, 1))
    if not error <= HEAD_TOLERANCE[model.dtype]:
        raise UserError(
            f"{role}.model: {type(model).__name__} does something between lm_head and logits that "
            f"is not supported (relative error {error:.2g}): add it to kd/models/head.py"
        )


@contextlib.contextmanager
def _runs_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model that was built with flash attention, which has no CPU kernel, attends without
    it.
    """
    attention = model.config._attn_implementation
    if not attention.startswith("flash"):
        yield
        return
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(attention)


def _probe(model: PreTrainedModel, device: torch.device | str) -> Tensor:
    # Spread over the vocabulary, so that no rank's shard of the embedding goes unread.
    vocab_size = model.config.get_text_config().vocab_size
    return (torch.arange(NUM_PROBE_TOKENS, device=device) * 104729 % vocab_size)[None]


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
