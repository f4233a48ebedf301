"""DeepSpeed's JSON: what it may hold, and what the recipe puts into it."""

import json
from pathlib import Path

import pytest
from deepspeed.monitor.config import get_monitor_config

from kd.engine.ds_config import (
    RECIPE_KEYS,
    hpz_size,
    is_bf16,
    is_zero3,
    read_ds_config,
    student_ds_config,
    teacher_ds_config,
)
from kd.engine.engine import check_ds_config
from kd.errors import UserError
from kd.recipe import ROOT, Recipe

SHIPPED = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
STAGE_3: dict[str, object] = {"zero_optimization": {"stage": 3}}


def recipe(
    *, student: str = "zero3_cpu.json", teacher: str = "zero3_teacher.json", **sections: object
) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"name": "trial", "output_dir": "elsewhere"},
            "teacher": {"model": "unused"},
            "student": {"model": "unused"},
            "data": {"path": "unused.jsonl"},
            "deepspeed": {"student": student, "teacher": teacher},
            "training": {"global_batch_size": 8},
            **sections,
        }
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "mine.json"


def read(file: Path, content: object, role: str = "student") -> dict[str, object]:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_ds_config(recipe(**{role: str(file)}), role)


@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_a_key_that_the_recipe_decides_is_refused_with_its_home(file: Path, key: str) -> None:
    with pytest.raises(UserError) as error:
        read(file, STAGE_3 | {key: 7})
    assert (
        str(error.value)
        == f"{file}: {key} = 7 is set by the recipe ({RECIPE_KEYS[key]}): remove it here"
    )


@pytest.mark.parametrize("key", RECIPE_KEYS)
def test_the_home_of_each_key_is_a_field_of_the_recipe(key: str) -> None:
    section, _, fields = RECIPE_KEYS[key].partition(".")
    known = type(getattr(recipe(), section)).model_fields
    for field in fields.replace(f"{section}.", "").replace(" and ", ", ").split(", "):
        assert field in known


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "reduce_bucket_size"),
        (STAGE_3 | {"bf16": {"enabled": "auto"}}, "bf16.enabled"),
    ],
)
def test_auto_is_refused_where_it_stands(file: Path, content: object, problem: str) -> None:
    with pytest.raises(UserError, match=rf'^{file}: .*{problem} = "auto" has no meaning'):
        read(file, content)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({}, "needs zero_optimization.stage.* found 0"),
        ({"zero_optimization": {"stage": 0}}, "needs zero_optimization.stage.* found 0"),
        (
            STAGE_3 | {"fp16": {"enabled": True}},
            "fp16.enabled = True: it needs loss scaling, .* use bf16",
        ),
        ('{"zero_optimization": {"stage": 3},}', "not valid JSON: .* line 1"),
        ("", "not valid JSON"),
        ("[]", r"holds \[\]: write an object"),
        (
            {"zero_optimization": {"stage": "3"}},
            "zero_optimization.stage = '3': write a whole number",
        ),
        ({"zero_optimization": 3}, "zero_optimization = 3: write an object"),
        (STAGE_3 | {"bf16": True}, "bf16 = True: write an object"),
        (STAGE_3 | {"bfloat16": {"enabled": True}}, 'write "bf16"'),
    ],
)
def test_a_json_that_cannot_serve_is_refused_with_its_name(
    file: Path, role: str, content: object, problem: str
) -> None:
    with pytest.raises(UserError, match=rf"^{file}: .*{problem}"):
        read(file, content, role)


def test_only_a_student_may_be_left_unpartitioned(file: Path) -> None:
    stage_2 = {"zero_optimization": {"stage": 2}}
    assert read(file, stage_2, "student") == stage_2
    with pytest.raises(
        UserError, match=r"deepspeed\.teacher needs zero_optimization\.stage = 3, found 2"
    ):
        read(file, stage_2, "teacher")


@pytest.mark.parametrize("size", [0, -1, "8", 1.5, 8.0, True, None])
def test_hpz_takes_a_number_of_ranks(file: Path, size: object) -> None:
    with pytest.raises(
        UserError, match=rf"^{file}: .*zero_hpz_partition_size = {size!r}: write a .*number"
    ):
        read(file, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}})


