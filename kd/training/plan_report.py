"""RUN/plan.json: the plan of a run next to what it takes, in the same units. Rank 0 plans and
measures for itself.

{"format_version": 2, "planned": {name: value}, "measured": {name: value}}, null where it is not
known:
  peak_gib                    on this rank's GPU; on a CPU the measured one is of its process
  teacher_weights_gib, student_weights_gib, optimizer_gib
                              of this rank, on its device, between two steps
  flops_per_step              of teacher, student and loss over all ranks; measured: by formula, of
                              the batches as they were
  num_input_tokens_per_step   read over all ranks, not counting padding
  seconds_per_step, mfu       planned where the GPU is known (kd/plan/step_time.py)
  steps_share, validation_share, checkpoints_share
                              of wall time; measured: since this start, once the run has ended
  num_steps                   of the whole run; measured: those since this start without the first,
                              of which the figures per step are the means
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd.constants import FORMAT_VERSION
from kd.data.loader import Loader
from kd.distributed.layout import Layout
from kd.distributed.nodes import Nodes, size_to_plan
from kd.engine.engine import Engine
from kd.engine.zero3 import shard_bytes
from kd.errors import UserError
from kd.files import write_json
from kd.plan.cost import RunPlan, plan_run
from kd.plan.flops import PairShapes, pair_of, sampling_flops
from kd.plan.gpus import Site, find_site
from kd.plan.lengths import DataTraces, Sampled, epoch_lengths, step_lengths
from kd.plan.rank_memory import GIB
from kd.plan.shapes import sampler_shapes
from kd.recipe import Recipe
from kd.training.first_lines import say
from kd.training.metrics import peak_memory_gib
from kd.training.progress_lines import duration

log = logging.getLogger(__name__)

SHARES = ("steps_share", "validation_share", "checkpoints_share")

# Steps after which a plan can be judged, and a run be stopped that is not what was planned.
FIRST_REPORT = 3


def plan_training(recipe: Recipe, loader: Loader, nodes: Nodes) -> RunPlan | None:
    """The plan of a run on the batches that it will see, or None, and why in the log, for models of
    which nothing can be planned. nodes: the ranks of each.
    """
    longest = DataTraces(loader.examples).longest
    num_nodes, gpus_per_node = size_to_plan(nodes)
    sizes = {"num_nodes": num_nodes, "gpus_per_node": gpus_per_node}
    try:
        lengths = epoch_lengths(loader, num_nodes * gpus_per_node)
        return plan_run(recipe, lengths, loader.steps_per_epoch, longest, **sizes)
    except Exception as error:
        # A model whose shapes were not tried must not end a run that could be trained.
        log.warning(
            "could not plan this run, so the metrics have no FLOPs: %s",
            error,
            exc_info=not isinstance(error, UserError),
        )
        return None


class PlanReport:
    """Collects records of the metrics, and writes RUN/plan.json after the third of them and when
    told to.
    """

    def __init__(
        self,
        plan: RunPlan,
        loader: Loader,
        teacher_weights: Sequence[Tensor],
        student: Engine,
        layout: Layout,
    ) -> None:
        self._plan, self._loader, self._pair = plan, loader, pair_of(plan.memory.recipe)
        self._live = _with_live_teacher(plan.memory.recipe)
        self._teacher_weights, self._student = teacher_weights, student
        self._device = layout.device
        self._site = find_site(layout.device, layout.nodes)
        self._path = plan.memory.recipe.run_dir / "plan.json"
        self._records: list[dict[str, Any]] = []
        say("plan", _describe_plan(_planned(plan, self._site)))

    def flops(self, step: int, sampled: Sampled | None) -> dict[str, float | None]:
        """Of the optimizer step that begins after `step` others, over all ranks, as metrics.jsonl
        has them: of teacher, student and loss; what the teacher would have added to them, None
        without a cache in its place; and of what wrote the rollouts, None without any.

        sampled: tokens of the prompts and responses of the step's rollouts.
        """
        lengths = step_lengths(self._loader, step, self._plan.world_size, sampled)

        def flops_of(pair: PairShapes) -> float:
            return pair.step_flops(lengths.padded_N, lengths.supervised_N, 1).model

        flops, sampling = flops_of(self._pair), None
        if sampled is not None:
            sampling = sampling_flops(sampler_shapes(self._plan.memory.recipe), *sampled)
        return {
            "flops": flops,
            "flops_spared": flops_of(self._live) - flops if self._live else None,
            "flops_of_sampling": sampling,
        }

    def add(self, record: dict[str, Any]) -> None:
        """record: of the metrics of one step, with its "flops"."""
        self._records.append(
            {name: record[name] for name in ("flops", "num_input_tokens", "step_ms")}
        )
        if len(self._records) == FIRST_REPORT:
            self.write()

    def write(self, shares: Mapping[str, float] | None = None) -> None:
        """The file, and a line in the log. Without a step there is nothing to write.

        shares: of wall time, once the run has ended.
        """
        if not self._records:
            return
        report: dict[str, Any] = {
            "planned": _planned(self._plan, self._site),
            "measured": {**self._measured(), **dict.fromkeys(SHARES), **(shares or {})},
        }
        say("measured", _describe(report, on_gpu=self._device.type == "cuda"))
        try:
            write_json(self._path, {"format_version": FORMAT_VERSION, **report})
        except OSError as error:
            # As for the metrics: the next checkpoint says what is wrong, on all ranks.
            log.warning("%s: %s; it is not written", self._path, error.strerror)

    def _measured(self) -> dict[str, Any]:
        records = self._records[1:] or self._records
        flops, tokens, ms = (
            sum(record[name] for record in records) / len(records)
            for name in ("flops", "num_input_tokens", "step_ms")
        )
        peak = self._site and self._site.gpu.tflops * 1e12 * self._plan.world_size
        moments = self._student.optimizer.optimizer.state  # of each master weight
        states = [state for weight in moments for state in (weight, *moments[weight].values())]
        held = (
            state.nbytes
            for state in states
            if torch.is_tensor(state) and state.device == self._device
        )
        return {
            "peak_gib": peak_memory_gib(self._device),
            "teacher_weights_gib": shard_bytes(self._teacher_weights) / GIB,
            "student_weights_gib": shard_bytes(self._student.module.parameters()) / GIB,
            "optimizer_gib": sum(held) / GIB,
            "flops_per_step": flops,
            "num_input_tokens_per_step": tokens,
            "seconds_per_step": ms / 1000,
            "mfu": peak and flops / (peak * ms / 1000),
            "num_steps": len(records),
        }


def _with_live_teacher(recipe: Recipe) -> PairShapes | None:
    """The shapes with the teacher, of a recipe that reads a cache instead."""
    is_cached = recipe.teacher is not None and recipe.teacher.cache is not None
    return pair_of(recipe.with_values({"teacher.cache": None})) if is_cached else None


def _planned(plan: RunPlan, site: Site | None) -> dict[str, Any]:
    gib, time = plan.memory.gib_per_rank, plan.run_time(site) if site else None
    return {
        "peak_gib": plan.memory.total_gib,
        "teacher_weights_gib": gib.teacher_shard,
        "student_weights_gib": gib.student_weights,
        "optimizer_gib": gib.optimizer,
        "flops_per_step": plan.flops_per_step.model,
        "num_input_tokens_per_step": plan.num_input_tokens_per_step,
        "seconds_per_step": plan.step_time(site).seconds if site else None,
        "mfu": plan.mfu(site) if site else None,
        "num_steps": plan.num_steps,
        **(time.shares if time else dict.fromkeys(SHARES)),
    }


def _describe_plan(planned: dict[str, Any]) -> str:
    steps, tokens = planned["num_steps"], planned["num_input_tokens_per_step"]
    work = f"{steps} steps of {tokens:,.0f} tokens and {planned['flops_per_step']:.3g} FLOPs"
    memory = f"{planned['peak_gib']:.2f} GiB at most on each rank"
    if planned["seconds_per_step"] is None:
        return f"{work}; {memory}; no times, which are planned for known GPUs only"
    seconds = planned["seconds_per_step"] * steps / planned["steps_share"]
    step = f"{planned['seconds_per_step']:.3f} s a step, {planned['mfu']:.0%} of the peak FLOPs"
    return f"{work}; {memory}; {step}, {duration(seconds)} in all"


def _describe(report: dict[str, dict[str, Any]], *, on_gpu: bool) -> str:
    """What was measured, next to what was planned of the same: a process has more than tensors."""
    planned, measured = report["planned"], report["measured"]
    planned = planned if on_gpu else planned | {"peak_gib": None}
    units = {
        "seconds_per_step": "s a step",
        "peak_gib": "GiB at most on rank 0" if on_gpu else "GiB at most in rank 0's process",
        "num_input_tokens_per_step": "tokens a step",
        "flops_per_step": "FLOPs a step",
        "mfu": "of the peak FLOPs",
    }
    parts = [
        f"{measured[name]:.4g} {unit}"
        + (f" (planned {planned[name]:.4g})" if planned[name] is not None else "")
        for name, unit in units.items()
        if measured[name] is not None
    ]
    return f"over {measured['num_steps']} steps: {', '.join(parts)}"
