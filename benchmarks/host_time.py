"""What the host does for a micro-batch, in every layout of teacher and student, beside plain
modules.

    python benchmarks/host_time.py [--rounds 5] [--layers 28] [--output DIR]

A Qwen2 of 28 layers and tiny width on two ranks of the CPU: its arithmetic is next to nothing, what
is left is Python, hooks and launches, which no GPU takes over. Thread CPU time of the main thread
over kd.training.step.train_step, per micro-batch; layouts take turns in each round, and the median
of the rounds counts. "plain" is the same step around modules without an engine: torch's AdamW and
no communication, with the same checkpointing.

What makes the host wait for a GPU is counted too: reads of scalars and copies to the CPU, and what
synchronises streams and events, by the package that asked. Writes DIR/host_time.json and
host_time.md.
"""

import argparse
import contextlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kd.cli import run
from kd.files import read_json, write_json, write_text
from kd.recipe import ROOT, Recipe
from kd.runs.environment import environment

# layout -> (teacher.shard, stage of the student's JSON, checkpointing)
LAYOUTS = {
    "gpu_zero1": ("gpu", 1, True),
    "gpu_zero2": ("gpu", 2, True),
    "gpu_zero3": ("gpu", 3, True),
    "zero3_zero1": ("world", 1, True),
    "zero3_zero2": ("world", 2, True),
    "zero3_zero3": ("world", 3, True),
    "gpu_zero1_no_checkpointing": ("gpu", 1, False),
    "gpu_zero2_no_checkpointing": ("gpu", 2, False),
    "gpu_zero3_no_checkpointing": ("gpu", 3, False),
    "zero3_zero3_no_checkpointing": ("world", 3, False),
}
NUM_RANKS, NUM_MICRO_BATCHES, NUM_TOKENS = 2, 8, 16
HEADER = """\
| layout | teacher | student | checkpointing | ms per micro-batch, of them the teacher's \
| times plain \
| waits of kd and transformers a micro-batch, a step | of deepspeed |
|---|---|---|---|---|---|---|---|
"""


class Sides(NamedTuple):
    """Two students and teachers of one step."""

    student: Any
    teacher: Any


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        work(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder), arguments.layers)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(NUM_RANKS), __file__, "--worker", folder]
        command += ["--rounds", str(arguments.rounds), "--layouts", arguments.layouts]
        subprocess.run(command, check=True, cwd=ROOT, env=cpu_environment())
        measured: dict[str, Any] = read_json(Path(folder) / "measured.json")
    milliseconds, of_teacher = measured["milliseconds"], measured["milliseconds_of_teacher"]
    rows = [
        row_of(name, milliseconds)
        | {"teacher_ms_per_micro_batch": statistics.median(of_teacher[name])}
        | {"waits": measured["waits"][name]}
        for name in milliseconds
    ]
    command_line = f"python benchmarks/host_time.py {shlex.join(sys.argv[1:])}".strip()
    facts = {
        "command": command_line,
        "environment": environment(),
        "ranks": NUM_RANKS,
        "layers": arguments.layers,
        "tokens": NUM_TOKENS,
        "micro_batches": NUM_MICRO_BATCHES,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    write_json(arguments.output / "host_time.json", facts)
    table = HEADER + "".join(markdown(row) for row in rows)
    write_text(arguments.output / "host_time.md", table)
    print(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the host's time of a micro-batch.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=28, help="of teacher and student each")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="of these, in this order")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in arguments.layouts.split(","):
        if name not in LAYOUTS:
            parser.error(f"--layouts {name}: choose from {', '.join(LAYOUTS)}")
    return arguments


def cpu_environment() -> dict[str, str]:
    import os

    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **threads, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def row_of(name: str, milliseconds: dict[str, list[float]]) -> dict[str, Any]:
    """Ratios are taken within a round, where other load on the machine hits both alike."""
    shard, stage, checkpointing = LAYOUTS.get(name, (None, None, "no" not in name.split("_")))
    plain = milliseconds["plain" if checkpointing else "plain_no_checkpointing"]
    ratios = [ours / theirs for ours, theirs in zip(milliseconds[name], plain, strict=True)]
    return {
        "layout": name,
        "teacher_shard": shard,
        "zero_stage": stage,
        "gradient_checkpointing": checkpointing,
        "ms_per_micro_batch": statistics.median(milliseconds[name]),
        "rounds_ms": milliseconds[name],
        "ratio_to_plain": statistics.median(ratios),
    }


def markdown(row: dict[str, Any]) -> str:
    teacher = {"gpu": "whole", "world": "ZeRO-3", None: "module"}[row["teacher_shard"]]
    student = f"ZeRO-{row['zero_stage']}" if row["zero_stage"] else "module"
    waits = row["waits"]
    own, others = (
        ", ".join(
            f"{sum(waits[package][when] for package in packages):.3g}"
            for when in ("per_micro_batch", "per_step")
        )
        for packages in (("kd", "transformers"), ("deepspeed",))
    )
    return (
        f"| {row['layout']} | {teacher} | {student} | "
        f"{'yes' if row['gradient_checkpointing'] else 'no'} | {row['ms_per_micro_batch']:.1f}, "
        f"{row['teacher_ms_per_micro_batch']:.1f} | "
        f"{row['ratio_to_plain']:.2f} | {own} | {others} |\n"
    )


def make_models(folder: Path, num_layers: int) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    for seed, role in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder / role)
    for stage in (1, 2, 3):
        zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 5_000_000}
        if stage == 3:
            zero["stage3_param_persistence_threshold"] = 0
        write_json(folder / f"zero{stage}.json", {"zero_optimization": zero})


