"""What a DeepSpeed JSON may hold: each form of a wrong one is named by file, key and value."""

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig,
    DeepSpeedZeroOffloadParamConfig,
)

from kd.engine import ds_schema
from kd.engine.ds_config import read_ds_config
from kd.engine.ds_schema import check_ds_json
from kd.errors import UserError
from kd.recipe import Recipe

FILE = Path("mine.json")
STAGE_3: dict[str, Any] = {"stage": 3}


def problems(content: Any) -> list[str]:
    """The lines of the error, without the file, which each of them begins with."""
    with pytest.raises(UserError) as error:
        check_ds_json(content, FILE)
    lines = str(error.value).splitlines()
    assert all(line.startswith("mine.json: ") for line in lines)
    return [line.removeprefix("mine.json: ") for line in lines]


@pytest.mark.parametrize(
    ("section", "key", "value", "remedy"),
    [
        ("zero_optimization", "stage", 3.0, "write a whole number, 3"),
        ("zero_optimization", "stage", "3", "write a whole number"),
        ("zero_optimization", "stage", True, "write a whole number"),
        ("zero_optimization", "stage", 4, "write a number of at most 3"),
        ("zero_optimization", "stage", -1, "write a number of at least 0"),
        ("zero_optimization", "stage", None, "write a whole number"),
        ("zero_optimization", "reduce_bucket_size", -1, "write a number of at least 1"),
        ("zero_optimization", "reduce_bucket_size", 0, "write a number of at least 1"),
        ("zero_optimization", "reduce_bucket_size", 5e8, "write a whole number, 500000000"),
        ("zero_optimization", "reduce_bucket_size", 2**63, "write a number of at most "),
        ("zero_optimization", "allgather_bucket_size", -5, "write a number of at least 1"),
        ("zero_optimization", "stage3_prefetch_bucket_size", -5, "write a number of at least 0"),
        ("zero_optimization", "stage3_max_live_parameters", [1], "write a whole number"),
        ("zero_optimization", "zero_hpz_partition_size", True, "write a whole number"),
        ("zero_optimization", "overlap_comm", 1, "write true or false"),
        ("zero_optimization", "overlap_comm", "true", "write true or false"),
        ("zero_optimization", "offload_optimizer", "cpu", "write an object"),
        ("zero_optimization", "offload_optimizer", None, "write an object"),
        ("zero_optimization", "offload_param", True, "write an object"),
        ("bf16", "enabled", "true", "write true or false"),
        ("bf16", "enabled", 1, "write true or false"),
        ("fp16", "enabled", True, "it needs loss scaling"),
        ("data_types", "grad_accum_dtype", "float32", "write one of 'fp32', 'bf16' or 'fp16'"),
        ("aio", "queue_depth", 0, "write a number of at least 1"),
        ("comms_logger", "prof_ops", "all_reduce", "write a list"),
        ("flops_profiler", "output_file", 3, "write a text in quotes"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_to_write(section, key, value, remedy):
    (problem,) = problems({"zero_optimization": STAGE_3, section: {key: value}})
    assert problem.startswith(f"{section}.{key} = ")
    assert f": {remedy}" in problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"zero_optimization": 3}, "zero_optimization = 3: write an object"),
        ({"bf16": True}, "bf16 = True: write an object"),
        ({"wall_clock_breakdown": "false"}, "wall_clock_breakdown = 'false': write true or false"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor = 0: write a number above 0"),
        ({"gradient_predivide_factor": "2"}, "gradient_predivide_factor = '2': write a number"),
        ({"gradient_predivide_factor": 1e999}, "gradient_predivide_factor = inf: "),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op = 'sum': write one of 'mean'"),
        ({"comms_logger": {"prof_ops": [1]}}, "comms_logger.prof_ops.0 = 1: write a text"),
        (
            {"zero_optimization": {"offload_param": {"device": "CPU"}}},
            "zero_optimization.offload_param.device = 'CPU': write one of 'none', 'cpu' or 'nvme'",
        ),
    ],
)
def test_what_is_wrong_at_other_depths_is_named_too(content, problem):
    assert problems(content)[0].startswith(problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            {"zero_optimisation": STAGE_3},
            "zero_optimisation = .* write zero_optimization or remove it",
        ),
        ({"stage": 3}, "stage = 3: .* write zero_optimization.stage or remove it"),
        ({"reduce_bucket_size": 5}, "write zero_optimization.reduce_bucket_size or remove it"),
        ({"no_such_key": 1}, "no_such_key = 1: unknown key: remove it"),
        ({"a\nb": 1}, r"'a\\nb' = 1: unknown key"),
        ({"": 1}, "'' = 1: unknown key"),
        (
            {"zero_optimization": {"reduce_buckets_size": 5}},
            "reduce_buckets_size = 5: .* write zero_optimization.reduce_bucket_size or remove it",
        ),
        (
            {"zero_optimization": {"prefetch_bucket_size": 5}},
            "write zero_optimization.stage3_prefetch_bucket_size or remove it",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"devices": "cpu"}}},
            "offload_optimizer.devices = .*optimizer.device or remove it",
        ),
        ({"amp": {"enabled": False}}, "amp = .*apex is not used"),
        ({"elasticity": {"enabled": True}}, "elasticity = .*remove it"),
        ({"activation_checkpointing": {}}, "set student.gradient_checkpointing"),
        ({"bfloat16": {"enabled": True}}, 'write "bf16"'),
        ({"checkpoint": {"load_universal": True}}, "checkpoint = .*remove it"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(content, problem):
    with pytest.raises(UserError, match=problem):
        check_ds_json(content, FILE)


def test_auto_is_found_at_any_depth():
    content = {
        "bf16": "auto",
        "zero_optimization": {"stage": "auto", "offload_param": {"device": "auto"}},
        "comms_logger": {"prof_ops": ["all_reduce", "auto"]},
        "mine": [{"deep": ["auto"]}],
    }
    found = {line.split(" = ")[0] for line in problems(content) if '"auto" has no meaning' in line}
    assert found == {
        "bf16",
        "zero_optimization.stage",
        "zero_optimization.offload_param.device",
        "comms_logger.prof_ops.1",
        "mine.0.deep.0",
    }


def test_each_of_several_problems_has_its_line():
    content = {"zero_optimization": {"stage": 3.0, "typo": 1}, "bf16": {"enabled": "true"}}
    assert len(problems(content)) == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"bf16": {"enabled": true}, "bf16": {}}', "the key 'bf16' appears twice"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', "the key 'stage' appears twice"),
        ('{"gradient_predivide_factor": NaN}', "NaN is not a JSON number"),
        (
            '{"zero_optimization": {"reduce_bucket_size": Infinity}}',
            "Infinity is not a JSON number",
        ),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
    ids=["twice", "twice deep", "nan", "infinity", "depth", "digits"],
)
def test_json_that_parsers_disagree_on_is_refused(tmp_path, text, problem):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/mine\.json: .*{problem}"):
        read_ds_config(recipe(tmp_path / "mine.json"), "student")


