import os
import subprocess
from pathlib import Path

import forked
import pytest
from data_samples import build_tokenizer, good_rows, write_jsonl

from kd.recipe import ROOT

pytestmark = pytest.mark.process


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    build_tokenizer().save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "rows.jsonl", good_rows(20))
    text = f"""
[student]
model = "{tmp_path}/model"
[teacher]
model = "{tmp_path}/model"
[data]
path = "{tmp_path}/rows.jsonl"
cache_dir = "{tmp_path}/cache"
num_validation = 4
"""
    path = tmp_path / "tiny.toml"
    path.write_text(text)
    return path


def prepare(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return forked.run(
        [ROOT / "launch" / "prepare.py", *arguments], cwd=cwd, env=environment, timeout=120
    )


def test_prepare_tokenises_and_prints_what_became_of_the_rows(recipe_file: Path) -> None:
    done = prepare(
        "--recipe",
        str(recipe_file),
        "--set",
        "truncation.keep_fraction=0.5",
        cwd=recipe_file.parent,
    )
    assert done.returncode == 0, done.stderr
    assert "rows.jsonl: 20 rows, 20 usable" in done.stdout
    assert "train: 16 examples" in done.stdout
    assert "validation: 4 examples" in done.stdout
    assert done.stderr == ""
    assert len(list((recipe_file.parent / "cache").iterdir())) == 1


def test_prepare_prints_a_users_error_as_one_block_without_a_stack(recipe_file: Path) -> None:
    done = prepare(
        "--recipe", str(recipe_file), "--no-models", "--set", "data.path=absent.jsonl", cwd=ROOT
    )
    assert done.returncode == 2
    assert "data.path = 'absent.jsonl': no such file" in done.stderr
    assert "Traceback" not in done.stderr
