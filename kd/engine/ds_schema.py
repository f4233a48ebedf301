"""The keys that a DeepSpeed JSON may hold here, with their types. Nothing is coerced or ignored.

DeepSpeed's own models accept unknown sections, "true" for true and 3.0 for 3; they run afterwards,
where DeepSpeed is imported (kd.engine.engine). A DeepSpeed key that is missing here is set by the
recipe, has no effect in this loop, or would change the loss or what a checkpoint restores.
"""

import difflib
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict, is_typeddict  # of pydantic, for Python below 3.12

from kd.errors import UserError

Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
Size = Annotated[int, Field(ge=0, le=2**63 - 1)]  # elements, or bytes in aio
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Dtype = Literal["fp32", "bf16", "fp16"]

# Keys of DeepSpeed that this project refuses, and what to do instead.
INSTEAD = {
    "bfloat16": 'this is the section\'s old name: write "bf16"',
    "amp": 'apex is not used: remove it, and write "bf16": {"enabled": true}',
    "elasticity": "the recipe sets the batch for any number of ranks: remove it",
    "activation_checkpointing": "it has no effect: remove it, and set "
    "student.gradient_checkpointing in the recipe",
    "steps_per_print": "metrics.jsonl records every step: remove it",
}


def _needs_loss_scaling(enabled: bool) -> bool:
    if enabled:
        raise ValueError("it needs loss scaling, which is not supported: use bf16")
    return enabled


class OffloadSection(TypedDict, total=False):
    """What the sections of both offloads share."""

    device: Literal["none", "cpu", "nvme"]
    nvme_path: str
    buffer_count: Count
    pin_memory: bool


class OffloadParamSection(OffloadSection, total=False):
    buffer_size: Size
    max_in_cpu: Size


class OffloadOptimizerSection(OffloadSection, total=False):
    pipeline_read: bool
    pipeline_write: bool
    fast_init: bool
    ratio: Fraction
    super_offload: bool
    cpuadam_cores_perc: Fraction


class ZeroSection(TypedDict, total=False):
    stage: Annotated[int, Field(ge=0, le=3)]
    contiguous_gradients: bool
    reduce_scatter: bool
    reduce_bucket_size: Count
    use_multi_rank_bucket_allreduce: bool
    allgather_partitions: bool
    allgather_bucket_size: Count
    overlap_comm: bool
    offload_param: OffloadParamSection
    offload_optimizer: OffloadOptimizerSection
    sub_group_size: Count
    stage3_prefetch_bucket_size: Size
    stage3_param_persistence_threshold: Size
    stage3_model_persistence_threshold: Size
    stage3_max_live_parameters: Size
    stage3_max_reuse_distance: Size
    stage3_gather_16bit_weights_on_model_save: bool
    stage3_module_granularity_threshold: Size
    stage3_use_all_reduce_for_fetch_params: bool
    stage3_allgather_sequential: bool
    ignore_unused_parameters: bool
    round_robin_gradients: bool
    parameter_alignment: bool
    zero_hpz_partition_size: Count
    zero_quantized_weights: bool
    zero_quantized_nontrainable_weights: bool
    zero_quantized_gradients: bool
    memory_efficient_linear: bool
    override_module_apply: bool
    log_trace_cache_warnings: bool
    enable_sanity_checks: bool


class Bf16Section(TypedDict, total=False):
    enabled: bool
    immediate_grad_update: bool
    check_grad_overflow: bool
    bf16_master_weights_and_grads: bool
    bf16_optimizer_states: bool


class Fp16Section(TypedDict, total=False):
    """Many a JSON says that it is off."""

    enabled: Annotated[bool, AfterValidator(_needs_loss_scaling)]


class DataTypesSection(TypedDict, total=False):
    grad_accum_dtype: Dtype


class AioSection(TypedDict, total=False):
    block_size: Count
    queue_depth: Count
    intra_op_parallelism: Count
    single_submit: bool
    overlap_events: bool
    use_gds: bool


