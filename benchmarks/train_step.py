"""A training step of Qwen2.5-7B into 1.5B in every layout of teacher and student, at several
lengths: time by phase, memory, FLOPs and a profile, as JSON and Markdown.

    python benchmarks/train_step.py --output DIR [--layouts zero3_zero3,gpu_zero2]
        [--keep 4096,2048] [--device cuda|cpu] [--small]
    python benchmarks/train_step.py --compare DIR1 DIR2
    python benchmarks/train_step.py --peers --output DIR    (step_peers.py)

Both models have the real shapes and random weights, made on the device. They run as
kd.training.build has them run, and what is timed is kd.training.step.train_step() itself, on one
rank: nothing is communicated. Layouts follow each other in one process, the most telling first.
DIR/train_step.json and .md are written after each row; rows that they hold for the same commit,
hardware and settings are not repeated. A row that does not fit in memory says so.
"""

import argparse
import gc
import json
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from step_compare import compare
from step_peers import compare as compare_with_peers
from step_profile import profile_line, profile_step
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from kd.cli import overrides_argument, run
from kd.data.collate import Batch, collate
from kd.data.dataset import Example
from kd.data.step_plan import BatchShape, deal
from kd.distributed.device import device_type
from kd.distributed.layout import Layout
from kd.distributed.process_group import init_distributed
from kd.engine.ds_config import is_bf16, student_ds_config, teacher_ds_config
from kd.engine.engine import Engine
from kd.engine.zero3 import num_parameters, shard_bytes
from kd.errors import UserError
from kd.files import write_json, write_text
from kd.logs import configure_logging
from kd.models.head import backbone
from kd.models.loading import choose_attention
from kd.models.student import Student
from kd.plan import flops
from kd.plan.gpus import find_gpu
from kd.plan.shapes import config_shapes
from kd.recipe import ModelSection, Recipe, load_recipe
from kd.runs.environment import environment
from kd.teachers.live import LiveTeacher, TeacherModule
from kd.training.build import choose_layout, student_engine, teacher_run
from kd.training.metrics import peak_memory_gib
from kd.training.step import StepResult, train_step

RECIPE = "qwen7b_to_1p5b"
# One rank's share of the recipe's 32 sequences on 8 GPUs: the optimizer's part of a step is what it
# is there.
GLOBAL_BATCH_SIZE = 4
_GPU_TEACHER = "teacher.shard=gpu"
_ZERO1, _ZERO2 = "deepspeed.student=zero1_bf16.json", "deepspeed.student=zero2_bf16.json"
_NO_CHECKPOINTING = "student.gradient_checkpointing=false"
_BUDGET = "training.max_tokens_per_micro_batch=8192"
# layout -> what it sets in the recipe: names tell the teacher, the student's stage, and what else
# differs from the recipe. "auto" pads where flash attention is missing; packed is asked for.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "zero3_zero3": (),
    "gpu_zero2": (_GPU_TEACHER, _ZERO2),
    "gpu_zero2_no_checkpointing": (_GPU_TEACHER, _ZERO2, _NO_CHECKPOINTING),
    "gpu_zero2_8k": (_GPU_TEACHER, _ZERO2, _BUDGET),
    "gpu_zero2_8k_packed": (_GPU_TEACHER, _ZERO2, _BUDGET, "training.sequence_layout=packed"),
    "zero3_zero3_no_checkpointing": (_NO_CHECKPOINTING,),
    "gpu_zero1": (_GPU_TEACHER, _ZERO1),
    "gpu_zero3": (_GPU_TEACHER,),
    "gpu_zero2_8k_no_checkpointing": (_GPU_TEACHER, _ZERO2, _BUDGET, _NO_CHECKPOINTING),
    "gpu_zero1_no_checkpointing": (_GPU_TEACHER, _ZERO1, _NO_CHECKPOINTING),
    "gpu_zero3_no_checkpointing": (_GPU_TEACHER, _NO_CHECKPOINTING),
}
# role -> shapes, as in the two models' config.json
SHAPES: dict[str, dict[str, Any]] = {
    "teacher": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "student": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
FEW = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "teacher": SHAPES["teacher"]
    | FEW
    | {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 1188},
    "student": SHAPES["student"]
    | FEW
    | {"hidden_size": 32, "intermediate_size": 80, "vocab_size": 1187},
}
PHASES = ("teacher_forward", "student_forward", "loss", "backward", "optimizer")
WARMUP_STEPS = 2
LINEAR = nn.functional.linear
MATMUL_SIZE = {"cuda": 8192, "cpu": 128}
COLUMNS = (
    "layout",
    "tokens",
    "step ms (p20-p80)",
    *(f"{name.replace('_', ' ')} ms" for name in PHASES),
    "sum / step",
)
COLUMNS += (
    "tokens/s",
    "peak GiB",
    "resident GiB",
    "model TFLOP",
    "MFU, measured peak",
    "MFU, nominal peak",
)


log = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Teacher and student as they run in a layout, and what the benchmark says of them."""

    teacher: LiveTeacher
    student: Student
    configs: dict[str, Qwen2Config]
    facts: dict[str, Any]


def main() -> None:
    arguments = parse_arguments()
    if arguments.compare:
        print(compare(*arguments.compare))
        return
    if arguments.peers:
        compare_with_peers(arguments.output, arguments.small)
        return
    check_device(arguments.device)
    report, failed = open_report(arguments), []
    missing = {name: missing_lengths(report, name, arguments.keep) for name in arguments.layouts}
    layout = one_rank() if any(missing.values()) else None
    for name, lengths in missing.items():
        try:
            for length, row in rows_of(name, lengths, arguments, layout):
                add_row(report, name, length, row)
                write_report(arguments.output, report)
        except Exception:  # of one layout: the others are to be measured in this call too
            log.exception("layout %s", name)
            failed.append(name)
    print(markdown(report))
    if failed:
        raise UserError(f"{', '.join(failed)} failed, see above; the others are in the report")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time a training step of Qwen2.5-7B into Qwen2.5-1.5B."
    )
    parser.add_argument("--output", type=Path, help="folder of train_step.json and train_step.md")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar="DIR", help="two such folders, and measure nothing"
    )
    parser.add_argument(
        "--layouts",
        type=_layouts,
        default=list(LAYOUTS),
        help=f"one after the other; all of them: {', '.join(LAYOUTS)}",
    )
    parser.add_argument(
        "--keep", type=_lengths, help="tokens of a sequence, of each length to measure; 4096,2048"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--steps", type=_at_least_two, default=10, help="timed optimizer steps of each row"
    )
    parser.add_argument(
        "--small", action="store_true", help="the same on tiny shapes: seconds on a CPU"
    )
    parser.add_argument(
        "--peers", action="store_true", help="instead, a step on the CPU beside TRL and plain torch"
    )
    overrides_argument(parser)
    arguments = parser.parse_args()
    if arguments.output is None and arguments.compare is None:
        parser.error("--output DIR or --compare DIR DIR is needed")
    # Shortest first: a length that does not fit leaves the others, and the peak of a process on a
    # CPU only grows.
    arguments.keep = sorted(arguments.keep or ((128, 64) if arguments.small else (4096, 2048)))
    return arguments


def _layouts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in LAYOUTS:
            raise argparse.ArgumentTypeError(f"{name}: choose from {', '.join(LAYOUTS)}")
    return names


def _lengths(text: str) -> list[int]:
    return [_at_least_two(part) for part in text.split(",")]


def _at_least_two(text: str) -> int:
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{number} is less than 2")
    return number


def check_device(wanted: str) -> None:
    if wanted != device_type():
        raise UserError(
            f"--device {wanted}, but DeepSpeed finds {device_type()} here: name that one; a CPU "
            "beside a GPU is used with DS_ACCELERATOR=cpu in the environment"
        )


def one_rank() -> Layout:
    layout = init_distributed()
    if layout.world_size != 1:
        raise UserError(f"{layout.world_size} ranks were started: start one, without a launcher")
    configure_logging(rank=0)
    return layout


def recipe_of(name: str, overrides: list[str]) -> Recipe:
    """The recipe in a layout, which sets its own keys last: its name stays true."""
    size = f"training.global_batch_size={GLOBAL_BATCH_SIZE}"
    return load_recipe(RECIPE, [size, *overrides, *LAYOUTS[name]])


def open_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report in --output when it was measured with the same code, hardware and settings, else
    one without rows.
    """
    settings = {
        "device": arguments.device,
        "small": arguments.small,
        "steps": arguments.steps,
        "warmup_steps": WARMUP_STEPS,
        "world_size": 1,
        "global_batch_size": GLOBAL_BATCH_SIZE,
        "overrides": arguments.overrides,
    }
    fresh = {"environment": environment(), "settings": settings, "layouts": {}, "ratios": {}}
    path = arguments.output / "train_step.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found if is_same(found, fresh) else fresh


