"""launch/audit.py as a user calls it, in a plain log: tables on stdout, JSON in the run folder,
errors in one block.
"""

import json
import subprocess
from pathlib import Path

import forked
import pytest
from tiny import ROOT, write_tiny_recipe

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_recipe(tmp_path_factory.mktemp("audit"), num_rows=40)


def audit(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "launch" / "audit.py", "--recipe", recipe, *arguments]
    return forked.run(command, cwd=recipe.parent, timeout=120)


def test_numbers_are_printed_and_written_to_the_run_folder(recipe: Path) -> None:
    done = audit(recipe)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    path = recipe.parent / "runs" / "tiny_test" / "audit.json"
    assert [file.name for file in path.parent.iterdir()] == ["audit.json"]
    content = json.loads(path.read_text())
    total = content["tokens"]["total"]
    assert content["report"]["train"]["num_examples"] == 30
    report = (
        f"train: 30 examples, {total['num_input_tokens']} of {total['num_full_tokens']} tokens read"
    )
    assert (
        f"{report} ({total['kept_fraction']:.3f}), {total['num_supervised_tokens']} supervised"
        in done.stdout
    )
    assert content["found"]["close_marker_dropped"]["num_examples"] == 30
    assert done.stdout.count("row ") == 5
    assert "<think>" in done.stdout
    assert done.stdout.endswith(f"{path}\n")
    assert "\x1b" not in done.stdout


def test_the_number_of_examples_the_file_and_the_recipe_can_be_chosen(
    recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "new" / "numbers.json"
    done = audit(
        recipe, "--show", "0", "--json", str(path), "--set", "truncation.keep_fraction=1.0"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("row ") == 0
    content = json.loads(path.read_text())
    assert content["tokens"]["total"]["num_dropped_tokens"] == 0
    assert [
        content["found"][name]["num_examples"]
        for name in ("close_marker_dropped", "answer_dropped")
    ] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--show=-1"], "--show = -1: give the number of examples to print, 0 for none"),
        (["--json=."], "--json = '.' is a folder: name a file"),
        (
            ["--json=traces.jsonl/audit.json"],
            "--json = 'traces.jsonl/audit.json': cannot be written",
        ),
        (
            ["--set=truncation.keep_fraction=0.05", '--set=data.loss_sections=["answer"]'],
            "no training example has a token in data.loss_sections = ['answer'] after truncation",
        ),
        (
            ["--set=truncation.max_full_tokens=3"],
            "dropped 40: longer than truncation.max_full_tokens = 3",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_audited_is_one_message_and_nothing_is_written(
    recipe: Path, arguments: list[str], message: str
) -> None:
    done = audit(recipe, *arguments, "--set=run.name=refused")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (recipe.parent / "runs" / "refused").exists()
