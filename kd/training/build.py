"""Teacher and student from a recipe: loaded, in their engines, their weights proven to have
arrived.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kd.cache import open_cache
from kd.cache.kinds import HiddenKind
from kd.data.dataset import Data
from kd.data.loader import Loader
from kd.data.step_plan import SequenceLayout
from kd.distributed.device import memory_gib
from kd.distributed.layout import Layout
from kd.distributed.nodes import group_of_node, size_to_plan
from kd.distributed.process_group import gather_objects, on_rank_zero
from kd.engine.ds_config import is_bf16, teacher_ds_config
from kd.engine.engine import Engine, initialize
from kd.engine.zero3 import (
    fetching_layers,
    num_parameters,
    num_shards,
    repartition,
    set_leaf_modules,
    shard_bytes,
)
from kd.errors import UserError
from kd.models.loading import load_partitioned, load_whole, random_model
from kd.models.probe import Reference, reference_of, verify_weights
from kd.models.student import Student, StudentModule
from kd.models.trained import set_trained
from kd.models.weights import load_head
from kd.plan import check_shapes, memory_plan
from kd.plan.memory import RESERVED_GIB
from kd.recipe import ModelSection, Recipe, RolloutSection
from kd.rollouts.rollouts import Rollouts
from kd.teachers.cached import CachedTeacher
from kd.teachers.live import LiveTeacher, TeacherModule
from kd.training.cache_identity import check_holds, check_is_of, check_serves
from kd.training.first_lines import say
from kd.training.selection import Selection

log = logging.getLogger(__name__)


def build_teacher(
    recipe: Recipe, data: Data, tokenizer: PreTrainedTokenizerFast, layout: Layout
) -> LiveTeacher | CachedTeacher | None:
    """The recipe's teacher, or the cache that replaces it.

    Collective: every rank must call this.
    """
    if recipe.teacher is None:
        return None
    if recipe.teacher.cache is not None:
        return build_cached_teacher(recipe, data, tokenizer, layout)
    return build_live_teacher(recipe, layout)


def build_cached_teacher(
    recipe: Recipe, data: Data, tokenizer: PreTrainedTokenizerFast, layout: Layout
) -> CachedTeacher:
    """Raises UserError where the cache is another teacher's, lacks rows of the data, or is of no
    use to the recipe's loss.

    Collective: every rank must call this.
    """
    section = recipe.teacher
    assert section is not None
    assert section.cache is not None
    cache = open_cache(Path(section.cache))
    where = f"teacher.cache = {section.cache!r}"
    on_rank_zero(lambda: check_is_of(cache, recipe, tokenizer))
    on_rank_zero(lambda: check_holds(cache, data, where))
    on_rank_zero(lambda: check_serves(cache.kind, recipe, where))
    say("teacher", f"{where}, {cache.kind}")
    if not isinstance(cache.kind, HiddenKind):
        return CachedTeacher(cache, None, layout.device)
    dtype = torch.bfloat16 if is_bf16(teacher_ds_config(recipe)) else torch.float32
    head = load_head(section, role="teacher", dtype=dtype)
    moved = [None if t is None else t.to(layout.device) for t in (head.weight_VH, head.bias_V)]
    assert moved[0] is not None
    on_device = head._replace(weight_VH=moved[0], bias_V=moved[1])
    return CachedTeacher(cache, on_device, layout.device)


def build_live_teacher(recipe: Recipe, layout: Layout) -> LiveTeacher:
    """The recipe's teacher, whole on each device or in its own ZeRO-3 engine, its weights proven to
    have arrived.

    Collective: every rank must call this.
    """
    section = recipe.teacher
    assert section is not None
    say("teacher", f"loading {section.model}")
    ds_config = teacher_ds_config(recipe)
    reference = _reference_of(section, ds_config, role="teacher")
    if section.shard == "gpu":
        model = load_whole(section, ds_config, role="teacher", device=layout.device)
    else:
        model = load_partitioned(section, ds_config, role="teacher")
        if section.shard == "node":
            group = group_of_node(layout.nodes, recipe.run.collective_timeout_minutes)
            repartition(model, group, ds_config)
    run = teacher_run(model, section.shard, ds_config)
    check_shapes(section, model, role="teacher")
    teacher = LiveTeacher(model, run, keeps_packed_apart=reference.keeps_packed_apart)
    verify_weights(model, teacher.probe, reference.probed, role="teacher", device=layout.device)
    _say_size("teacher", model, f"teacher.shard = {section.shard}")
    return teacher


def build_student(recipe: Recipe, ds_config: dict[str, Any], layout: Layout) -> Student:
    """The recipe's student in its engine, its weights proven to have arrived.

    Collective: every rank must call this.
    """
    section = recipe.student
    say("student", f"loading {section.model}")
    if section.init == "random":
        model = random_model(section, ds_config, role="student", seed=recipe.run.seed)
        reference = reference_of(model, role="student")
    else:
        reference = _reference_of(section, ds_config, role="student")
        model = load_partitioned(section, ds_config, role="student")
    check_shapes(section, model, role="student")
    set_trained(model, section, recipe.run.seed)
    engine = student_engine(model, recipe, ds_config)
    student = Student(model, engine, keeps_packed_apart=reference.keeps_packed_apart)
    verify_weights(model, student.probe, reference.probed, role="student", device=layout.device)
    stage = ds_config["zero_optimization"]["stage"]
    _say_size("student", model, f"ZeRO-{stage}, {recipe.deepspeed.student}")
    model.train()
    return student


def teacher_run(
    model: PreTrainedModel, shard: str, ds_config: dict[str, Any]
) -> TeacherModule | Engine:
    """What a loaded teacher runs as: a plain module where each device has all of it, else an
    engine. Collective: every rank must call this.
    """
    if shard == "gpu":
        return TeacherModule(model)
    set_leaf_modules(model)
    return initialize(TeacherModule(model), fetching_layers(ds_config, model))


def student_engine(model: PreTrainedModel, recipe: Recipe, ds_config: dict[str, Any]) -> Engine:
    """The engine around a loaded student and its loss. Collective: every rank must call this."""
    if recipe.student.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    set_leaf_modules(model)
    of_sampled = recipe.rollout_loss if recipe.rollout else None
    module = StudentModule(model, recipe.loss, of_sampled)
    return initialize(module, fetching_layers(ds_config, model))


def build_rollouts(
    recipe: Recipe,
    loader: Loader,
    student: Student,
    teacher: LiveTeacher | CachedTeacher | None,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    *,
    whole: bool,
) -> Rollouts | None:
    """What samples responses; None for a recipe without [rollout]. whole: of gathers_whole()."""
    if recipe.rollout is None:
        return None
    sampler = student if recipe.rollout.source == "student" else teacher
    assert not isinstance(sampler, CachedTeacher | None)  # the recipe refuses it
    return Rollouts(recipe, loader, sampler, tokenizer, layout, whole=whole)


def build_selection(
    recipe: Recipe,
    student: Student,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    *,
    whole: bool,
) -> Selection | None:
    """What measures accuracy while training; None for a recipe that does not ask for it. Raises
    UserError for problems that cannot be read.
    """
    if recipe.training.evaluate_every is None:
        return None
    return Selection(recipe, student, tokenizer, layout, whole=whole)


def gathers_whole(recipe: Recipe, layout: Layout) -> bool:
    """Whether a model that ZeRO-3 divides is gathered as a whole while it generates. The same
    answer on every rank; of no consequence where nothing is generated.
    """
    rollout = recipe.rollout
    if rollout is None and recipe.training.evaluate_every is None:
        return True
    if rollout is not None and rollout.gather != "auto":
        return rollout.gather == "whole"
    rollout = rollout or RolloutSection(max_new_tokens=recipe.evaluation.max_new_tokens)
    changed = {"rollout": rollout.model_copy(update={"gather": "whole"})}
    whole = recipe.model_copy(update=changed)
    num_nodes, ranks_per_node = size_to_plan(layout.nodes)
    gib = memory_gib(layout.device, ranks_per_node)

    def fits() -> bool:
        try:
            needed = memory_plan(whole, num_nodes, ranks_per_node).total_gib
        except UserError as error:
            log.warning(
                "sampling gathers layer by layer, since its memory could not be planned: %s", error
            )
            return False
        fits = needed + RESERVED_GIB <= gib
        word = "with whole weights" if fits else "gathered layer by layer"
        say("sampling", f"{word}: whole weights need {needed:.1f} of {gib:.1f} GiB on each rank")
        return fits

    return on_rank_zero(fits)


def choose_layout(
    recipe: Recipe, student: Student, teacher: LiveTeacher | CachedTeacher | None
) -> SequenceLayout:
    """How sequences lie in a micro-batch: what the recipe says, and for "auto" packed where all
    models attend by flash attention, which needs no mask to keep packed sequences apart.

    Raises UserError where they are to be packed and a model would mix them.
    """
    models: dict[str, Student | LiveTeacher] = {"student": student}
    if isinstance(teacher, LiveTeacher):
        models["teacher"] = teacher
    mixing = [role for role, model in models.items() if not model.keeps_packed_apart]
    wanted = recipe.training.sequence_layout
    if wanted == "packed" and mixing:
        kinds = " and ".join(f"the {role} ({type(models[role].model).__name__})" for role in mixing)
        raise UserError(
            f'training.sequence_layout = "packed": {kinds} would carry one sequence into the '
            'next: use "padded"'
        )
    if wanted != "auto":
        say("layout", f"{wanted}: training.sequence_layout says so")
        return wanted
    attention = {role: m.model.config._attn_implementation for role, m in models.items()}
    is_varlen = all(name.startswith("flash") for name in attention.values())
    layout: SequenceLayout = "packed" if is_varlen and not mixing else "padded"
    if mixing:
        why = f"the {' and the '.join(mixing)} would mix packed sequences"
    else:
        why = "all models have flash attention" if is_varlen else "packing takes flash attention"
    say("layout", f"{layout}: {why}")
    return layout


def _reference_of(section: ModelSection, ds_config: dict[str, Any], *, role: str) -> Reference:
    """From a whole copy on rank 0, for every rank to compare with: a node without rank 0 has shards
    of its own.
    """
    return on_rank_zero(lambda: reference_of(load_whole(section, ds_config, role=role), role=role))


def _say_size(role: str, model: PreTrainedModel, why: str) -> None:
    """What was measured on all ranks, after a first forward pass."""
    parameters = list(model.parameters())
    measured = gather_objects((num_shards(parameters), shard_bytes(parameters) / 2**20))
    shards, mebibytes = zip(*measured, strict=True)
    number = " or ".join(str(number) for number in sorted(set(shards)))
    divided = "whole" if number == "1" else f"divided by {number}"
    sizes = sorted({f"{size:,.1f}" for size in (min(mebibytes), max(mebibytes))}, key=len)
    dtype = str(model.dtype).removeprefix("torch.")
    what = f"{num_parameters(parameters) / 1e6:,.2f} M parameters in {dtype}"
    ranks = f"{len(measured)} rank{'s' if len(measured) > 1 else ''}"
    say(role, f"{what}, {divided} on {ranks} ({why}): {' to '.join(sizes)} MiB on each")