def missing_lengths(report: dict[str, Any], name: str, wanted: list[int]) -> list[int]:
    return [length for length in wanted if str(length) not in report["layouts"].get(name, {})]


def is_same(found: dict[str, Any], fresh: dict[str, Any]) -> bool:
    """Whether both are of one commit, hardware and settings; uncommitted changes ("+") have no name
    to compare.
    """
    commit = fresh["environment"]["commit"]
    named = commit is not None and not commit.endswith("+")
    return named and all(found.get(key) == fresh[key] for key in ("environment", "settings"))


def rows_of(
    name: str, lengths: list[int], arguments: argparse.Namespace, layout: Layout | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(length, its row) of a layout, whose models are gone when the last is taken. When one does
    not fit in memory, neither do longer ones: their rows hold "error" alone.
    """
    if not lengths:
        return
    assert layout is not None
    recipe, pair = recipe_of(name, arguments.overrides), None
    facts = {"set": LAYOUTS[name], "command": shlex.join(["python", *sys.argv])}
    facts["memory_before_gib"] = settle(layout.device)
    remaining = list(lengths)
    try:
        pair = build_pair(recipe, arguments.small, layout.device)
        clock = Clock(layout.device)
        watch_phases(pair, clock)
        for length in lengths:
            row = measure(pair, recipe, length, arguments.steps, clock, layout)
            if length == lengths[0]:
                batches = random_batches(pair, recipe, length)
                whole, short = (
                    step_on(pair, recipe, some, layout) for some in (batches, batches[:1])
                )
                row["profile"] = profile_step(whole, short, layout.device)
            yield remaining.pop(0), facts | pair.facts | row
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().splitlines()[0]
    finally:
        if pair is not None:
            release(pair.teacher._run, pair.student.engine)
    for length in remaining:
        yield length, facts | {"error": f"out of memory: {reason}"}


def build_pair(recipe: Recipe, small: bool, device: torch.device) -> Pair:
    """Both models with random weights, the same in every layout, running as in training."""
    started = time.perf_counter()
    torch.manual_seed(recipe.run.seed)
    assert recipe.teacher is not None
    configs = model_configs(small)
    ds_config = teacher_ds_config(recipe)
    model = random_model(recipe.teacher, configs["teacher"], ds_config, "teacher", device)
    run = teacher_run(model, recipe.teacher.shard, ds_config)
    teacher = LiveTeacher(model, run)
    ds_config = student_ds_config(recipe, 1, device.type)
    try:
        model = random_model(recipe.student, configs["student"], ds_config, "student", device)
        student = Student(model, student_engine(model, recipe, ds_config))
    except torch.OutOfMemoryError:
        release(run)
        raise
    model.train()
    optimizer = student.engine.optimizer.optimizer
    facts = {
        "models": {"teacher": model_facts(teacher.model), "student": model_facts(model)},
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "optimizer_fused": bool(optimizer.defaults.get("fused")),
        "gradient_checkpointing": recipe.student.checkpointing,
        "sequence_layout": choose_layout(recipe, student, teacher),
        "build_s": time.perf_counter() - started,
    }
    return Pair(teacher, student, configs, facts)


def release(*sides: TeacherModule | Engine) -> None:
    """Have engines let go of their memory, and the next layout run as in a process of its own:
    ZeRO-3 keeps a list of the modules that run, and replaces torch's linear() for good.
    """
    for side in sides:
        weights = list(side.parameters())
        if not isinstance(side, TeacherModule):
            inner = getattr(side.optimizer, "optimizer", None)  # of a student
            if inner is not None:
                weights += [weight for group in inner.param_groups for weight in group["params"]]
                inner.state.clear()
            side.destroy()
            vars(side.optimizer).clear()
        # Emptied one by one: they are in cycles through autograd's C++, which Python does not
        # collect.
        for weight in weights:
            vars(weight).clear()
            weight.data, weight.grad = weight.data.new_empty(0), None
    FWD_MODULE_STACK.clear()
    nn.functional.linear = LINEAR


def model_configs(small: bool) -> dict[str, Qwen2Config]:
    return {
        role: Qwen2Config(**shapes) for role, shapes in (SMALL_SHAPES if small else SHAPES).items()
    }


def random_model(
    section: ModelSection,
    config: Qwen2Config,
    ds_config: dict[str, Any],
    role: str,
    device: torch.device,
) -> PreTrainedModel:
    """The architecture with random weights, made on the device in the precision of ds_config."""
    attention = choose_attention(section, config, ds_config, role=role)
    dtype = torch.bfloat16 if is_bf16(ds_config) else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def model_facts(model: PreTrainedModel) -> dict[str, Any]:
    parameters = list(model.parameters())
    return {
        "architecture": type(model).__name__,
        "attention": model.config._attn_implementation,
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "num_parameters": num_parameters(parameters),
        **{key: getattr(model.config, key) for key in SHAPES["teacher"]},
    }


class Clock:
    """Milliseconds of named phases: by CUDA events in the stream of the work, by the host's clock
    on a CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []

    def start(self, name: str) -> None:
        self._open[name] = self._mark()

    def stop(self, name: str) -> None:
        self._spans.append((name, self._open.pop(name), self._mark()))

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.start(name)
            result = function(*arguments, **keywords)
            self.stop(name)
            return result

        return call

    def take_ms(self) -> dict[str, float]:
        """Sums over all spans of each phase that ran since the last call. The device must be
        idle.
        """
        sums: dict[str, float] = {}
        for name, start, stop in self._spans:
            elapsed = (
                start.elapsed_time(stop) if self._device.type == "cuda" else (stop - start) * 1000
            )
            sums[name] = sums.get(name, 0.0) + elapsed
        self._spans.clear()
        return sums

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def watch_phases(pair: Pair, clock: Clock) -> None:
    """Have the clock run in each phase of train_step(); forward phases include the gathering of
    their weights.
    """
    teacher, student = pair.teacher, pair.student
    teacher.hidden_states = clock.timed("teacher_forward", teacher.hidden_states)  # type: ignore[method-assign]
    engine: Any = student.engine
    engine.backward = clock.timed("backward", engine.backward)
    engine.step = clock.timed("optimizer", engine.step)
    modules: dict[str, nn.Module] = {
        "student_forward": backbone(student.model),
        "loss": student.model.get_output_embeddings(),  # the loss runs in its place
    }
    for name, module in modules.items():
        module.register_forward_pre_hook(lambda *_, name=name: clock.start(name), prepend=True)
        module.register_forward_hook(lambda *_, name=name: clock.stop(name))


def measure(
    pair: Pair, recipe: Recipe, length: int, num_steps: int, clock: Clock, layout: Layout
) -> dict[str, Any]:
    """Everything about steps on sequences of `length` tokens."""
    batches, device = random_batches(pair, recipe, length), layout.device
    step = step_on(pair, recipe, batches, layout)
    for _ in range(WARMUP_STEPS):
        step()
    resident_gib = settle(device)
    clock.take_ms()
    steps = [timed_step(step, clock, device) for _ in range(num_steps)]
    peak_gib, rate = peak_memory_gib(device), matmul_flops(device)
    step_ms = [ms for ms, _, _ in steps]
    sums_ms = [sum(phases.values()) for _, phases, _ in steps]
    phases_ms = {name: spread([phases[name] for _, phases, _ in steps]) for name in PHASES}
    num_tokens = sum(batch.num_input_tokens for batch in batches)
    num_flops = count_flops(pair, recipe, batches)
    done = num_flops | {"backward": num_flops["backward_with_recomputation"]}
    achieved = num_flops["model"] / (statistics.median(step_ms) / 1000)
    nominal = nominal_flops(device)
    return {
        "num_micro_batches": len(batches),
        "micro_batch_shape": list(batches[0].input_ids.shape),
        "step_ms": spread(step_ms),
        "phases_ms": phases_ms,
        "phases_sum_ms": spread(sums_ms),
        "sum_over_step": statistics.median(
            total / ms for total, ms in zip(sums_ms, step_ms, strict=True)
        ),
        "num_input_tokens": num_tokens,
        "num_supervised_tokens": sum(batch.num_supervised_tokens for batch in batches),
        "tokens_per_second": num_tokens / (statistics.median(step_ms) / 1000),
        "last_loss": steps[-1][2],
        "memory_gib": {"peak": peak_gib, "resident": resident_gib, **resident_parts(pair)},
        "flops": num_flops,
        "phases_tflops": {
            name: done[name] / phases_ms[name]["median"] / 1e9 for name in PHASES if name in done
        },
        "model_tflops": achieved / 1e12,
        "matmul_tflops": rate / 1e12,
        "mfu_of_measured_peak": achieved / rate,
        "nominal_tflops": nominal and nominal / 1e12,
        "mfu_of_nominal_peak": nominal and achieved / nominal,
    }


def step_on(
    pair: Pair, recipe: Recipe, batches: list[Batch], layout: Layout
) -> Callable[[], StepResult]:
    rate = recipe.training.learning_rate
    return partial(train_step, pair.student, pair.teacher, batches, rate, layout)


def random_batches(pair: Pair, recipe: Recipe, length: int) -> list[Batch]:
    """The micro-batches of one optimizer step, of the same sequences in every layout; every token
    but a sequence's first is supervised.
    """
    random = np.random.default_rng([recipe.run.seed, length])
    vocab_size = min(config.vocab_size for config in pair.configs.values())
    examples = [
        Example(ids, ids, row=row, num_tokens_3=np.array([length, 0, 0]), read_start=0)
        for row, ids in enumerate(random.integers(0, vocab_size, (GLOBAL_BATCH_SIZE, length)))
    ]
    training, packing = recipe.training, pair.facts["sequence_layout"]
    shape = BatchShape(
        GLOBAL_BATCH_SIZE, training.micro_batch_size, training.max_tokens_per_micro_batch, packing
    )
    (dealt,) = deal(np.full(GLOBAL_BATCH_SIZE, length), shape, num_ranks=1)
    return [collate([examples[i] for i in micro], 0, packing) for micro in dealt]


def timed_step(
    step: Callable[[], Any], clock: Clock, device: torch.device
) -> tuple[float, dict[str, float], float]:
    """(milliseconds on the host's clock, of them in each phase, loss) of a step that begins and
    ends idle.
    """
    synchronize(device)
    started = time.perf_counter()
    result = step()
    synchronize(device)
    elapsed_ms = (time.perf_counter() - started) * 1000
    if result.skipped:
        raise UserError(f"a step was skipped: loss {result.loss}, gradient norm {result.grad_norm}")
    return elapsed_ms, clock.take_ms(), result.loss


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def settle(device: torch.device) -> float | None:
    """GPU memory held between steps, in GiB, peaks counting from here; None on a CPU, where a
    process has no such.
    """
    gc.collect()
    if device.type == "cpu":
        return None
    synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) / 2**30


