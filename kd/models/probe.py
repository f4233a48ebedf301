"""Proof, before a GPU hour is spent, that weights arrived and that the model's head is one we can fuse.

transformers 5 under ZeRO-3 has left weights at their random start without a word; and an architecture that does
something unknown between lm_head and softmax would be trained on wrong logits. Both show on a few tokens.
"""

import torch
from transformers import PreTrainedModel

from kd.errors import UserError
from kd.losses.heads import Projection, logits_of
from kd.models.head import backbone, head_of

NUM_PROBE_TOKENS = 16
# Relative L2 errors. Another attention kernel or reduction order moves bf16 states by some 0.01, fp32 by 1e-6;
# one layer left random moves them by more than 0.5.
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-3}


@torch.no_grad()
def reference_states(model: PreTrainedModel, *, role: str) -> torch.Tensor:
    """Last hidden states (1, 16, H) of a fixed probe, from the whole model. Raises UserError for an unknown head."""
    input_ids = _probe(model, "cpu")
    model = model.eval()
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    head = Projection(hidden.flatten(0, 1), *head_of(model)).with_operand_head(torch.float32)
    ours = logits_of(head.hidden_NH.float(), head, torch.float32)
    error = _relative_error(ours, model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1))
    if error > TOLERANCE[hidden.dtype]:
        raise UserError(
            f"{role}.model: {type(model).__name__} does something between lm_head and logits that is not known here "
            f"(relative error {error:.2g}); teach kd/models/head.py about it"
        )
    return hidden


@torch.no_grad()
def verify_weights(model: PreTrainedModel, reference: torch.Tensor | None, *, role: str, device: torch.device) -> float:
    """Run the probe through the partitioned model, on all ranks; where a reference is given, compare and return the
    relative L2 error (0.0 elsewhere). Raises UserError when the states differ: the weights did not arrive.
    """
    training = model.training
    hidden = backbone(model.eval())(input_ids=_probe(model, device), use_cache=False).last_hidden_state
    model.train(training)
    if reference is None:
        return 0.0
    error = _relative_error(hidden.cpu(), reference)
    if not error <= TOLERANCE[hidden.dtype]:
        raise UserError(
            f"{role}.model: hidden states after loading differ from the checkpoint's (relative error {error:.2g}): "
            "its weights did not arrive. Try the versions of constraints.txt"
        )
    return error


def _probe(model: PreTrainedModel, device: torch.device | str) -> torch.Tensor:
    # Spread over the vocabulary, so that no rank's shard of the embedding goes unread.
    vocab_size = model.config.get_text_config().vocab_size
    return (torch.arange(NUM_PROBE_TOKENS, device=device) * 104729 % vocab_size)[None]


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
