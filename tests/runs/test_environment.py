"""The commit that is written beside a run: with a "+" when what runs is not what was committed."""

import subprocess
from pathlib import Path

import pytest

from kd.runs import environment

pytestmark = pytest.mark.process


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("kd", "launch", "recipes", "ds_configs", "runs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file.py").write_text("1\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.delenv("KD_COMMIT", raising=False)
    return tmp_path


def test_a_clean_checkout_has_its_commit_alone(checkout: Path) -> None:
    commit = environment.environment()["commit"]
    assert len(commit) == 40
    (checkout / "runs" / "new.txt").write_text("a run's own file changes nothing that runs\n")
    assert environment.environment()["commit"] == commit


@pytest.mark.parametrize("file", ["kd/file.py", "kd/new.py", "launch/new.sh", "recipes/mine.toml"])
def test_a_file_that_is_changed_or_not_tracked_yet_gives_the_commit_a_plus(
    checkout: Path, file: str
) -> None:
    (checkout / file).write_text("2\n")
    assert environment.environment()["commit"].endswith("+")
