"""One whole training step on the CPU beside two peers: its time, and its peak memory.

    python benchmarks/train_step.py --peers --output DIR

Three sides take the same step, one rank each:

- ours: kd.training.step.train_step() with a whole teacher (teacher.shard = "gpu") and a student in
  a ZeRO-1 engine, of ds_configs/zero1_bf16.json without its bf16. It also measures the diagnostics
  of each step, as training does; the peers have none.
- trl: GKDTrainer of TRL, lmbda 0 and beta 0, with the optimizer that it chooses: what Trainer's own
  loop calls in a step, get_batch_samples(), training_step(), clipping and the optimizer's step.
- plain: a loop of PyTorch on the full logits of both models, torch's AdamW.

The objective is forward KL alone, T = 1, as a mean over the supervised tokens of the batch: TRL's
trainer has no cross-entropy, so the paper's half of it (arXiv 2512.21002) is left out in all three.
TRL divides by Trainer's count of labels that are not -100, the first of each sequence not counted,
which is the same number. Loss, norm and direction of the first step's gradient must agree.

Fixed before anything was measured: SHAPES below, vocabulary of 32,000, four sequences of 1,024
tokens in one micro-batch, fp32, gradient checkpointing of the student, clipping at 1.0, two
threads. Student and teacher have 125 and 62 tokens of vocabulary per hidden unit, as Qwen2.5-1.5B
and 7B have 99 and 42; but their layers are few, so that a step takes seconds. Logits weigh more
here than in that pair, and the report says by how much.

Each side is a process of its own, and they step in turn, A B C A B C, while the others wait. Memory
is resident memory, of the whole process and above what it was with imports and both models loaded:
optimizer, engine, gradients, activations and logits. Time is the wall's; processor time of all
threads is given next to it, for machines that do other work meanwhile. Writes DIR/step_peers.json
and step_peers.md.
"""

import ctypes
import gc
import importlib.util
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

WARMUP_STEPS, NUM_ROUNDS = 2, 5
NUM_THREADS = 2
LEARNING_RATE, MAX_GRAD_NORM, BETA_1 = 1e-5, 1.0, 0.9
TARGETS = {"time": 0.8, "peak_above_baseline": 0.5}
# Largest relative difference from the plain loop, of the first step
TOLERANCES = {"loss": 1e-5, "grad_norm": 1e-4, "gradient": 1e-3}
COLUMNS = ("side", "ms (rounds)", "CPU ms", "loaded GiB", "peak GiB", "peak above loaded GiB")
COLUMNS += ("loss", "difference: loss, norm, gradient")


class Sizes(NamedTuple):
    vocab_size: int
    batch_size: int
    length: int
    shapes: dict[str, dict[str, Any]]  # by role, as in config.json


