"""What a cache stores for each token, and how to make targets of it.

Shapes: T tokens of a trace, C rows of a chunk, H hidden size (Hs the student's), G groups of
channels, K tokens of the teacher, V shared vocabulary.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import (
    DenseTargets,
    Head,
    SampledTargets,
    Targets,
    TopKTargets,
    VectorTargets,
)
from kd.losses.heads import finish_logits, operand, product, shared_head

Fields = dict[str, Tensor]  # by name, (T, ...) each
CHUNK = 512  # rows whose logits are held at a time


class Heads(NamedTuple):
    """What turns states into probabilities; student: only for a vector."""

    teacher: Head
    student: Head | None
    vocab_size: int  # that both share


@dataclass(frozen=True)
class HiddenKind:
    """The teacher's last hidden states: exact where dtype is no narrower than they are. Serves any
    divergence and temperature; the teacher's head is read too.

    int8: each group of channels of a token is divided by its own largest value.
    """

    dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    group: int = 32  # channels that share a scale, in int8
    name: Literal["hidden"] = "hidden"

    def bytes_per_token(self, hidden_size: int, student_hidden_size: int) -> float:
        scales = 4 / self.group if self.dtype == "int8" else 0
        return hidden_size * ({"fp32": 4, "bf16": 2, "int8": 1}[self.dtype] + scales)

    def encode(self, hidden_TH: Tensor, heads: Heads, seed: int) -> Fields:
        if self.dtype != "int8":
            return {"hidden": hidden_TH.to(_DTYPES[self.dtype])}
        groups_TGC = _in_groups(hidden_TH.float(), self.group)
        scale_TG = groups_TGC.abs().amax(-1) / 127
        least = torch.finfo(torch.float32).tiny
        whole_TGC = (groups_TGC / scale_TG.clamp(min=least)[..., None]).round()
        size = hidden_TH.shape[1]
        return {"hidden": whole_TGC.to(torch.int8).flatten(1)[:, :size], "scale": scale_TG}

    def decode(self, fields: Fields, dtype: torch.dtype) -> Fields:
        """dtype: of the teacher's head."""
        if self.dtype != "int8":
            return {"hidden": fields["hidden"].to(dtype)}
        groups_TGC = _in_groups(fields["hidden"].float(), self.group)
        groups_TGC = groups_TGC * fields["scale"][..., None]
        size = fields["hidden"].shape[1]
        return {"hidden": groups_TGC.flatten(1)[:, :size].to(dtype)}

    def targets(self, fields: Fields, head: Head | None, vocab_size: int) -> Targets:
        assert head is not None
        return DenseTargets(fields["hidden"], head)


@dataclass(frozen=True)
class TopKKind:
    """The teacher's K most likely tokens and their log-probabilities at one temperature, of its
    whole vocabulary; what they leave is one outcome more (kd.losses.sparse).
    """

    k: int = 128
    temperature: float = 1.0
    name: Literal["top_k"] = "top_k"

    def bytes_per_token(self, hidden_size: int, student_hidden_size: int) -> float:
        return 8.0 * self.k

    def encode(self, hidden_TH: Tensor, heads: Heads, seed: int) -> Fields:
        if self.k > heads.vocab_size:
            raise UserError(
                f"--num-tokens {self.k}: the models share only {heads.vocab_size} tokens; lower it"
            )
        ids, logprobs = [], []
        for logits_CV in _logits(hidden_TH, heads.teacher):
            logprobs_CV = torch.log_softmax(logits_CV / self.temperature, -1)
            top = logprobs_CV[:, : heads.vocab_size].topk(self.k)
            ids.append(top.indices.to(torch.int32))
            logprobs.append(top.values)
        return {"ids": torch.cat(ids), "logprobs": torch.cat(logprobs)}

    def decode(self, fields: Fields, dtype: torch.dtype) -> Fields:
        return fields | {"ids": fields["ids"].long()}

    def targets(self, fields: Fields, head: Head | None, vocab_size: int) -> Targets:
        return TopKTargets(fields["ids"], fields["logprobs"])


@dataclass(frozen=True)
class SampledKind:
    """K tokens drawn from the teacher at one temperature, each of weight 1 / K, and its entropy:
    only forward_kl, unbiased in expectation (arXiv 2503.16870), at 4 bytes a draw.
    """

    k: int = 12
    temperature: float = 1.0
    name: Literal["sampled"] = "sampled"

    def bytes_per_token(self, hidden_size: int, student_hidden_size: int) -> float:
        return 4.0 * self.k + 4

    def encode(self, hidden_TH: Tensor, heads: Heads, seed: int) -> Fields:
        """seed: the same draws for the same trace, on the same kind of device."""
        generator = torch.Generator(hidden_TH.device).manual_seed(seed)
        ids, entropies = [], []
        for logits_CV in _logits(hidden_TH, heads.teacher):
            probability_CV, entropy_C = _distribution(logits_CV, heads, self.temperature)
            drawn = torch.multinomial(probability_CV, self.k, replacement=True, generator=generator)
            ids.append(drawn.to(torch.int32))
            entropies.append(entropy_C)
        return {"ids": torch.cat(ids), "entropy": torch.cat(entropies)[:, None]}

    def decode(self, fields: Fields, dtype: torch.dtype) -> Fields:
        return fields | {"ids": fields["ids"].long()}

    def targets(self, fields: Fields, head: Head | None, vocab_size: int) -> Targets:
        return SampledTargets(fields["ids"], fields["entropy"].squeeze(-1), vocab_size)