def test_hpz_is_for_a_student_of_stage_3(file: Path) -> None:
    hpz = {"stage": 3, "zero_hpz_partition_size": 8}
    assert hpz_size(read(file, {"zero_optimization": hpz})) == 8
    assert hpz_size(read(file, STAGE_3)) == 1
    with pytest.raises(
        UserError,
        match=r"is only for deepspeed\.student: remove it, and set teacher\.shard = \"node\"",
    ):
        read(file, {"zero_optimization": hpz}, "teacher")
    with pytest.raises(
        UserError, match=r"zero_hpz_partition_size = 8 needs zero_optimization\.stage = 3, found 2"
    ):
        read(file, {"zero_optimization": hpz | {"stage": 2}})


def test_a_missing_file_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(UserError) as error:
        read_ds_config(recipe(student="zero9.json"), "student")
    assert str(error.value).startswith("deepspeed.student = 'zero9.json': no such file")
    assert all(name in str(error.value) for name in SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_json_loads_for_its_role(name: str) -> None:
    role = "teacher" if "teacher" in name else "student"
    config = read_ds_config(recipe(**{role: name}), role)
    assert is_bf16(config) == ("cpu" not in name)
    assert is_zero3(config) == name.startswith("zero3")


@pytest.mark.parametrize("name", [name for name in SHIPPED if "bf16" in name])
def test_shipped_students_accumulate_in_fp32_and_discard_steps_that_are_not_finite(
    name: str,
) -> None:
    config = read_ds_config(recipe(student=name), "student")
    assert config["data_types"]["grad_accum_dtype"] == "fp32"
    # Stage 3 discards them always
    assert is_zero3(config) or config["bf16"]["check_grad_overflow"] is True


def test_the_student_gets_the_numbers_of_the_recipe() -> None:
    training = {
        "global_batch_size": 24,
        "micro_batch_size": 3,
        "learning_rate": 3e-4,
        "adam_betas": [0.8, 0.95],
        "adam_eps": 1e-6,
        "weight_decay": 0.1,
        "max_grad_norm": 0.7,
    }
    config = student_ds_config(recipe(training=training), world_size=2, device_type="cpu")
    assert config["train_batch_size"] == 2 * 4  # micro-batches: the loop counts tokens itself
    assert config["train_micro_batch_size_per_gpu"] == 1
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.7
    parameters = {
        "lr": 3e-4,
        "betas": [0.8, 0.95],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "torch_adam": True,
    }
    assert config["optimizer"] == {"type": "AdamW", "params": parameters}
    assert config["zero_optimization"] == read_ds_config(recipe(), "student")["zero_optimization"]


def test_on_a_gpu_adam_is_pytorchs_fused_one() -> None:
    parameters = student_ds_config(recipe(), 2, "cuda")["optimizer"]["params"]
    assert parameters["torch_adam"]
    assert parameters["fused"]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_offload_keeps_deepspeeds_own_optimizer(device_type: str) -> None:
    config = student_ds_config(recipe(student="zero3_bf16_offload.json"), 2, device_type)
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert config["optimizer"]["params"].keys() == {"lr", "betas", "eps", "weight_decay"}


def test_the_teacher_has_no_optimizer() -> None:
    config = teacher_ds_config(recipe())
    assert config["train_micro_batch_size_per_gpu"] == recipe().training.micro_batch_size
    assert not config.keys() & {"optimizer", "scheduler", "gradient_clipping", "train_batch_size"}


def test_deepspeed_has_no_monitor_of_its_own() -> None:
    monitor = {"tensorboard": True, "csv": True, "wandb_project": "kd"}
    assert not get_monitor_config(student_ds_config(recipe(monitor=monitor), 2, "cpu")).enabled


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_accepts_what_is_shipped_and_completed(name: str) -> None:
    if "teacher" in name:
        check_ds_config(teacher_ds_config(recipe(teacher=name)), name)
    else:
        check_ds_config(student_ds_config(recipe(student=name), 1, "cpu"), name)


def test_what_deepspeed_alone_refuses_is_one_message(file: Path) -> None:
    """Keys that are right one by one."""
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    file.write_text(json.dumps({"zero_optimization": zero}))
    config = student_ds_config(recipe(student=str(file)), 1, "cpu")
    before = json.dumps(config)
    with pytest.raises(UserError, match="mine.json: DeepSpeed rejects it: .*Partial offloading"):
        check_ds_config(config, str(file))
    assert json.dumps(config) == before
