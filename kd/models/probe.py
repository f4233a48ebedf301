"""Proof, before a GPU hour is spent, that weights arrived and that the model's head is one we can
fuse.

transformers 5 under ZeRO-3 has left weights at their random start without a word; and an
architecture that does something unknown between lm_head and softmax would be trained on wrong
logits. Both show on a few tokens.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
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


@torch.no_grad()
def reference_states(model: PreTrainedModel, *, role: str) -> torch.Tensor:
    """Last hidden states (1, 16, H) of a fixed probe, from the whole model.

    Raises UserError for a head that is not known here, and for a model whose tokens see what
    follows them.
    """
    input_ids, run = _probe(model, "cpu"), backbone(model.eval())
    with _runs_on_cpu(model):
        outputs: Any = run(input_ids=input_ids, use_cache=False)
        hidden = getattr(outputs, "last_hidden_state", None)
        logits = model(input_ids=input_ids, use_cache=False).logits
        _check_head(model, hidden, logits, role)
        prefix = run(
            input_ids=input_ids[:, : NUM_PROBE_TOKENS // 2], use_cache=False
        ).last_hidden_state
    if (
        not _relative_error(prefix, outputs.last_hidden_state[:, : prefix.shape[1]])
        <= CAUSAL_TOLERANCE
    ):
        raise UserError(
            f"{role}.model: a token of {type(model).__name__} sees the tokens after it: only "
            "causal models are trained"
        )
    return outputs.last_hidden_state


@torch.no_grad()
def verify_weights(
    model: PreTrainedModel,
    reference: torch.Tensor | None,
    *,
    role: str,
    device: torch.device,
    hidden_states: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """Run the probe through the partitioned model; where a reference is given, compare and return
    the relative L2 error (0.0 elsewhere). Raises UserError when the states differ: the weights did
    not arrive.

    Collective: every rank must call this.
    hidden_states: how to run the model where its engine is to see it, ids (B, L) to states (B, L,
        H).
    """
    training, input_ids = model.training, _probe(model, device)
    model.eval()
    if hidden_states is None:
        hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    else:
        hidden = hidden_states(input_ids)
    model.train(training)
    if reference is None:
        return 0.0
    error = _relative_error(hidden.cpu(), reference)
    if not error <= TOLERANCE[hidden.dtype]:
        raise UserError(
            f"{role}.model: hidden states after loading differ from the checkpoint's (relative "
            f"error {error:.2g}): its weights did not arrive. Try the versions of constraints.txt"
        )
    return error


def _check_head(
    model: PreTrainedModel, hidden: torch.Tensor | None, logits: torch.Tensor, role: str
) -> None:
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
            f"is not known here (relative error {error:.2g}); teach kd/models/head.py about it"
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


def _probe(model: PreTrainedModel, device: torch.device | str) -> torch.Tensor:
    # Spread over the vocabulary, so that no rank's shard of the embedding goes unread.
    vocab_size = model.config.get_text_config().vocab_size
    return (torch.arange(NUM_PROBE_TOKENS, device=device) * 104729 % vocab_size)[None]


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