def resident_parts(pair: Pair) -> dict[str, float]:
    """Of the resident memory, in GiB: both models' weights, and the optimizer's fp32 weights and
    moments.
    """
    state = pair.student.engine.optimizer.optimizer.state
    held = [tensor for weight, moments in state.items() for tensor in (weight, *moments.values())]
    optimizer_bytes = sum(
        tensor.numel() * tensor.element_size() for tensor in held if torch.is_tensor(tensor)
    )
    return {
        "teacher_weights": shard_bytes(pair.teacher.model.parameters()) / 2**30,
        "student_weights": shard_bytes(pair.student.model.parameters()) / 2**30,
        "optimizer": optimizer_bytes / 2**30,
    }


def count_flops(pair: Pair, recipe: Recipe, batches: list[Batch]) -> dict[str, float]:
    """FLOPs of one optimizer step by the formula of plans; "model" is without recomputation."""
    teacher, student = (config_shapes(pair.configs[role]) for role in ("teacher", "student"))
    # Equally long, so that no micro-batch is padded
    padded_N = np.array([place.length for batch in batches for place in batch.places])
    supervised_N = np.array([batch.num_supervised_tokens for batch in batches])
    shapes = flops.PairShapes(student, teacher, recipe.student.checkpointing)
    step = shapes.step_flops(padded_N, supervised_N, 1)
    forward, backward = step.student / 3, step.student * 2 / 3
    return {
        "teacher_forward": step.teacher,
        "student_forward": forward,
        "loss": step.loss,
        "backward": backward,
        "backward_with_recomputation": backward + step.recomputed,
        "model": step.model,
        "with_recomputation": step.model + step.recomputed,
    }


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large square bf16 product of random matrices: the median of 20, just after the
    steps.
    """
    size = MATMUL_SIZE[device.type]
    one, two = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product, clock, times_ms = torch.empty_like(one), Clock(device), []
    multiply = clock.timed("matmul", partial(torch.mm, one, two, out=product))
    for _ in range(25):
        multiply()
        synchronize(device)
        times_ms.append(clock.take_ms()["matmul"])
    return 2 * size**3 / (statistics.median(times_ms[5:]) / 1000)


def nominal_flops(device: torch.device) -> float | None:
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu and gpu.tflops * 1e12


def spread(values: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": fifths[0], "p80": fifths[-1]}


def add_row(report: dict[str, Any], name: str, length: int, row: dict[str, Any]) -> None:
    """Longest first, and layouts in their own order."""
    layouts = report["layouts"]
    rows = layouts.get(name, {}) | {str(length): row}
    layouts[name] = dict(sorted(rows.items(), key=lambda item: -int(item[0])))
    report["layouts"] = {known: layouts[known] for known in LAYOUTS if known in layouts}
    report["ratios"] = {known: ratios(rows) for known, rows in report["layouts"].items()}


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_json(folder / "train_step.json", report)
    write_text(folder / "train_step.md", markdown(report))


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """What each shorter length takes of the longest's time, memory and FLOPs, as fractions."""
    measured = {length: row for length, row in rows.items() if "error" not in row}
    if not measured:
        return {}
    longest = max(measured, key=int)
    whole = measured[longest]
    return {
        f"{length}/{longest}": {
            "tokens": row["num_input_tokens"] / whole["num_input_tokens"],
            "step_ms": row["step_ms"]["median"] / whole["step_ms"]["median"],
            "peak_memory": row["memory_gib"]["peak"] / whole["memory_gib"]["peak"],
            "peak_above_resident": above_resident(row, whole),
            "model_flops": row["flops"]["model"] / whole["flops"]["model"],
        }
        for length, row in measured.items()
        if length != longest
    }