SHAPES: dict[str, dict[str, Any]] = {
    "teacher": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "student": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
FEW = {"num_hidden_layers": 2, "intermediate_size": 64, "hidden_size": 32}
FULL = Sizes(32_000, 4, 1024, SHAPES)
SMALL = Sizes(500, 2, 48, {role: shape | FEW for role, shape in SHAPES.items()})
# Qwen2.5-1.5B and 7B: one model's logits of as many tokens, and the share of the heads' products,
# as weight_of_logits() counts them; logits fp32 and weights bf16.
REAL_SIZES = Sizes(
    152_064,
    4,
    1024,
    {
        "teacher": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        "student": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
    },
)
NUM_PARAMETERS = {"teacher": 7.616e9, "student": 1.544e9}


class Step(NamedTuple):
    """What a side says of a step: how Adam's mean of gradients is read belongs to its optimizer."""

    loss: float
    grad_norm: float
    first_moment: Callable[[Any], Any]


def compare(output: Path, is_small: bool = False) -> None:
    """Measure all sides in turn, and write the report. Raises RuntimeError when they disagree."""
    from kd.files import write_json, write_text

    report = measure(is_small)
    write_json(output / "step_peers.json", report)
    write_text(output / "step_peers.md", markdown(report))
    print(markdown(report))


def measure(is_small: bool) -> dict[str, Any]:
    from kd.runs.environment import environment

    names = [name for name in SIDES if name != "trl" or importlib.util.find_spec("trl")]
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        children = {name: start(name, Path(folder), is_small) for name in names}
        try:
            loaded = {name: json.loads(ask(child)) for name, child in children.items()}
            rounds = [
                {name: json.loads(ask(child)) for name, child in children.items()}
                for _ in range(WARMUP_STEPS + NUM_ROUNDS)
            ]
        finally:
            for child in children.values():
                child.communicate()  # the end of its input ends it
        firsts = read_first_steps(Path(folder), names)
    sizes = SMALL if is_small else FULL
    sides = {
        name: summarise([done[name] for done in rounds], loaded[name])
        | {"difference_from_plain": differences(firsts[name], firsts["plain"])}
        for name in names
    }
    found = environment()
    found["packages"]["trl"] = metadata.version("trl") if "trl" in names else None
    return {
        "command": shlex.join(["python", "benchmarks/train_step.py", *sys.argv[1:]]),
        "environment": found | {"cpu_model": cpu_model()},
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "settings": {
            **sizes._asdict(),
            "dtype": "float32",
            "num_threads": NUM_THREADS,
            "warmup_steps": WARMUP_STEPS,
            "rounds": NUM_ROUNDS,
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": MAX_GRAD_NORM,
            "gradient_checkpointing": True,
            "objective": "forward_kl",
        },
        "weight_of_logits": {
            "here": weight_of_logits(sizes, firsts["plain"]["num_parameters"], 4),
            "qwen2.5_7b_to_1.5b": weight_of_logits(REAL_SIZES, NUM_PARAMETERS, 2),
        },
        "sides": sides,
        "ratios": ratios(sides),
        "targets": TARGETS,
    }


def start(name: str, folder: Path, is_small: bool) -> "subprocess.Popen[str]":
    threads = {"OMP_NUM_THREADS": str(NUM_THREADS), "OMP_WAIT_POLICY": "PASSIVE"}
    offline = {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, __file__, name, str(folder), str(int(is_small))],
        env={**os.environ, **threads, **offline, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(child: "subprocess.Popen[str]") -> str:
    """Have a child go on to its next step, and wait for what it says of it."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    if not (answer := child.stdout.readline()):
        raise RuntimeError(f"{child.args}: the process has ended; its error is above")
    return answer


def work(name: str, folder: Path, is_small: bool) -> None:
    """A child: loads for the first line of its input, and takes a step for each that follows."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    sizes = SMALL if is_small else FULL
    side: Iterator[Any] = SIDES[name](sizes)
    model = None
    for number, _ in enumerate(sys.stdin):
        started, cpu_started = time.perf_counter(), time.process_time()
        done = next(side)
        answer: dict[str, Any] = {"ms": (time.perf_counter() - started) * 1000}
        answer["cpu_ms"] = (time.process_time() - cpu_started) * 1000
        if number == 0:
            student, teacher = model = done
            count = {"student": num_parameters(student), "teacher": num_parameters(teacher)}
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        else:
            answer |= {"loss": done.loss, "grad_norm": done.grad_norm}
        answer |= resident_gib()
        if number == 1:
            assert model is not None
            save_first_step(folder / f"{name}.pt", model[0], done, count)
        print(json.dumps(answer), file=answers, flush=True)


def num_parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def resident_gib() -> dict[str, float]:
    """Of this process, now and at most so far."""
    text = Path("/proc/self/status").read_text()
    kib = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", text))
    return {"now_gib": int(kib["VmRSS"]) / 2**20, "peak_gib": int(kib["VmHWM"]) / 2**20}


def save_first_step(path: Path, student: Any, step: Step, num_parameters: dict[str, int]) -> None:
    import torch

    gradients = [step.first_moment(p).flatten() / (1 - BETA_1) for p in student.parameters()]
    facts = {"loss": step.loss, "grad_norm": step.grad_norm, "num_parameters": num_parameters}
    torch.save({**facts, "gradient": torch.cat(gradients)}, path)


def read_first_steps(folder: Path, names: list[str]) -> dict[str, Any]:
    import torch

    return {name: torch.load(folder / f"{name}.pt") for name in names}


def differences(one: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """Relative, of loss, gradient norm and the clipped gradient of all weights. Raises RuntimeError
    where the two are not of one objective.
    """
    found = {key: abs(one[key] / plain[key] - 1) for key in ("loss", "grad_norm")}
    difference = (one["gradient"] - plain["gradient"]).norm() / plain["gradient"].norm()
    found["gradient"] = float(difference)
    if wrong := {key: value for key, value in found.items() if not value <= TOLERANCES[key]}:
        raise RuntimeError(f"the first step differs from the plain loop's by {wrong}: {TOLERANCES}")
    return found


def summarise(steps: list[dict[str, Any]], loaded: dict[str, float]) -> dict[str, Any]:
    timed = [step["ms"] for step in steps[WARMUP_STEPS:]]
    peak_gib = steps[-1]["peak_gib"]
    return {
        "step_ms": statistics.median(timed),
        "rounds_ms": timed,
        "cpu_ms": statistics.median(step["cpu_ms"] for step in steps[WARMUP_STEPS:]),
        "rounds_cpu_ms": [step["cpu_ms"] for step in steps[WARMUP_STEPS:]],
        "loaded_gib": loaded["now_gib"],
        "peak_gib": peak_gib,
        "peak_above_loaded_gib": peak_gib - loaded["now_gib"],
        "first_loss": steps[0]["loss"],
        "first_grad_norm": steps[0]["grad_norm"],
    }


def ratios(sides: dict[str, Any]) -> dict[str, Any]:
    """Ours to the better peer of each measure; of times, the median of the rounds' ratios."""
    ours, peers = sides["ours"], {name: side for name, side in sides.items() if name != "ours"}

    def better(key: str) -> str:
        return min(peers, key=lambda name: peers[name][key])

    found: dict[str, Any] = {}
    for name, key, rounds in (
        ("time", "step_ms", "rounds_ms"),
        ("cpu_time", "cpu_ms", "rounds_cpu_ms"),
    ):
        fastest = better(key)
        pairs = zip(ours[rounds], peers[fastest][rounds], strict=True)
        of_rounds = [one / other for one, other in pairs]
        median = statistics.median(of_rounds)
        found[name] = {"peer": fastest, "ratio": median, "of_rounds": of_rounds}
    for name, key in (
        ("peak_above_baseline", "peak_above_loaded_gib"),
        ("peak_of_process", "peak_gib"),
    ):
        smallest = better(key)
        found[name] = {"peer": smallest, "ratio": ours[key] / peers[smallest][key]}
    return found


def weight_of_logits(
    sizes: Sizes, num_parameters: dict[str, float], weight_bytes: int
) -> dict[str, float]:
    """How much the vocabulary is of a step: the bytes of one model's fp32 logits over those of all
    weights, and the products with the heads as a share of all products with weights, the student's
    layers being run twice for checkpointing.
    """
    hidden = {role: shape["hidden_size"] for role, shape in sizes.shapes.items()}
    tables = {
        role: sizes.vocab_size * hidden[role] * (1 if role == "student" else 2) for role in hidden
    }
    layers = {role: num_parameters[role] - tables[role] for role in hidden}
    heads = sizes.vocab_size * (3 * hidden["student"] + hidden["teacher"])
    logits_bytes = sizes.batch_size * sizes.length * sizes.vocab_size * 4
    return {
        "logits_bytes_over_weights": logits_bytes / (sum(num_parameters.values()) * weight_bytes),
        "share_of_products": heads / (heads + 4 * layers["student"] + layers["teacher"]),
    }


def cpu_model() -> str:
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else "unknown"


def markdown(report: dict[str, Any]) -> str:
    here, settings = report["environment"], report["settings"]
    packages = {name: version for name, version in here["packages"].items() if version}
    shapes = "; ".join(
        f"{role}: hidden {shape['hidden_size']}, {shape['num_hidden_layers']} layers"
        for role, shape in settings["shapes"].items()
    )
    lines = [
        f"`{report['command']}` on {here['num_cpus']} CPUs ({here['cpu_model']}), commit "
        f"{here['commit']}",
        "",
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        "",
        f"Qwen2 in fp32, {shapes}; vocabulary {settings['vocab_size']:,}; {settings['batch_size']} "
        f"sequences of {settings['length']:,} tokens in one micro-batch; forward KL alone; gradient"
        f" checkpointing; {settings['num_threads']} threads; load average "
        f"{report['load_average']['before'][0]:.1f} before and "
        f"{report['load_average']['after'][0]:.1f} after.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for name, side in report["sides"].items():
        spread = f"{min(side['rounds_ms']):,.0f} to {max(side['rounds_ms']):,.0f}"
        apart = ", ".join(f"{value:.1g}" for value in side["difference_from_plain"].values())
        cells = [name, f"{side['step_ms']:,.0f} ({spread})", f"{side['cpu_ms']:,.0f}"]
        cells += [
            f"{side['loaded_gib']:.2f}",
            f"{side['peak_gib']:.2f}",
            f"{side['peak_above_loaded_gib']:.2f}",
        ]
        cells += [f"{side['first_loss']:.6f}", apart]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| ours to the better peer | peer | ratio | target |", "|---|---|---|---|"]
    for key, found in report["ratios"].items():
        target = report["targets"].get(key)
        wanted = f"at most {target}" if target else "none"
        lines.append(f"| {key.replace('_', ' ')} | {found['peer']} | {found['ratio']:.2f} | ")
        lines[-1] += f"{wanted} |"
    weights = report["weight_of_logits"]
    lines += ["", "| of the logits | " + " | ".join(weights) + " |"]
    lines += ["|---" * (1 + len(weights)) + "|"]
    lines += [
        f"| {key.replace('_', ' ')} | {' | '.join(f'{w[key]:.2f}' for w in weights.values())} |"
        for key in ("logits_bytes_over_weights", "share_of_products")
    ]
    return "\n".join(lines) + "\n"


# Sides: each yields (student, teacher) when its imports and both models are loaded, and then a Step
# for each step that it takes.


def ours(sizes: Sizes) -> Iterator[Any]:
    import numpy as np
    from deepspeed.utils import safe_get_full_optimizer_state

    from kd.data.collate import collate
    from kd.data.dataset import Example
    from kd.distributed.process_group import init_distributed
    from kd.engine.ds_config import student_ds_config
    from kd.engine.engine import initialize
    from kd.engine.zero3 import fetching_layers
    from kd.files import read_json, write_json
    from kd.models.student import Student, StudentModule
    from kd.recipe import DS_CONFIGS_DIR, Recipe
    from kd.teachers.live import LiveTeacher, TeacherModule
    from kd.training.step import train_step

    student_model, teacher_model = load_models(sizes)
    yield student_model, teacher_model
    layout = init_distributed()
    # As kd.training.build makes them, around models that are there
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero1.json"
        zero1 = read_json(DS_CONFIGS_DIR / "zero1_bf16.json")
        write_json(path, {key: value for key, value in zero1.items() if key != "bf16"})
        training = {"global_batch_size": sizes.batch_size, "micro_batch_size": sizes.batch_size}
        training |= {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM}
        sections: dict[str, Any] = {
            "teacher": {"model": "unused", "shard": "gpu"},
            "student": {"model": "unused", "gradient_checkpointing": True},
            "data": {"path": "unused.jsonl"},
            "loss": {"divergence": "forward_kl", "kd_weight": 1.0, "ce_weight": 0.0},
            "training": training,
            "deepspeed": {"student": str(path)},
        }
        recipe = Recipe.model_validate(sections)
        ds_config = student_ds_config(recipe, layout.world_size, layout.device.type)
    teacher = LiveTeacher(teacher_model, TeacherModule(teacher_model))
    module = StudentModule(student_model, recipe.loss)
    student = Student(student_model, initialize(module, fetching_layers(ds_config, student_model)))
    examples = [
        Example(ids, labels, row=0, num_tokens_3=np.array([len(ids), 0, 0]), read_start=0)
        for ids, labels in zip(*token_ids(sizes), strict=True)
    ]
    batch = collate(examples, pad_token_id=0)
    while True:
        done = train_step(student, teacher, [batch], LEARNING_RATE, layout)
        yield Step(done.loss, done.grad_norm, lambda p: safe_get_full_optimizer_state(p, "exp_avg"))


def trl(sizes: Sizes) -> Iterator[Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = load_models(sizes)
    yield student, teacher
    ids_BL, labels_BL = token_ids(sizes)
    columns = {"input_ids": ids_BL, "labels": labels_BL, "attention_mask": ids_BL * 0 + 1}
    # Only its special tokens are asked for
    assets = Path(__file__).resolve().parents[1] / "recipes" / "assets" / "tiny" / "student_base"
    with tempfile.TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            student,
            teacher,
            args=GKDConfig(
                output_dir=folder,
                lmbda=0.0,
                beta=0.0,
                per_device_train_batch_size=sizes.batch_size,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_grad_norm=MAX_GRAD_NORM,
                gradient_checkpointing_kwargs={"use_reentrant": False},
                use_cpu=True,
                bf16=False,
                report_to="none",
            ),
            data_collator=default_data_collator,
            train_dataset=Dataset.from_dict({name: list(rows) for name, rows in columns.items()}),
            processing_class=AutoTokenizer.from_pretrained(assets),
        )
        loader = trainer.get_train_dataloader()
        trainer.create_optimizer_and_scheduler(num_training_steps=WARMUP_STEPS + NUM_ROUNDS)
        accelerator = trainer.accelerator
        model, optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
        while True:
            batches, num_items = trainer.get_batch_samples(iter(loader), 1, accelerator.device)
            loss = trainer.training_step(model, batches[0], num_items)
            norm = accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()
            state = optimizer.optimizer.state
            yield Step(loss.item(), norm.item(), lambda p, state=state: state[p]["exp_avg"])


def plain(sizes: Sizes) -> Iterator[Any]:
    import torch
    import torch.nn.functional as F

    student, teacher = load_models(sizes)
    yield student, teacher
    input_ids, labels = (torch.from_numpy(array) for array in token_ids(sizes))
    num_tokens = int((labels[:, 1:] != -100).sum())  # all but the first of each sequence
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    while True:
        with torch.no_grad():
            logits = teacher(input_ids=input_ids, use_cache=False).logits[:, :-1]
            log_p = F.log_softmax(logits, dim=-1)
        logits = student(input_ids=input_ids, use_cache=False).logits[:, :-1]
        log_q = F.log_softmax(logits, dim=-1)
        loss = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / num_tokens
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield Step(loss.item(), norm.item(), lambda p: optimizer.state[p]["exp_avg"])


SIDES: dict[str, Callable[[Sizes], Iterator[Any]]] = {"ours": ours, "trl": trl, "plain": plain}


def load_models(sizes: Sizes) -> tuple[Any, Any]:
    """(student, teacher), the same weights in every process; the student checkpoints its layers."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    models = {}
    for seed, (role, shape) in enumerate(sizes.shapes.items()):
        torch.manual_seed(seed)
        # Wider than the default 0.02: the two distributions differ by more than rounding.
        config = Qwen2Config(**shape, vocab_size=sizes.vocab_size, initializer_range=0.05)
        models[role] = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    models["student"].gradient_checkpointing_enable({"use_reentrant": False})
    return models["student"].train(), models["teacher"].eval().requires_grad_(False)


def token_ids(sizes: Sizes) -> tuple[Any, Any]:
    """(input_ids, labels) of a batch, int64 (B, L); every token is supervised but a sequence's
    first.
    """
    import numpy as np

    random = np.random.default_rng(0)
    ids_BL = random.integers(0, sizes.vocab_size, (sizes.batch_size, sizes.length))
    labels_BL = ids_BL.copy()
    labels_BL[:, 0] = -100
    return ids_BL, labels_BL


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1")
