"""Run by the launcher on every rank: one global batch in every way that it may be cut up, and
wherever teacher and student may live.

layouts_worker.py RECIPE FOLDER OUTPUT

writes {case: {"loss": [loss, reference], "gradient": relative error, "micro_batches": number}}
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from full_logits import full_loss
from transformers import AutoModelForCausalLM, PreTrainedModel

from kd.data.collate import collate
from kd.data.dataset import Examples, load_data
from kd.data.loader import Loader
from kd.data.tokenizers import load_tokenizers
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import student_ds_config
from kd.models import trained
from kd.models.student import Student
from kd.plan.lengths import batch_shape
from kd.recipe import Recipe, StudentSection, load_recipe
from kd.training import build
from kd.training.build import build_live_teacher, build_student, choose_layout
from kd.training.step import train_step

CUTS: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch_size": 1},
    "three of eight": {"micro_batch_size": 3},
    "padded budget": {"max_tokens_per_micro_batch": 90},
    "packed budget": {"max_tokens_per_micro_batch": 90, "sequence_layout": "packed"},
    "packed by number": {"micro_batch_size": 3, "sequence_layout": "packed"},
}
STUDENTS, TEACHERS = ("zero1_fp32.json", "zero2_fp32.json", "zero3_cpu.json"), ("gpu", "world")
# What is trained of each student beside a teacher of its own: keys of [student]
TRAINED: dict[str, dict[str, Any]] = {
    "adapters": {"student.lora": {"rank": 4}, "student.gradient_checkpointing": True},
    "adapters, whole": {"student.lora": {"rank": 4}, "student.gradient_checkpointing": False},
    "frozen head": {"student.freeze_head": True},
}


def set_trained(
    model: PreTrainedModel, section: StudentSection, seed: int, std: float = 1e-5
) -> None:
    """As the real one, and B a little off zero, so that A has a gradient and the probe passes."""
    trained.set_trained(model, section, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=std)  # drawn behind the seed that A was drawn from


def main() -> None:
    build.set_trained = set_trained  # type: ignore[attr-defined]
    recipe, folder, output = load_recipe(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    layout = init_distributed()
    tokenizer = load_tokenizers(recipe)
    examples = load_data(recipe, tokenizer).train
    results: dict[str, Any] = {}
    kinds = [(shard, "all", {}) for shard in TEACHERS]
    kinds += [("gpu", name, changes) for name, changes in TRAINED.items()]
    for student_json, (shard, kind, changes) in itertools.product(STUDENTS, kinds):
        own = folder / student_json
        lives = recipe.with_values(
            {
                "teacher.shard": shard,
                "deepspeed.student": str(own) if own.exists() else student_json,
                "training.max_grad_norm": 1e9,
                **changes,
            }
        )
        found = _cuts(lives, examples, tokenizer.pad_token_id, layout)
        results |= {f"{kind} {case}": result for case, result in found.items()}
    if layout.rank == 0:
        output.write_text(json.dumps(results))
    dist.barrier()


def capture_gradients(student: Student) -> dict[str, torch.Tensor]:
    """Filled at each boundary of an optimizer step, by name."""
    captured: dict[str, torch.Tensor] = {}
    step = student.engine.step

    def capture_and_step() -> None:
        if student.engine.is_gradient_accumulation_boundary():
            for name, parameter in student.model.named_parameters():
                if parameter.requires_grad:
                    captured[name] = safe_get_full_grad(parameter).clone()
        step()

    student.engine.step = capture_and_step
    return captured


def _cuts(recipe: Recipe, examples: Examples, pad: int, layout: Layout) -> dict[str, Any]:
    teacher = build_live_teacher(recipe, layout)
    assert teacher is not None
    ds_config = student_ds_config(recipe, layout.world_size, "cpu")
    student = build_student(recipe, ds_config, layout)
    captured = capture_gradients(student)
    results, reference = {}, None
    for name, training in CUTS.items():
        cut = recipe.with_values({f"training.{key}": value for key, value in training.items()})
        shape = batch_shape(cut, choose_layout(cut, student, teacher))
        loader = Loader(examples, shape, recipe.run.seed, pad)
        batches = loader.micro_batches(0, layout)
        result = train_step(student, teacher, batches, 0.0, layout)
        if layout.rank == 0:
            rows = [
                int(i) for rank in loader.plan_step(0, 1).micro_batches for m in rank for i in m
            ]
            reference = reference or _reference(recipe, examples, rows, pad)
            case = f"{recipe.teacher.shard} {Path(recipe.deepspeed.student).stem} {name}"
            results[case] = {
                "loss": [result.loss, reference[0]],
                "gradient": relative_error(captured, reference[1]),
                "micro_batches": len(batches),
            }
    return results


def _reference(
    recipe: Recipe, examples: Examples, rows: list[int], pad: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """One process, one sequence at a time, full logits, plain autograd."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(section.model, dtype=torch.float32)
        for section in (recipe.student, recipe.teacher)
    )
    set_trained(student, recipe.student, recipe.run.seed)
    batches = [collate([examples[i]], pad) for i in rows]
    num_tokens = sum(batch.num_supervised_tokens for batch in batches)
    loss = sum(full_loss(recipe, student, teacher, batch) for batch in batches) / num_tokens
    loss.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.requires_grad}
    return float(loss), gradients


def relative_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The worst of all parameters, relative to the reference's norm."""
    assert actual.keys() == expected.keys()
    return max(float((actual[n] - g).norm() / g.norm()) for n, g in expected.items())


if __name__ == "__main__":
    main()