@dataclass(frozen=True)
class VectorKind:
    """The teacher's probabilities at one temperature, times the student's head, and their entropy:
    only forward_kl, exact while that head stays as it is.

    head_sha256: of the student's head and bias, as they were multiplied.
    """

    head_sha256: str = ""
    temperature: float = 1.0
    dtype: Literal["fp32", "bf16"] = "bf16"
    name: Literal["vector"] = "vector"

    def bytes_per_token(self, hidden_size: int, student_hidden_size: int) -> float:
        return student_hidden_size * {"fp32": 4, "bf16": 2}[self.dtype] + 8.0

    def encode(self, hidden_TH: Tensor, heads: Heads, seed: int) -> Fields:
        assert heads.student is not None
        student = shared_head(heads.student, heads.vocab_size, torch.float32)
        vectors, biases, entropies = [], [], []
        for logits_CV in _logits(hidden_TH, heads.teacher):
            probability_CV, entropy_C = _distribution(logits_CV, heads, self.temperature)
            vectors.append(probability_CV @ student.weight_VH.float())
            bias_V = student.bias_V
            biases.append(entropy_C * 0 if bias_V is None else probability_CV @ bias_V.float())
            entropies.append(entropy_C)
        return {
            "vector": torch.cat(vectors).to(_DTYPES[self.dtype]),
            "bias": torch.cat(biases)[:, None],
            "entropy": torch.cat(entropies)[:, None],
        }

    def decode(self, fields: Fields, dtype: torch.dtype) -> Fields:
        return fields

    def targets(self, fields: Fields, head: Head | None, vocab_size: int) -> Targets:
        bias_BL, entropy_BL = (fields[name].squeeze(-1) for name in ("bias", "entropy"))
        return VectorTargets(fields["vector"], bias_BL, entropy_BL, vocab_size)


Kind = HiddenKind | TopKKind | SampledKind | VectorKind
KINDS: dict[str, type[Kind]] = {
    "hidden": HiddenKind,
    "top_k": TopKKind,
    "sampled": SampledKind,
    "vector": VectorKind,
}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def kind_of(name: str, parameters: dict[str, Any]) -> Kind:
    """The kind that a manifest names. Raises UserError for one of a later version."""
    if name not in KINDS:
        raise UserError(f"kind = {name!r}: this version reads only {', '.join(KINDS)}")
    try:
        return KINDS[name](**parameters)
    except TypeError as error:
        raise UserError(f"kind = {name!r}: {error}") from None


def parameters_of(kind: Kind) -> dict[str, Any]:
    """What a manifest holds besides its name."""
    return {key: value for key, value in asdict(kind).items() if key != "name"}


def head_sha256(head: Head) -> str:
    """Of all that turns a student's states into logits."""
    digest = hashlib.sha256(repr((head.scale, head.softcap, head.weight_VH.dtype)).encode())
    for tensor in (head.weight_VH, head.bias_V):
        if tensor is not None:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _in_groups(values_TH: Tensor, group: int) -> Tensor:
    """(T, G, C), the last group filled with zeros."""
    missing = -values_TH.shape[1] % group
    filled: Tensor = torch.nn.functional.pad(values_TH, (0, missing))
    return filled.reshape(len(filled), -1, group)


def _logits(hidden_TH: Tensor, head: Head) -> Iterator[Tensor]:
    """In fp32, of the teacher's whole vocabulary, a chunk of rows at a time."""
    whole = shared_head(head, head.weight_VH.shape[0], torch.float32)
    for hidden_CH in hidden_TH.split(CHUNK):
        logits_CV = product(
            operand(hidden_CH, torch.float32), whole.weight_VH.T, dtype=torch.float32
        )
        yield finish_logits(logits_CV, whole, torch.float32)


def _distribution(logits_CV: Tensor, heads: Heads, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities over the shared vocabulary (C, V), and their entropy in nats (C,)."""
    log_p_CV = torch.log_softmax(logits_CV[:, : heads.vocab_size] / temperature, -1)
    probability_CV = log_p_CV.exp()
    return probability_CV, -(probability_CV * log_p_CV).nan_to_num(0.0).sum(-1)
