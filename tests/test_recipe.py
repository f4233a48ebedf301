"""Recipes: what ships resolves; a mistake is one error that names file, key, value and the nearest
valid name.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny import ROOT

from kd.errors import UserError
from kd.recipe import RECIPES_DIR, Recipe, load_recipe
from kd.runs.check import check_recipe

SHIPPED = sorted(path.stem for path in RECIPES_DIR.glob("*.toml"))
MINIMAL = '[student]\nmodel = "s"\n[teacher]\nmodel = "t"\n[data]\npath = "d.jsonl"\n'


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves(name):
    recipe = load_recipe(name)
    assert recipe.run.name == name
    assert recipe.max_micro_batches(2) >= 1


@pytest.mark.parametrize("family", ["tiny", "qwen7b_to_1p5b", "qwen3_8b_to_4b"])
def test_members_of_a_family_differ_in_their_length_alone(family):
    members = [load_recipe(f"{family}_trunc{percent}") for percent in (25, 50, 75, 100)]
    assert [member.truncation.keep_fraction for member in members] == [0.25, 0.5, 0.75, 1.0]

    def without_length(recipe: Recipe) -> dict:
        content = recipe.model_dump()
        del content["run"]["name"], content["truncation"]["keep_fraction"]
        return content

    assert all(without_length(member) == without_length(members[0]) for member in members)


def test_the_papers_pair_has_the_papers_hyper_parameters():
    recipe = load_recipe("qwen3_8b_to_4b_trunc50")
    training = recipe.training
    assert (recipe.teacher.model, recipe.student.model) == ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B-Base")
    assert (training.global_batch_size, training.learning_rate, training.weight_decay) == (
        8,
        4e-6,
        0.05,
    )
    assert (training.schedule, training.warmup_fraction, training.epochs) == ("one_cycle", 0.1, 2)
    assert (recipe.loss.kd_weight, recipe.loss.ce_weight, recipe.truncation.max_full_tokens) == (
        0.5,
        0.5,
        4096,
    )
    assert (recipe.data.num_train, recipe.data.num_validation, recipe.data.split_seed) == (
        8000,
        200,  # not the paper's 1000: their validation takes as long as the training
        42,
    )


def test_a_recipe_is_frozen():
    recipe = load_recipe("tiny_trunc50")
    with pytest.raises(ValidationError):
        recipe.loss.temperature = 2.0


def test_overrides_are_typed_and_the_last_one_wins():
    recipe = load_recipe(
        "tiny_trunc50",
        [
            "training.max_steps=7",
            "run.name=trial",
            "truncation.keep_fraction=0.3",
            'data.loss_sections=["cot"]',
        ],
    )
    assert (recipe.training.max_steps, recipe.run.name) == (7, "trial")
    assert (recipe.truncation.keep_fraction, recipe.data.loss_sections) == (0.3, ("cot",))


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(
        UserError, match="recipe 'tiny_trunc5' is not in recipes/. Did you mean .*tiny_trunc50"
    ):
        load_recipe("tiny_trunc5")


def test_an_unknown_base_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"mine\.toml: base = 'tinyy'.*Did you mean tiny"):
        load_recipe(write(tmp_path, 'base = "tinyy"\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[truncation]\nkeep_fractoin = 0.5",
            r"mine\.toml: unknown key truncation.keep_fractoin. Did you mean keep_fraction",
        ),
        (
            "[trainin]\nmax_steps = 5",
            r"mine\.toml: unknown section \[trainin\]. Did you mean training",
        ),
        ("max_steps = 5", r"mine\.toml: unknown section \[max_steps\]"),
        ("training = 5", r"mine\.toml: training is a section: write \[training\]"),
        (
            "[training]\nmax_steps = 5\nmax_steps = 6",
            r"mine\.toml: duplicate key in 'max_steps = 6'",
        ),
        ("[training]\nmax_steps =", r"mine\.toml: not valid TOML in 'max_steps ='"),
        ('[training]\nmax_steps = "many"', r"mine\.toml: training.max_steps = 'many': .*integer"),
        (
            "[truncation]\nkeep_fraction = 1.5",
            r"mine\.toml: truncation.keep_fraction = 1.5: .*less than or equal to 1",
        ),
        (
            '[truncation]\nwindow = "left"',
            r"mine\.toml: truncation.window = 'left': .*'head', 'middle' or 'tail'",
        ),
        ("[loss]\nbeta = 0.0", r"mine\.toml: loss.beta = 0.0: .*greater than 0"),
        ("[loss]\nkd_weight = 0.0\nce_weight = 0.0", "kd_weight and ce_weight are both 0"),
        ("[data]\nloss_sections = []", r"data.loss_sections = \[\]: .*at least 1"),
        ('[data]\nloss_sections = ["cot", "cot"]', "names a section twice"),
    ],
)
def test_a_mistake_is_named_with_file_key_and_remedy(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load_recipe(write(tmp_path, f'base = "tiny"\n{text}\n'))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.max_stepz=5",
            "--set training.max_stepz=5: unknown key training.max_stepz. Did you mean max_steps",
        ),
        ("max_steps=5", "write section.key=value"),
        ("training.max_steps", "write section.key=value"),
        (
            "training.max_steps=-1",
            "--set training.max_steps=-1: training.max_steps = -1: .*greater than 0",
        ),
    ],
)
def test_overrides_are_checked_like_files(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("tiny_trunc50", [override])


def test_a_missing_field_is_named(tmp_path):
    with pytest.raises(UserError, match="student"):
        load_recipe(
            write(tmp_path, '[data]\npath = "d.jsonl"\n[loss]\nkd_weight = 0.0\nce_weight = 1.0\n')
        )
    with pytest.raises(UserError, match=r"student.model: Field required"):
        load_recipe(write(tmp_path, MINIMAL.replace('model = "s"', "")))


def test_a_divergence_needs_a_teacher_and_a_teacher_a_divergence(tmp_path):
    no_teacher = MINIMAL.replace('[teacher]\nmodel = "t"\n', "")
    with pytest.raises(UserError, match=r"kd_weight > 0 needs a \[teacher\]"):
        load_recipe(write(tmp_path, no_teacher))
    with pytest.raises(UserError, match=r"never uses the \[teacher\]"):
        load_recipe(write(tmp_path, MINIMAL + "[loss]\nkd_weight = 0.0\n"))


@pytest.mark.parametrize(
    ("world_size", "budget", "expected"),
    [
        (1, None, 2),
        (2, None, 1),
        (3, None, 1),
        (64, None, 1),
        (1, 999, 2),
        (31, 999, 2),
        (32, 999, 1),
    ],
)
def test_deepspeed_is_told_whether_a_step_may_have_several_micro_batches(
    world_size, budget, expected
):
    recipe = load_recipe("tiny_trunc50")  # 32 sequences by 16
    changed = recipe.with_values({"training.max_tokens_per_micro_batch": budget})
    assert changed.max_micro_batches(world_size) == expected


def test_a_run_can_be_named_by_its_resolved_recipe(tmp_path):
    # Without a teacher: its section is null
    recipe = load_recipe("tiny_scratch_teacher_1", ["run.seed=5"])
    resolved = tmp_path / "recipe.json"
    resolved.write_text(recipe.model_dump_json())
    assert load_recipe(str(resolved)) == recipe
    assert load_recipe(str(resolved), ["run.seed=6"]).run.seed == 6
    resolved.write_text("[]")
    with pytest.raises(
        UserError, match=r"recipe.json: it holds \[\] .* name the recipe.json of a run"
    ):
        load_recipe(str(resolved))
    resolved.write_text("{")
    with pytest.raises(UserError, match="recipe.json: not valid JSON"):
        load_recipe(str(resolved))


OUT_OF_RANGE = [
    *[f"run.seed={value}" for value in (-1, 2**32, 10**23, "true", "1.0", '"1"')],
    "data.split_seed=-1",
    *[f"run.watchdog_minutes={value}" for value in ("1e300", "0", "true", "nan", "inf", '"9"')],
    "run.collective_timeout_minutes=1e300",
    *[f"training.learning_rate={value}" for value in ("1e300", "1e-300", "true", '"1e-4"')],
    *[f"training.max_steps={10**power}" for power in (10, 23, 30)],
    *[f"training.max_steps={value}" for value in ("true", "4.0", "0x" + "f" * 5000)],
    f"training.epochs={10**30}",
    f"training.global_batch_size={10**9}",
    f"training.micro_batch_size={10**9}",
    f"loss.chunk_size={10**30}",
    *[f"loss.logits_gib={value}" for value in ("0", "-1.0", "1e300", "true")],
    "loss.temperature=1e-300",
    "loss.kd_weight=1e300",
    "evaluation.temperature=1e-300",
    "training.adam_betas=[0.9, true]",
    "student.gradient_checkpointing=1",
    'teacher.trust_remote_code="yes"',
    *[f'{key}=""' for key in ("student.model", "teacher.model", "data.path", "data.end_token")],
    *[f'{key}=" "' for key in ("data.validation_path", "data.cache_dir", "run.output_dir")],
    *[f'{key}=""' for key in ("data.revision", "data.think_close", "deepspeed.student")],
    f"student.model={'m' * 5000}",
    'data.system_prompt="a\\u0000b"',
    "run.name=0",
    "run.name=false",
]


@pytest.mark.parametrize("override", OUT_OF_RANGE, ids=lambda override: override[:50])
def test_a_value_that_no_consumer_takes_is_refused_by_key_and_value(override):
    with pytest.raises(UserError, match=f" {override.partition('=')[0]} = ") as caught:
        load_recipe("tiny_trunc50", [override])
    assert len(str(caught.value)) < 1500


def test_an_integer_is_a_float_too():
    recipe = load_recipe("tiny_trunc50", ["truncation.keep_fraction=1", "loss.kd_weight=1"])
    assert (recipe.truncation.keep_fraction, recipe.loss.kd_weight) == (1.0, 1.0)


def test_an_override_holds_one_value():
    with pytest.raises(UserError, match="holds 2 values"):
        load_recipe("tiny_trunc50", ["training.max_steps=5\nwarmup=3"])


@pytest.mark.parametrize("base", ['"' + "b" * 5000 + '"', "5", '["tiny"]', '"a\\u0000"'])
def test_a_base_that_is_no_name_is_one_message(tmp_path, base):
    with pytest.raises(UserError, match=r"mine\.toml: base = .* is not in recipes/bases/"):
        load_recipe(write(tmp_path, f"base = {base}\n"))


@pytest.mark.parametrize("name", ["x" * 5000, "a\0", "x" * 5000 + ".toml", ""])
def test_a_recipe_that_cannot_be_a_file_is_one_message(name):
    with pytest.raises(UserError, match="^recipe '"):
        load_recipe(name)


@pytest.mark.parametrize("place", ["file", "file/below/it"])
def test_check_finds_an_output_dir_that_is_a_file_or_below_one(tmp_path, place):
    (tmp_path / "file").touch()
    recipe = load_recipe("qwen7b_to_1p5b_trunc50")
    with pytest.raises(UserError, match=r"run\.output_dir = '.*file is not a folder"):
        check_recipe(recipe.with_values({"run.output_dir": str(tmp_path / place)}))
    check_recipe(recipe.with_values({"run.output_dir": str(tmp_path / "new" / "folder")}))


@pytest.mark.process
def test_check_prints_the_recipe_and_imports_no_engine():
    done = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            ROOT / "launch/train.py",
            "--recipe",
            "qwen7b_to_1p5b_trunc50",
            "--check",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert Recipe.model_validate_json(done.stdout) == load_recipe("qwen7b_to_1p5b_trunc50")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "deepspeed", "transformers"}