@pytest.mark.parametrize(
    ("zero", "problem"),
    [
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param.device = 'cpu' needs"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "needs offload_param.nvme_path"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offload_optimizer.nvme_path"),
    ],
)
def test_keys_that_do_not_suit_each_other_are_named(tmp_path, zero, problem):
    (tmp_path / "mine.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=problem):
        read_ds_config(recipe(tmp_path / "mine.json"), "student")


def test_a_full_file_is_returned_as_it_is():
    content = {
        "zero_optimization": {
            **STAGE_3,
            "offload_param": {"device": "nvme", "nvme_path": "/local", "max_in_cpu": 0},
            "offload_optimizer": {"device": "cpu", "ratio": 1, "pin_memory": False},
        },
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "aio": {"block_size": 1048576},
        "communication_data_type": "bf16",
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "flops_profiler": {"enabled": True, "module_depth": -1},
        "gradient_predivide_factor": 2,
    }
    assert check_ds_json(content, FILE) == content


@pytest.mark.parametrize(
    ("section", "theirs"),
    [
        (ds_schema.ZeroSection, DeepSpeedZeroConfig),
        (ds_schema.OffloadParamSection, DeepSpeedZeroOffloadParamConfig),
        (ds_schema.OffloadOptimizerSection, DeepSpeedZeroOffloadOptimizerConfig),
        (ds_schema.Bf16Section, DeepSpeedBF16Config),
        (ds_schema.Fp16Section, DeepSpeedFP16Config),
        (ds_schema.CommsLoggerSection, CommsLoggerConfig),
        (ds_schema.AioSection, AIO_DEFAULT_DICT),
        (ds_schema.FlopsProfilerSection, vars(DeepSpeedFlopsProfilerConfig({}))),
    ],
)
def test_every_key_is_one_of_the_installed_deepspeed(section, theirs):
    if isinstance(theirs, type):
        fields = theirs.model_fields
        theirs = {field.alias or name for name, field in fields.items()}
    assert get_type_hints(section).keys() <= set(theirs)


def recipe(student: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "student": {"model": "unused"},
            "data": {"path": "unused.jsonl"},
            "loss": {"kd_weight": 0.0},
            "deepspeed": {"student": str(student)},
        }
    )
