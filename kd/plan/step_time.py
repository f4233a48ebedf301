"""How long an optimizer step takes, and what bounds it: nothing here was measured on a GPU.

Three things go on side by side, and the largest counts: the GPUs compute, weights and gradients
cross between them, and the host prepares both, which takes as long for few tokens as for many. They
disturb each other a little. After them comes what nothing hides: the optimizer, and collectives at
the end of the step.
"""

from dataclasses import dataclass
from typing import Literal

from kd.plan.activations import layer_activations
from kd.plan.flops import StepFlops, forward_flops
from kd.plan.gpus import Site
from kd.plan.lengths import Lengths
from kd.plan.memory import Engines
from kd.plan.zero_memory import ZeroEngine
from kd.recipe import Recipe

# ms of one core for each decoder layer and micro-batch, by benchmarks/host_time.py on two cores of
# a cloud's CPU: of the teacher's forward, plain and with the hooks of ZeRO-3, and of the student's
# forward and backward, by stage, without checkpointing and with it.
TEACHER_HOST_MS = {"plain": 0.32, "zero3": 1.14}
STUDENT_HOST_MS = {1: (0.82, 1.88), 2: (0.99, 2.05), 3: (2.68, 3.82)}

# ZeRO-Offload: bytes/s of Adam on a node's cores, and over PCIe to each GPU.
HOST_ADAM_RATE, PCIE_RATE = 100e9, 25e9
# Of each element that a rank's optimizer steps: gradient, master weight and moments are read, the
# last two written, and the weight of the model.
ADAM_BYTES = 4 + 3 * 4 + 3 * 4 + 2

# Of what is hidden behind the largest part, the share that shows all the same.
DISTURBANCE = 0.1
# Bytes that norms, rotations and activations move for each byte that a layer keeps for its
# backward, in forward, and twice as many in backward: kernels as transformers has them, not fused.
MOVED_PER_KEPT_BYTE = 3

Bound = Literal["compute", "gathers", "host"]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float  # of the rank that has most to do: products, and what memory bounds
    gathers: float  # weights that are gathered, and gradients that are reduced, while it computes
    host: float
    after: float  # the optimizer, and what is sent when all micro-batches are done
    sampling: float = 0.0  # ahead of them, if no response ends before rollout.max_new_tokens

    @property
    def seconds(self) -> float:
        parts = (self.compute, self.gathers, self.host)
        return max(parts) + DISTURBANCE * (sum(parts) - max(parts)) + self.after + self.sampling

    @property
    def bound(self) -> Bound:
        """What the others wait for."""
        parts: dict[Bound, float] = {
            "compute": self.compute,
            "gathers": self.gathers,
            "host": self.host,
        }
        return max(parts, key=lambda part: parts[part])


def step_time(
    recipe: Recipe, engines: Engines, flops: StepFlops, lengths: Lengths, site: Site
) -> StepTime:
    """flops: of a step over all ranks; lengths say how evenly ranks share them."""
    each, student = lengths.micro_batches_per_step, engines.student
    checkpointing = recipe.student.checkpointing
    num_passes = 4 if checkpointing else 3  # backward is two
    moved = num_passes * _moved_bytes(student, lengths)
    moved += _moved_bytes(engines.teacher, lengths) if engines.teacher else 0
    gathers = sum(_gather_seconds(engine, site) for engine in engines)
    host = sum(_host_seconds(engine, checkpointing) for engine in engines)
    return StepTime(
        compute=_compute_seconds(flops.model + flops.recomputed, moved, lengths, site),
        gathers=each * gathers,
        host=each * host,
        after=_optimizer_seconds(student, site)
        + student.received_per_step / site.collective_rate(student.num_ranks),
        sampling=_sampling_seconds(recipe, engines, lengths, site),
    )


def _sampling_seconds(recipe: Recipe, engines: Engines, lengths: Lengths, site: Site) -> float:
    """For each token of a micro-batch its model's weights are read once, its layers are called and,
    where they are gathered one by one, received.
    """
    rollout = recipe.rollout
    if rollout is None:
        return 0.0
    engine = engines.student if rollout.source == "student" else engines.teacher
    assert engine is not None
    parts = [engine.model_bytes / site.gpu.memory_rate]
    parts.append(engine.shapes.num_layers * TEACHER_HOST_MS["plain"] / 1000)
    gathering = engine.received_per_forward / site.collective_rate(engine.num_ranks)
    per_layer = rollout.gather == "layers"
    parts += [gathering] if per_layer else []
    num_tokens = lengths.num_sampling_batches / lengths.num_steps * rollout.max_new_tokens
    return num_tokens * max(parts) + (0.0 if per_layer else gathering)


def validation_seconds(
    engines: Engines, flops: StepFlops, lengths: Lengths, site: Site, num_rows: int
) -> float:
    """Of num_rows sequences like those of a step, forward through both models, without backward.

    Of the student's hooks a part is backward's, and of the loss's products the gradients are.
    """
    student, teacher = engines.student, engines.teacher
    hidden = student.shapes.hidden_size
    logits = hidden + (teacher.shapes.hidden_size if teacher else 0)
    gradients = 2 * hidden if student.trains_head else hidden
    forward = flops.teacher + flops.loss * logits / (logits + gradients)
    forward += forward_flops(student.shapes, lengths.padded_N) / lengths.num_steps
    gathers = student.received_per_forward / site.collective_rate(student.num_ranks)
    host = _host_seconds(student, checkpointing=False) / 2
    if teacher:
        gathers += _gather_seconds(teacher, site)
        host += _host_seconds(teacher, checkpointing=False)
    each = lengths.micro_batches_per_step
    moved = sum(_moved_bytes(engine, lengths) for engine in engines)
    compute = _compute_seconds(forward, moved, lengths, site)
    return num_rows / lengths.per_step * max(compute, each * gathers, each * host)


def _compute_seconds(flops: float, moved_bytes: float, lengths: Lengths, site: Site) -> float:
    """Of the rank that does most, from what all do in a step."""
    seconds = flops / site.gpu.product_rate + moved_bytes / site.gpu.memory_rate
    return seconds / (site.num_gpus * lengths.busy_share)


def _moved_bytes(engine: ZeroEngine, lengths: Lengths) -> float:
    """In the forward of a step's sequences."""
    num_tokens = int(lengths.padded_N.sum()) / lengths.num_steps
    kept = layer_activations(engine.shapes, 1, engine.width) * engine.shapes.num_layers
    return MOVED_PER_KEPT_BYTE * kept * num_tokens


def _gather_seconds(engine: ZeroEngine, site: Site) -> float:
    """For a micro-batch."""
    return engine.received_per_micro_batch / site.collective_rate(engine.num_ranks)


def _host_seconds(engine: ZeroEngine, checkpointing: bool) -> float:
    """For a micro-batch."""
    if engine.is_trained:
        ms = STUDENT_HOST_MS[engine.stage][checkpointing]
    else:
        ms = TEACHER_HOST_MS["plain" if engine.is_plain else "zero3"]
    return engine.shapes.num_layers * ms / 1000


def _optimizer_seconds(student: ZeroEngine, site: Site) -> float:
    if student.offloads("optimizer"):
        of_node = ADAM_BYTES * student.trained_shard_elements * site.gpus_per_node
        moved = student.trained_shard_elements * (4 + student.width)
        return of_node / HOST_ADAM_RATE + moved / PCIE_RATE
    return ADAM_BYTES * student.trained_shard_elements / site.gpu.memory_rate
