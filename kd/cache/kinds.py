"""What a cache holds of each token, and how it becomes targets again.

Shapes: T tokens of a trace, H hidden size, G groups of channels, K tokens of the teacher, V
vocabulary.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import Head
from kd.losses.heads import finish_logits, operand, product, shared_head

Fields = dict[str, Tensor]  # by name, (T, ...) each
GROUP = 32  # channels that share a scale
# Rows whose logits are held at a time
CHUNK = 512


@dataclass(frozen=True)
class HiddenKind:
    """The teacher's last hidden states: exact where dtype is no narrower than they are. Serves any
    divergence and temperature; the teacher's head is read beside it.

    int8: each group of 32 channels of a token is divided by its own largest value.
    """

    dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    name: Literal["hidden"] = "hidden"

    def bytes_per_token(self, hidden_size: int) -> float:
        scales = 4 / GROUP if self.dtype == "int8" else 0
        return hidden_size * ({"fp32": 4, "bf16": 2, "int8": 1}[self.dtype] + scales)

    def encode(self, hidden_TH: Tensor, head: Head, vocab_size: int) -> Fields:
        if self.dtype != "int8":
            dtype = torch.float32 if self.dtype == "fp32" else torch.bfloat16
            return {"hidden": hidden_TH.to(dtype)}
        groups_TGC = _in_groups(hidden_TH.float())
        scale_TG = groups_TGC.abs().amax(-1) / 127
        whole = (
            groups_TGC / scale_TG.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        ).round()
        size = hidden_TH.shape[1]
        return {"hidden": whole.to(torch.int8).flatten(1)[:, :size], "scale": scale_TG}

    def hidden_states(self, fields: Fields, dtype: torch.dtype) -> Tensor:
        """(T, H), as the teacher's head takes them."""
        if self.dtype != "int8":
            return fields["hidden"].to(dtype)
        groups_TGC = _in_groups(fields["hidden"].float()) * fields["scale"][..., None]
        return groups_TGC.flatten(1)[:, : fields["hidden"].shape[1]].to(dtype)


@dataclass(frozen=True)
class TopKKind:
    """The teacher's K most likely tokens and their log-probabilities at one temperature, of its
    whole vocabulary; what they leave is one outcome more (kd.losses.sparse).
    """

    k: int = 128
    temperature: float = 1.0
    name: Literal["top_k"] = "top_k"

    def bytes_per_token(self, hidden_size: int) -> float:
        return 8.0 * self.k

    def encode(self, hidden_TH: Tensor, head: Head, vocab_size: int) -> Fields:
        """vocab_size: what student and teacher share, of which the K are."""
        if self.k > vocab_size:
            raise UserError(f"--top-k {self.k}: the models share {vocab_size} tokens: lower it")
        ids, logprobs = [], []
        for logits_CV in _logits(hidden_TH, head):
            logprobs_CV = torch.log_softmax(logits_CV / self.temperature, -1)[:, :vocab_size]
            top = logprobs_CV.topk(self.k)
            ids.append(top.indices.to(torch.int32))
            logprobs.append(top.values)
        return {"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}


Kind = HiddenKind | TopKKind


def kind_of(name: str, parameters: dict[str, Any]) -> Kind:
    """The kind that a manifest names. Raises UserError for one of a later version."""
    kinds = {"hidden": HiddenKind, "top_k": TopKKind}
    if name not in kinds:
        raise UserError(f"kind = {name!r}: this version reads {' and '.join(kinds)}")
    try:
        found: Kind = kinds[name](**parameters)
    except TypeError as error:
        raise UserError(f"kind = {name!r}: {error}") from None
    return found


def parameters_of(kind: Kind) -> dict[str, Any]:
    """What a manifest holds beside its name."""
    return {key: value for key, value in asdict(kind).items() if key != "name"}


def _in_groups(values_TH: Tensor) -> Tensor:
    """(T, G, C), the last group filled with zeros."""
    missing = -values_TH.shape[1] % GROUP
    filled: Tensor = torch.nn.functional.pad(values_TH, (0, missing))
    return filled.reshape(len(filled), -1, GROUP)


def _logits(hidden_TH: Tensor, head: Head) -> Iterator[Tensor]:
    """In fp32, of the teacher's whole vocabulary, a chunk of rows at a time."""
    whole = shared_head(head, head.weight_VH.shape[0], torch.float32)
    for hidden_CH in hidden_TH.split(CHUNK):
        logits_CV = product(
            operand(hidden_CH, torch.float32), whole.weight_VH.T, dtype=torch.float32
        )
        yield finish_logits(logits_CV, whole, torch.float32)
