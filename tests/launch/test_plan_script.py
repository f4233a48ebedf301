"""launch/plan.py: what it says of shipped recipes without data or network, of data that are here,
and of bad input.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
from tiny import ROOT, layout_of, write_tiny_recipe

from kd.errors import UserError
from kd.recipe import RECIPES_DIR, load_recipe

specification = importlib.util.spec_from_file_location("plan_script", ROOT / "launch" / "plan.py")
assert specification is not None
assert specification.loader is not None
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

QWEN = "qwen7b_to_1p5b_trunc50"
NAMES = sorted(path.stem for path in RECIPES_DIR.glob("**/*.toml"))
# Those of a second stage start from what the first leaves in runs/.
SHIPPED = [name for name in NAMES if not load_recipe(name).student.model.startswith("runs/")]


def report_of(monkeypatch: pytest.MonkeyPatch, recipe: str, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(
        sys, "argv", ["plan.py", "--recipe", recipe, "--gpus-per-node=2", *arguments]
    )
    return script.make_report(script.parse_args())


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of 80 rows, 10 of them for validation, without max_steps."""
    path = write_tiny_recipe(tmp_path_factory.mktemp("plan_script"))
    path.write_text(path.read_text().replace("max_steps = 40\n", "epochs = 3\n"))
    return str(path)