def work(arguments: argparse.Namespace) -> None:
    """A rank: all layouts side by side, one after the other in each round."""
    from kd.distributed.process_group import init_distributed
    from kd.training.step import train_step

    folder, layout = arguments.worker, init_distributed()
    sides: dict[str, Sides] = {}
    for name in arguments.layouts.split(","):
        shard, stage, checkpointing = LAYOUTS[name]
        recipe = recipe_of(folder, shard, stage, checkpointing)
        plain = "plain" if checkpointing else "plain_no_checkpointing"
        if plain not in sides:
            sides[plain] = plain_sides(recipe)
        sides[name] = engine_sides(recipe, layout)
    batches = [batch_of(layout.rank, index) for index in range(NUM_MICRO_BATCHES)]
    milliseconds: dict[str, list[float]] = {name: [] for name in sides}
    of_teacher: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-2, arguments.rounds):  # the first two warm up
        for name, side in sides.items():
            started, teacher = time.thread_time(), TimedTeacher(side.teacher)
            train_step(side.student, teacher, batches, 1e-4, layout)
            spent = time.thread_time() - started
            if number >= 0:
                milliseconds[name].append(spent * 1000 / NUM_MICRO_BATCHES)
                of_teacher[name].append(teacher.spent * 1000 / NUM_MICRO_BATCHES)
    waits = {name: waits_of(side, batches, layout) for name, side in sides.items()}
    if layout.rank == 0:
        measured = {"milliseconds": milliseconds, "milliseconds_of_teacher": of_teacher}
        write_json(folder / "measured.json", measured | {"waits": waits})


class TimedTeacher:
    """Adds up the thread time of a teacher's own part of a step, in seconds."""

    def __init__(self, teacher: Any) -> None:
        self.spent, self._teacher = 0.0, teacher

    @contextlib.contextmanager
    def targets(self, batch: Any) -> Iterator[Any]:
        started = time.thread_time()
        with self._teacher.targets(batch) as targets:
            self.spent += time.thread_time() - started
            yield targets


def recipe_of(folder: Path, shard: str, stage: int, checkpointing: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"model": str(folder / "teacher"), "shard": shard},
            "student": {
                "model": str(folder / "student"),
                "gradient_checkpointing": checkpointing,
            },
            "data": {"path": "unused.jsonl"},
            "training": {"global_batch_size": NUM_RANKS * NUM_MICRO_BATCHES},
            "deepspeed": {
                "student": str(folder / f"zero{stage}.json"),
                "teacher": str(folder / "zero3.json"),
            },
        }
    )


def engine_sides(recipe: Recipe, layout: Any) -> Sides:
    from kd.engine.ds_config import student_ds_config
    from kd.training.build import build_live_teacher, build_student

    ds_config = student_ds_config(recipe, layout.world_size, layout.device.type)
    return Sides(build_student(recipe, ds_config, layout), build_live_teacher(recipe, layout))


