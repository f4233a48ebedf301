"""Run by the launcher on every rank: what loading a checkpoint gives back, and what is refused.

checkpoint_worker.py MODELS OUTPUT      writes {case: result}
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.distributed.layout import Layout
from kd.distributed.process_group import gather_objects, init_distributed
from kd.engine.checkpoint import MANIFEST, choose_checkpoint, load_checkpoint, save_checkpoint
from kd.engine.ds_config import student_ds_config
from kd.engine.pickles import check_pickles, pickle_files
from kd.engine.universal import universal_checkpoint
from kd.engine.zero3 import consolidated_state_dict
from kd.errors import UserError
from kd.models.student import Student
from kd.recipe import Recipe
from kd.training.build import build_student
from kd.training.step import train_step

# What is trained: keys of [student]. Dropout draws from the random state, which is restored.
TRAINED: dict[str, dict[str, Any]] = {
    "": {},
    ", adapters": {"lora": {"rank": 4, "dropout": 0.1}, "gradient_checkpointing": True},
    ", frozen head": {"freeze_head": True},
}
ENGINES = [(stage, dtype, "") for stage, dtype in ((1, "fp32"), (1, "bf16"), (2, "fp32"))]
ENGINES += [(2, "bf16", kind) for kind in TRAINED] + [(1, "bf16", ", adapters")]
ENGINES += [(3, "fp32", kind) for kind in reversed(TRAINED)]
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


class Runs:
    """A pickle of it runs a command when it is loaded."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (self.command,)


def main() -> None:
    models, output = Path(sys.argv[1]), Path(sys.argv[2])
    layout = init_distributed()
    results: dict[str, Any] = {}
    for stage, dtype, kind in ENGINES:
        name = f"stage {stage} {dtype}{kind}"
        student, folder = build(models, stage, dtype, layout, kind), output.parent / name
        results |= {
            f"{name}: {case}": result for case, result in go_back(student, folder, layout).items()
        }
        results[f"{name}: names"] = names_in(folder / "step_2")
        results[f"{name}: bytes"] = sum(
            path.stat().st_size for path in (folder / "step_2").glob("*.pt")
        )
    results |= convert(output.parent / "stage 2 fp32" / "step_2")
    results["refused"] = refuse(student, folder, output.parent / "was_run")
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))
    dist.barrier()


def build(models: Path, stage: int, dtype: str, layout: Layout, kind: str) -> Student:
    recipe = Recipe.model_validate(
        {
            "student": {"model": str(models / "tied"), "gradient_checkpointing": False}
            | TRAINED[kind],
            "data": {"path": "unused.jsonl"},
            "loss": {"kd_weight": 0.0, "ce_weight": 1.0},
            "training": {"global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.1},
            "deepspeed": {"student": "zero3_cpu.json"},
        }
    )
    ds_config = student_ds_config(recipe, 2, "cpu")
    ds_config["zero_optimization"]["stage"] = stage
    return build_student(recipe, ds_config | (BF16 if dtype == "bf16" else {}), layout)


def go_back(student: Student, folder: Path, layout: Layout) -> dict[str, bool]:
    """Train, save, train on, load, and train the same again."""
    engine = student.engine

    def steps(numbers: range) -> list[float]:
        return [train_step(student, None, [_batch(i)], 0.1, layout).loss for i in numbers]

    steps(range(2))
    saved, trained = _state(engine), len(student.trainable_parameters)
    save_checkpoint(engine, folder, 2, {"note": "two steps"})
    losses = steps(range(2, 5))
    changed = _state(engine)
    path = choose_checkpoint(folder, "auto", dict)
    assert path == folder / "step_2"
    state = load_checkpoint(engine, path, dict)
    restored = _state(engine)
    return {
        "training changed the weights, as many as are trained": _num_changed(saved, changed)
        == trained,
        "the weights come back": _equal(saved, restored),
        "the state of the loop comes back": state == {"note": "two steps"},
        "the same steps give the same losses": losses == steps(range(2, 5)),
    }


def convert(path: Path) -> dict[str, Any]:
    with universal_checkpoint(path) as converted:
        check_pickles(converted)
        return {
            "universal: files": len(pickle_files(converted)),
            "universal: names": names_in(path),
        }


def names_in(folder: Path) -> list[str]:
    """What the pickles of a folder name, besides what torch lets pass."""
    scan = torch.serialization.get_unsafe_globals_in_checkpoint
    return sorted({name for path in pickle_files(folder) for name in scan(str(path))})


def refuse(student: Student, folder: Path, was_run: Path) -> dict[str, list[str]]:
    """{case: what each rank says} of step_4, whose manifest is made to match; it is chosen, for its
    checksums are right, or else step_2.
    """

    def foreign(path: Path) -> None:
        torch.save(Runs(f"touch {was_run}"), path / "mp_rank_00_model_states.pt")

    def random_state(path: Path) -> None:
        (path / "rng_rank1.safetensors").write_bytes(b"garbage")

    def no_random_state(path: Path) -> None:
        (path / "rng_rank1.safetensors").unlink()

    def negative_step(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(manifest | {"step": -4}))

    found = {}
    for damage in (foreign, random_state, no_random_state, negative_step):
        save_checkpoint(student.engine, folder, 4, {"note": "four steps"})
        if dist.get_rank() == 0:
            damage(folder / "step_4")
            if damage is not negative_step:
                match(folder / "step_4")
        dist.barrier()
        path = choose_checkpoint(folder, "auto", dict)
        assert path is not None
        try:
            said = f"{load_checkpoint(student.engine, path, dict)} of {path.name}"
        except UserError as error:
            said = str(error)
        found[damage.__name__] = gather_objects(said)
        if dist.get_rank() == 0:
            (folder / "step_4").rename(folder / damage.__name__)
        dist.barrier()
    return found


def match(path: Path) -> None:
    """Give a changed checkpoint a manifest with the sizes and checksums that its files have."""
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"] = {
        file.name: {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.iterdir()
        if file.name != MANIFEST
    }
    (path / MANIFEST).write_text(json.dumps(manifest))


def _batch(index: int) -> Batch:
    random = np.random.default_rng([dist.get_rank(), index])
    ids = [random.integers(0, 150, 12) for _ in range(2)]
    sections = np.array([2, 8, 2])
    return collate(
        [Example(tokens, tokens, i, sections, read_start=0) for i, tokens in enumerate(ids)],
        pad_token_id=0,
    )


def _state(engine: Any) -> dict[str, torch.Tensor]:
    """The whole weights, on rank 0."""
    state = consolidated_state_dict(engine)
    return {name: tensor.clone() for name, tensor in (state or {}).items()}


def _num_changed(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> int:
    """On rank 0, a tied pair once."""
    if not one:
        return 0
    names = one.keys() - {"model.lm_head.weight"}
    return sum(not torch.equal(one[name], two[name]) for name in names)


def _equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return (
        one.keys() == two.keys()
        and len(one) > 0
        and all(torch.equal(one[name], two[name]) for name in one)
    )


if __name__ == "__main__":
    main()