def above_resident(row: dict[str, Any], whole: dict[str, Any]) -> float | None:
    """The part of the peak that steps come and go with: activations, the loss, gathered weights."""
    one, two = (measured["memory_gib"] for measured in (row, whole))
    return (
        None
        if one["resident"] is None
        else (one["peak"] - one["resident"]) / (two["peak"] - two["resident"])
    )


def markdown(report: dict[str, Any]) -> str:
    here, settings = report["environment"], report["settings"]
    rows = [
        (name, length, row) for name, of in report["layouts"].items() for length, row in of.items()
    ]
    hardware = (
        ", ".join(here["gpus"])
        if settings["device"] == "cuda"
        else f"{here['num_cpus']} CPUs ({here['cpu']})"
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in here["packages"].items() if version
    )
    lines = [
        *dict.fromkeys(f"`{row['command']}`" for _, _, row in rows),
        "",
        f"{hardware}; commit {here['commit']}; Python {here['python']}, {versions}.",
        "",
        *dict.fromkeys(models_line(row) for _, _, row in rows if "error" not in row),
        f"{settings['global_batch_size']} sequences a step, one rank; median of "
        f"{settings['steps']} steps. A layout's name: the teacher, whole on the GPU or in ZeRO-3; "
        "the student's stage; and what else its settings change.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(markdown_row(name, length, row) for name, length, row in rows),
        "",
    ]
    for name, of in report["layouts"].items():
        settings_text = " ".join(f"--set {text}" for text in next(iter(of.values()))["set"])
        lines.append(f"- {name}: `{settings_text or 'as the recipe is'}`")
        lines += [
            f"  - {int(length):,} tokens: {profile_line(row['profile'])}"
            for length, row in of.items()
            if "profile" in row
        ]
        for ratio_name, ratio in report["ratios"][name].items():
            figures = (f"{key} {number(value, '.3f')}" for key, value in ratio.items())
            lines.append(f"  - {ratio_name}: {', '.join(figures)}")
    return "\n".join(lines) + "\n"