@pytest.mark.process
def test_a_shipped_recipe_is_planned_in_a_table_and_as_json_without_gpu_data_or_network(
    tmp_path: Path,
):
    output = tmp_path / "plan.json"
    arguments = ["--recipe", QWEN, "--gpus-per-node", "8", "--gpu", "h100", "--json", str(output)]
    done = forked.run([ROOT / "launch" / "plan.py", *arguments], cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert [plan["keep_fraction"] for plan in report["plans"]] == [0.25, 0.5, 0.75, 1.0]
    assert report["lengths"].startswith("assumed: 8000 training rows, all of the longest length")
    for text in (
        "truncation.max_full_tokens",
        "the data could not be read: ",
        "keep 0.75 on h100: fits in 79.6 GiB",
    ):
        assert done.stdout.count(text) == 1, done.stdout
    for plan in report["plans"]:
        assert plan["num_steps"] == 2 * 8000 // 32
        assert plan["num_input_tokens"] == 16_000 * 8192 * plan["keep_fraction"]
        assert plan["fits"]
        flops = plan["flops_per_step"]
        assert flops["model"] == flops["teacher"] + flops["student"] + flops["loss"]
        assert plan["mfu"] == pytest.approx(
            flops["model"] / (8 * 989e12 * plan["seconds_per_step"])
        )
        steps_hours = plan["num_steps"] * plan["seconds_per_step"] / 3600
        assert plan["hours"] * plan["shares"]["steps_share"] == pytest.approx(steps_hours)
        parts = plan["gib_per_rank"]
        total = sum(value for name, value in list(parts.items())[: list(parts).index("total")])
        assert parts["total"] == pytest.approx(total)
        assert f"{plan['hours']:.2f}" in done.stdout
        assert f"{parts['total']:.2f}" in done.stdout


def test_the_7b_pair_costs_what_the_usual_estimate_says(monkeypatch):
    report = report_of(monkeypatch, QWEN, "--keep=0.5", "--mean-tokens=4000", "--max-tokens=8000")
    (plan,) = report["plans"]
    tokens = 32 * 2000
    # 2 FLOPs a token and weight in forward, 6 with backward; attention comes on top.
    assert plan["num_input_tokens_per_step"] == tokens
    assert plan["flops_per_step"]["teacher"] == pytest.approx(2 * 6.5e9 * tokens, rel=0.1)
    assert plan["flops_per_step"]["student"] == pytest.approx(6 * 1.31e9 * tokens, rel=0.15)
    assert plan["longest_sequence_tokens"] == 4000


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_planned(monkeypatch, name: str):
    plans = report_of(monkeypatch, name, "--rows=1000")["plans"]
    assert all(plan["flops_per_step"]["model"] > 0 and plan["num_steps"] for plan in plans)
    costs = [(plan["flops_per_step"]["model"], plan["gib_per_rank"]["total"]) for plan in plans]
    assert costs == sorted(costs)


def test_data_that_are_here_give_the_lengths(monkeypatch, recipe: str):
    report = report_of(monkeypatch, recipe, "--keep=0.5,1.0")
    assert report["lengths"].startswith("from the data: 70 training rows, ")
    half, whole = report["plans"]
    from kd.data.dataset import load_data
    from kd.data.tokenizers import load_tokenizers

    loaded = load_recipe(recipe)
    examples = load_data(loaded, load_tokenizers(loaded)).train
    assert half["num_steps"] == whole["num_steps"] == 3 * (len(examples) // 8)
    # The epoch's last, partial batch is dropped: a mean over the others is not quite that over all
    # examples.
    assert half["num_input_tokens_per_step"] == pytest.approx(
        8 * examples.num_input_tokens.mean(), rel=0.02
    )
    assert whole["num_input_tokens_per_step"] == pytest.approx(
        8 * examples.num_tokens_N3.sum(1).mean(), rel=0.02
    )
    assert whole["longest_sequence_tokens"] == examples.num_tokens_N3.sum(1).max()


def test_batches_are_planned_as_they_are_collated(recipe: str):
    from kd.data.dataset import load_data
    from kd.data.loader import Loader
    from kd.data.step_plan import BatchShape
    from kd.data.tokenizers import load_tokenizers
    from kd.plan.lengths import step_lengths

    loaded = load_recipe(recipe, ["data.random_mask_fraction=0.3", 'data.loss_sections=["cot"]'])
    loader = Loader(load_data(loaded, load_tokenizers(loaded)).train, BatchShape(8, 2), 0, 0)
    for step in range(3):
        lengths = step_lengths(loader, step, 1)
        layouts = [layout_of(rank, 2) for rank in range(2)]
        batches = [batch for layout in layouts for batch in loader.micro_batches(step, layout)]
        assert sorted(lengths.padded_N) == sorted(
            np.repeat([batch.input_ids.shape[1] for batch in batches], 2)
        )
        assert lengths.read_N.sum() == sum(batch.num_input_tokens for batch in batches)
        assert lengths.supervised_N.sum() == sum(batch.num_supervised_tokens for batch in batches)


def test_what_cannot_be_known_is_not_guessed(monkeypatch, recipe: str, capsys):
    report = report_of(monkeypatch, recipe, "--set=data.path=missing.jsonl")
    assert "an unknown number of training rows" in report["lengths"]
    assert (
        "the data could not be read: data.path = 'missing.jsonl': no such file" in report["lengths"]
    )
    for plan in report["plans"]:
        assert (
            plan["num_steps"] is plan["num_input_tokens"] is plan["hours"] is plan["fits"] is None
        )
    from kd.plan.plan_table import print_report

    print_report(report)
    output = capsys.readouterr().out
    assert output.count("unknown ") >= 12
    assert "--gpu KIND adds times" in output


def test_rows_that_a_truncation_leaves_without_a_label_are_not_counted(monkeypatch, recipe: str):
    with pytest.raises(UserError, match="as many training examples, but there are 0"):
        report_of(monkeypatch, recipe, "--keep=0.1", '--set=data.loss_sections=["cot"]')


def test_figures_take_the_place_of_the_data(monkeypatch, recipe: str):
    report = report_of(
        monkeypatch, recipe, "--mean-tokens=40", "--max-tokens=60", "--rows=80", "--keep=0.5"
    )
    (plan,) = report["plans"]
    assert (
        "80 training rows, 40 tokens on average, as stated, at most 60 (as stated)"
        in report["lengths"]
    )
    assert (
        plan["num_input_tokens_per_step"],
        plan["longest_sequence_tokens"],
        plan["num_steps"],
    ) == (
        8 * 20,
        30,
        30,
    )


def test_what_does_not_fit_is_said_with_what_would(monkeypatch):
    settings = (
        "--set=student.gradient_checkpointing=false",
        "--set=training.micro_batch_size=4",
        "--gpu=l40s",
    )
    (plan,) = report_of(monkeypatch, QWEN, *settings, "--keep=1.0")["plans"]
    assert plan["fits"] is False
    assert "do not fit in 45.0 GiB: use " in plan["verdict"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--gpu=h1000", "--gpu h1000: choose from a100-40gb, a100, h100, "),
        ("--keep=0.5,0", "--keep 0: write a fraction above 0 and at most 1"),
        ("--keep=1.5", "--keep 1.5: write a fraction above 0 and at most 1"),
        ("--keep=half", "--keep half: write a fraction above 0 and at most 1"),
        ("--keep=nan", "--keep nan: write a fraction above 0 and at most 1"),
        ("--network-gbps=0", "--network-gbps 0.0: write a rate above 0"),
        ("--network-gbps=nan", "--network-gbps nan: write a rate above 0"),
        ("--disk-gb-s=inf", "--disk-gb-s inf: write a rate above 0"),
        ("--set=teacher.shard=auto", 'teacher.shard = "auto" depends on the GPU: add --gpu KIND'),
        ("--nodes=0", "--nodes 0: write at least 1"),
        ("--rows=0", "--rows 0: write at least 1"),
        (
            "--mean-tokens=9000",
            "--mean-tokens 9000 is more than the longest sequence, 8192 (truncation.max_",
        ),
        ("--set=truncation.keep=1", "truncation"),
    ],
)
def test_a_bad_argument_is_named_with_its_value_and_the_remedy(
    monkeypatch, argument: str, message: str
):
    with pytest.raises(UserError) as error:
        report_of(monkeypatch, QWEN, argument)
    assert message in str(error.value)


def test_the_fastest_place_is_printed_ready_to_paste(monkeypatch, capsys):
    report = report_of(monkeypatch, QWEN, "--gpu=h100", "--mean-tokens=2000", "--keep=0.25,1.0")
    from kd.plan.plan_table import print_report

    print_report(report)
    printed = capsys.readouterr().out
    fastest = report["placements"]["rows"][0]
    assert f": {fastest['settings']}\n" in printed
    assert ": the recipe as it is\n" in printed
    settings = fastest["settings"].replace("--set ", "--set=").split()
    faster = report_of(monkeypatch, QWEN, "--gpu=h100", "--mean-tokens=2000", *settings)
    assert min(row["seconds_per_step"] for row in faster["placements"]["rows"]) == pytest.approx(
        fastest["seconds_per_step"]
    )
    # A quarter of short traces is bound by the host as the recipe stands
    assert "keep 0.25 takes 24% of the FLOPs of keep 1.0 but " in printed
    assert (
        "bound by the host, which has the same work for fewer tokens; "
        f"faster with {fastest['settings']}" in printed
    )


def test_auto_is_settled_for_the_gpu_that_is_named(monkeypatch, capsys):
    report = report_of(
        monkeypatch, QWEN, "--gpu=h100", "--set=teacher.shard=auto", "--mean-tokens=2000"
    )
    assert report["choice"].startswith("auto is teacher.shard = gpu: ")


def test_the_plan_says_what_a_cache_would_take_and_spare(monkeypatch):
    report = report_of(monkeypatch, QWEN, "--mean-tokens=2000", "--rows=1000", "--keep=1.0")
    # 7168 bytes a token: 3584 channels in bf16
    assert report["cache"].startswith("teacher.cache would save 5")
    assert report["cache"].endswith(
        ", and take 14 GB on disk (bf16 hidden states of 2,000,000 tokens)"
    )