class FlopsProfilerSection(TypedDict, total=False):
    enabled: bool
    recompute_fwd_factor: Annotated[float, Field(ge=0.0)]
    profile_step: Count
    module_depth: Annotated[int, Field(ge=-1)]
    top_modules: Count
    detailed: bool
    output_file: str


class CommsLoggerSection(TypedDict, total=False):
    enabled: bool
    prof_all: bool
    prof_ops: list[str]
    verbose: bool
    debug: bool


@with_config(ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))  # and its sections
class DeepSpeedJson(TypedDict, total=False):
    """A whole file."""

    zero_optimization: ZeroSection
    bf16: Bf16Section
    fp16: Fp16Section
    data_types: DataTypesSection
    aio: AioSection
    communication_data_type: Dtype
    prescale_gradients: bool
    gradient_predivide_factor: Annotated[float, Field(gt=0.0)]
    gradient_allreduce_op: Literal["mean"]  # the loss is divided with this in mind
    zero_allow_untested_optimizer: bool
    zero_force_ds_cpu_optimizer: bool
    wall_clock_breakdown: bool
    memory_breakdown: bool
    dump_state: bool
    disable_python_gc: bool
    flops_profiler: FlopsProfilerSection
    comms_logger: CommsLoggerSection


SCHEMA = TypeAdapter(DeepSpeedJson)
REMEDIES = {
    "bool_type": "write true or false",
    "dict_type": "write an object",
    "float_type": "write a number",
    "int_type": "write a whole number",
    "list_type": "write a list",
    "string_type": "write a text in quotes",
    "literal_error": "write one of {expected}",
    "greater_than": "write a number above {gt}",
    "greater_than_equal": "write a number of at least {ge}",
    "less_than_equal": "write a number of at most {le}",
}


def check_ds_json(content: Any, path: Path) -> DeepSpeedJson:
    """The content of a file, typed and otherwise as it is. Raises UserError with one line for each
    problem: the file, the key, its value and what to write.
    """
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: it holds {reprlib.repr(content)}: write an object with zero_optimization in "
            "it"
        )
    problems = [
        f'{place} = "auto" has no meaning outside the HF Trainer: write a value'
        for place in _places_of_auto(content)
    ]
    try:
        SCHEMA.validate_python(content)
    except ValidationError as error:
        problems += [_describe(problem) for problem in error.errors() if problem["input"] != "auto"]
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return cast(DeepSpeedJson, content)


def _places_of_auto(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[str]:
    if value == "auto":
        yield _dotted(place)
    elif isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places_of_auto(part, (*place, key))


def _describe(problem: Any) -> str:
    """One of pydantic's errors: the key, its value and what to write."""
    place, value, kind = problem["loc"], problem["input"], problem["type"]
    context = problem.get("ctx", {})
    if kind == "extra_forbidden":
        remedy = _instead_of(place)
    elif kind == "value_error":
        remedy = str(context["error"])
    elif kind == "int_type" and isinstance(value, float) and value.is_integer():
        remedy = f"write a whole number, {int(value)}"
    else:
        remedy = REMEDIES.get(kind, problem["msg"]).format(**context)
    return f"{_dotted(place)} = {reprlib.repr(value)}: {remedy}"


def _instead_of(place: tuple[str | int, ...]) -> str:
    """What to do about an unknown key: INSTEAD's word, or the nearest key of its section, or the
    section that has it.
    """
    *section, key = map(str, place)
    if not section and key in INSTEAD:
        return INSTEAD[key]
    known = list(_known_keys(DeepSpeedJson))
    beside = [name for *parts, name in known if parts == section]
    near = [(*section, name) for name in difflib.get_close_matches(key, beside, n=1)]
    near += [parts for parts in known if parts[-1] == key]
    write = f"write {'.'.join(near[0])} or " if near else ""
    return f"unknown key: {write}remove it"


def _known_keys(section: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, kind in get_type_hints(section).items():
        yield (*place, name)
        if is_typeddict(kind):
            yield from _known_keys(kind, (*place, name))


def _dotted(place: tuple[str | int, ...]) -> str:
    parts = [
        part if isinstance(part, str) and part.isidentifier() else repr(part) for part in place
    ]
    return ".".join(parts)