def models_line(row: dict[str, Any]) -> str:
    models = row["models"]
    names = " -> ".join(
        f"{models[role]['num_parameters'] / 1e6:,.1f} M parameters ({models[role]['attention']})"
        for role in ("teacher", "student")
    )
    return (
        f"Random weights, {names}, {models['student']['dtype']}; optimizer {row['optimizer']}, "
        f"fused {row['optimizer_fused']}."
    )


def markdown_row(name: str, length: str, row: dict[str, Any]) -> str:
    if "error" in row:
        return f"| {name} | {int(length):,} | {row['error']} |{' |' * (len(COLUMNS) - 3)}"
    step, memory = row["step_ms"], row["memory_gib"]
    cells = [
        name,
        f"{int(length):,}",
        f"{step['median']:.1f} ({step['p20']:.1f}-{step['p80']:.1f})",
        *(f"{row['phases_ms'][name]['median']:.1f}" for name in PHASES),
        f"{row['sum_over_step']:.3f}",
        f"{row['tokens_per_second']:,.0f}",
        f"{memory['peak']:.2f}",
        number(memory["resident"], ".2f"),
        f"{row['flops']['model'] / 1e12:.3g}",
        f"{row['mfu_of_measured_peak']:.3f} of {row['matmul_tflops']:.3g} TFLOP/s",
        f"{number(row['mfu_of_nominal_peak'], '.3f')} of {number(row['nominal_tflops'], '.0f')} "
        "TFLOP/s",
    ]
    return f"| {' | '.join(cells)} |"


def number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


if __name__ == "__main__":
    run(main)