def plain_sides(recipe: Recipe) -> Sides:
    import torch

    from kd.models.loading import load_whole
    from kd.models.student import Student, StudentModule
    from kd.teachers.live import LiveTeacher, TeacherModule

    assert recipe.teacher is not None
    teacher = load_whole(recipe.teacher, {}, role="teacher")
    model = load_whole(recipe.student, {}, role="student").train()
    if recipe.student.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    module = StudentModule(model, recipe.loss)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    return Sides(
        Student(model, PlainEngine(module, optimizer)), LiveTeacher(teacher, TeacherModule(teacher))
    )


WAITING = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


class Waits:
    """Counts what makes the host wait for a GPU, by the package that asked: on a CPU too, where
    nothing is waited for. {"kd": Counter of call sites, "transformers": ..., "deepspeed": ...}
    """

    def __init__(self) -> None:
        self.sites: dict[str, Counter[str]] = {}

    def __enter__(self) -> "Waits":
        import torch
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        targets = [(torch.Tensor, name) for name in WAITING]
        targets += [(type(accelerator), "synchronize")]
        for event_or_stream in (torch.cpu.Stream, torch.cuda.Stream, torch.cuda.Event):
            targets += [(event_or_stream, "synchronize")]
        self._undo = []
        for owner, name in targets:
            if hasattr(owner, name):
                self._undo.append((owner, name, getattr(owner, name)))
                setattr(owner, name, self._counting(getattr(owner, name), name))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, method in self._undo:
            setattr(owner, name, method)

    def _counting(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            for frame in reversed(traceback.extract_stack(limit=12)[:-1]):
                package = next((p for p in PACKAGES if f"/{p}/" in frame.filename), None)
                if package:
                    file = frame.filename.rpartition(f"/{package}/")[2]
                    if f"{package}/{file}" in ON_CPU_ALONE:
                        break
                    site = f"{package}/{file}:{frame.lineno} {name}"
                    self.sites.setdefault(package, Counter())[site] += 1
                    break
            return method(*args, **kwargs)

        return counted


PACKAGES = ("kd", "transformers", "deepspeed")
# Values of tensors are looked at there when they are on the CPU, and asserted on the device else.
ON_CPU_ALONE = ("kd/losses/checks.py",)


def waits_of(side: Sides, batches: list[Any], layout: Any) -> dict[str, Any]:
    """Per micro-batch and per step, from steps of all of the batches and of half of them."""
    from kd.training.step import train_step

    counts = []
    for part in (batches, batches[: len(batches) // 2]):
        with Waits() as waits:
            train_step(side.student, side.teacher, part, 1e-4, layout)
        counts.append(waits.sites)
    more, less = counts
    result: dict[str, Any] = {}
    for package in PACKAGES:
        whole, half = (sum(found.get(package, Counter()).values()) for found in (more, less))
        each = (whole - half) / (len(batches) - len(batches) // 2)
        result[package] = {"per_micro_batch": each, "per_step": whole - each * len(batches)}
        result[package]["sites"] = dict(more.get(package, Counter()))
    return result


class PlainEngine:
    """What kd.training.step uses of an engine, around a module and nothing else."""

    skipped_steps = 0

    def __init__(self, module: Any, optimizer: Any) -> None:
        self.module, self.optimizer = module, optimizer
        self._is_boundary = True

    def __call__(self, *args: Any) -> Any:
        return self.module(*args)

    def parameters(self) -> Iterator[Any]:
        yield from self.module.parameters()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self._is_boundary = is_boundary

    def backward(self, loss: Any, *, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()

    def step(self) -> None:
        if self._is_boundary:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return 0.0


def batch_of(rank: int, index: int) -> Any:
    import numpy as np

    from kd.data.collate import collate
    from kd.data.dataset import Example

    ids = np.random.default_rng([rank, index]).integers(1, 128, NUM_TOKENS)
    lengths = np.array([4, 8, 4])
    return collate([Example(ids, ids.copy(), row=index, num_tokens_3=lengths, read_start=0)], 0)


if __name__ == "__main__":
    run(main)
