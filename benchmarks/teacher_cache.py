"""What each kind of teacher's cache costs in bytes, and how far its loss and gradient are from the
teacher's own.

    python benchmarks/teacher_cache.py [--recipe tiny smollm2_gsm] [--rows 16] [--output DIR]

Whole traces of the recipe's training data, one process on the CPU, in fp32. Each kind encodes the
teacher's states and is decoded again, as launch/cache.py and training do; the loss is forward_kl at
the recipe's temperature, and the gradient that of the student's last hidden states, on which all
others depend. `vector` is that of a student whose head is frozen. Writes DIR/teacher_cache.json and
.md. The smollm2_gsm pair is made by `make real`.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd.cache.kinds import Heads, HiddenKind, Kind, SampledKind, TopKKind, VectorKind
from kd.cli import run
from kd.data.collate import Batch, collate
from kd.data.dataset import load_data
from kd.data.tokenizers import load_tokenizers
from kd.files import write_json, write_text
from kd.losses import (
    DenseTargets,
    Head,
    SampledTargets,
    TopKTargets,
    VectorTargets,
    distillation_loss,
    expected_logit_loss,
    sparse_distillation_loss,
)
from kd.losses.targets import Targets
from kd.models.head import head_of, hidden_states
from kd.models.loading import load_whole
from kd.recipe import ROOT, Recipe, load_recipe
from kd.runs.environment import environment

HEADER = """\
| recipe | kind | bytes a token | KD | off by | gradient's error |
|---|---|---|---|---|---|
"""
NUM_DRAWS = 200  # seeds of a cache of drawn tokens, for a vocabulary that is not
LARGE = 1000


class Pair(NamedTuple):
    """States of both models over the same traces, each with its labels."""

    batches: list[Batch]
    student: list[Tensor]
    teacher: list[Tensor]
    heads: Heads
    temperature: float


def main() -> None:
    arguments = parse_arguments()
    rows = []
    for name in arguments.recipe:
        pair = pair_of(load_recipe(name), arguments.rows)
        rows += [{"recipe": name, **row} for row in rows_of(pair)]
    facts = {
        "command": f"python benchmarks/teacher_cache.py {shlex.join(sys.argv[1:])}".strip(),
        "environment": environment(),
        "num_rows": arguments.rows,
        "rows": rows,
    }
    write_json(arguments.output / "teacher_cache.json", facts)
    table = HEADER + "".join(markdown(row) for row in rows)
    write_text(arguments.output / "teacher_cache.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare the kinds of a teacher's cache.")
    parser.add_argument("--recipe", nargs="+", default=["tiny", "smollm2_gsm"])
    parser.add_argument("--rows", type=int, default=16, help="traces of each recipe")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


@torch.no_grad()
def pair_of(recipe: Recipe, num_rows: int) -> Pair:
    assert recipe.teacher is not None
    recipe = recipe.with_values({"truncation.keep_fraction": 1.0})
    tokenizer = load_tokenizers(recipe)
    examples = load_data(recipe, tokenizer).train
    batches = [collate([examples[i]], tokenizer.pad_token_id) for i in range(num_rows)]
    student, teacher = (
        load_whole(section, {}, role=role).eval()
        for role, section in (("student", recipe.student), ("teacher", recipe.teacher))
    )
    heads = [head_of(model) for model in (student, teacher)]
    vocab_size = min(head.weight_VH.shape[0] for head in heads)
    return Pair(
        batches,
        [hidden_states(student, batch.model_inputs) for batch in batches],
        [hidden_states(teacher, batch.model_inputs) for batch in batches],
        Heads(heads[1], heads[0], vocab_size),
        recipe.loss.temperature,
    )


def rows_of(pair: Pair) -> Iterator[dict[str, Any]]:
    exact = loss_of(pair, [DenseTargets(states, pair.heads.teacher) for states in pair.teacher])
    kinds: dict[str, Kind] = {f"hidden {d}": HiddenKind(d) for d in ("fp32", "bf16", "int8")}
    hidden_size = pair.teacher[0].shape[-1]
    kinds["hidden int8, a scale a token"] = HiddenKind("int8", group=hidden_size)
    kinds["vector fp32"] = VectorKind("", pair.temperature, "fp32")
    kinds["vector bf16"] = VectorKind("", pair.temperature, "bf16")
    for k in (8, 16, 64, 128):
        if k < pair.heads.vocab_size:
            kinds[f"top_k {k}"] = TopKKind(k, pair.temperature)
    for name, kind in kinds.items():
        yield row_of(name, kind, exact, loss_of(pair, decoded(pair, kind, seed=0)), pair)
    sampled = SampledKind(12, pair.temperature)
    if pair.heads.vocab_size > LARGE:
        once = loss_of(pair, decoded(pair, sampled, seed=0))
        yield row_of("sampled 12", sampled, exact, once, pair)
        return
    found = [loss_of(pair, decoded(pair, sampled, seed)) for seed in range(NUM_DRAWS)]
    yield row_of("sampled 12", sampled, exact, found[0], pair)
    kds = torch.tensor([kd for kd, _ in found], dtype=torch.float64)
    mean = float(kds.mean()), torch.stack([gradient for _, gradient in found]).mean(0)
    row = row_of(f"sampled 12, mean of {NUM_DRAWS}", sampled, exact, mean, pair)
    yield row | {"standard_error": float(kds.std() / NUM_DRAWS**0.5)}


def row_of(
    name: str,
    kind: Kind,
    exact: tuple[float, Tensor],
    found: tuple[float, Tensor],
    pair: Pair,
) -> dict[str, Any]:
    assert pair.heads.student is not None
    sizes = [head.weight_VH.shape[1] for head in (pair.heads.teacher, pair.heads.student)]
    return {
        "kind": name,
        "bytes_per_token": kind.bytes_per_token(*sizes),
        "kd": found[0],
        "kd_of_teacher": exact[0],
        "gradient_error": float((found[1] - exact[1]).norm() / exact[1].norm()),
    }


def decoded(pair: Pair, kind: Kind, seed: int) -> list[Targets]:
    targets = []
    for number, states_1LH in enumerate(pair.teacher):
        fields = kind.encode(states_1LH[0], pair.heads, seed * len(pair.teacher) + number)
        of_batch = {k: v[None] for k, v in kind.decode(fields, torch.float32).items()}
        targets.append(kind.targets(of_batch, pair.heads.teacher, pair.heads.vocab_size))
    return targets


def loss_of(pair: Pair, targets: list[Targets]) -> tuple[float, Tensor]:
    """Mean KD of a token, in nats, and its gradient in all hidden states of the student."""
    head = pair.heads.student
    assert head is not None
    kd, gradients, num_tokens = 0.0, [], 0
    for batch, states_1LH, target in zip(pair.batches, pair.student, targets, strict=True):
        hidden_1LH = states_1LH.clone().requires_grad_()
        result = one_loss(hidden_1LH, head, target, batch.labels, pair.temperature)
        gradients.append(torch.autograd.grad(result.loss, hidden_1LH)[0].flatten())
        kd += float(result.kd)
        num_tokens += batch.num_supervised_tokens
    return kd / num_tokens, torch.cat(gradients)


def one_loss(
    hidden_1LH: Tensor, head: Head, target: Targets, labels: Tensor, temperature: float
) -> Any:
    student = (hidden_1LH, head.weight_VH.detach())
    options: dict[str, Any] = {"temperature": temperature, "kd_weight": 1.0, "ce_weight": 0.0}
    options |= {"student_bias": head.bias_V, "student_scale": head.scale}
    match target:
        case DenseTargets():
            teacher = target.hidden_BLH, target.head.weight_VH
            return distillation_loss(*student, *teacher, labels, **options)
        case TopKTargets():
            top = target.ids_BLK, target.logprobs_BLK
            return sparse_distillation_loss(*student, *top, labels, **options)
        case SampledTargets() | VectorTargets():
            return expected_logit_loss(*student, target, labels, **options)


def markdown(row: dict[str, Any]) -> str:
    off_by = row["kd"] - row["kd_of_teacher"]
    error = f" ± {row['standard_error']:.1g}" if "standard_error" in row else ""
    return (
        f"| {row['recipe']} | {row['kind']} | {row['bytes_per_token']:,.0f} | {row['kd']:.4f} | "
        f"{off_by:+.2g}{error} | {row['gradient_error']:.2g} |\n"
    )


if __name__ == "__main__":
    run(main)
