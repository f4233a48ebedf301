"""A cache of the teacher's likeliest tokens from a server, against the one that the teacher itself
fills.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from safetensors.torch import load_file, save_file
from tiny import ROOT

from kd.cache import open_cache
from kd.demo.arithmetic import ArithmeticSet, draw_rows
from kd.recipe import load_recipe
from kd.training.cache_identity import check_is_of

pytestmark = pytest.mark.vllm
TEACHER = "recipes/assets/tiny/teacher"
K = 8  # of a vocabulary of 20: some tokens that are there are not among the likeliest


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The embedded recipe on 24 traces."""
    folder = tmp_path_factory.mktemp("traces")
    rows = draw_rows(ArithmeticSet("training", 24), "traces")
    path = folder / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"data.path={path}", "data.num_validation=4", f"data.cache_dir={folder}/tokenised"]
    words = [word for setting in settings for word in ("--set", setting)]
    return ["--recipe", "tiny_trunc50", *words, "--kind", "top_k", "--num-tokens", str(K)]


def test_a_server_fills_what_the_teacher_itself_would(
    python: Callable[..., Any], server: str, options: list[str], tmp_path: Path
) -> None:
    done = python("cache.py", *options, "--server", server, "--output", tmp_path / "served")
    assert "the server and its second answer differ by" in done.stderr
    assert "the server and the local teacher differ by" in done.stderr
    python("cache.py", *options, "--output", tmp_path / "live")
    served, live = open_cache(tmp_path / "served"), open_cache(tmp_path / "live")
    assert served.manifest.server == f"vllm {vllm.__version__}"
    assert live.manifest.server is None
    assert served.manifest.teacher == live.manifest.teacher
    assert served._rows.keys() == live._rows.keys()
    assert len(live) == 24
    for key, row in live._rows.items():
        num_tokens = row.stop - row.start
        here, there = (cache.read(key, 0, num_tokens) for cache in (live, served))
        assert there["logprobs"].shape == here["logprobs"].shape == (num_tokens, K)
        torch.testing.assert_close(there["logprobs"], here["logprobs"], rtol=0, atol=2e-3)
        # Two tokens may change places where they are about equally likely
        assert (there["ids"] == here["ids"]).float().mean() > 0.99

    recipe = load_recipe("tiny_trunc50", [options[3], options[5], options[7]])
    from kd.data.tokenizers import load_tokenizers

    check_is_of(served, recipe, load_tokenizers(recipe))
    done = python("cache.py", *options, "--server", server, "--output", tmp_path / "served")
    assert "filling 0 rows" in done.stderr
    done = python("cache.py", *options, "--output", tmp_path / "served", fails=True)
    assert f"server: 'vllm {vllm.__version__}' there, None here" in done.stderr


def test_a_server_whose_numbers_are_not_the_teachers_is_refused(
    python: Callable[..., Any], server: str, options: list[str], tmp_path: Path
) -> None:
    """The recipe's teacher has the name of the one that is served, and other weights."""
    folder = tmp_path / TEACHER
    shutil.copytree(ROOT / TEACHER, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    noisy = {name: w + 0.5 * w.std() * torch.randn_like(w) for name, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    words = ["--server", server, "--output", tmp_path / "cache"]
    done = python("cache.py", *options, *words, cwd=tmp_path, fails=True)
    assert f"--server {server} and the local teacher differ by 0." in done.stderr
    assert "more than the 0.03 allowed" in done.stderr
    assert not list((tmp_path / "cache" / "shards").glob("*.safetensors"))


def test_more_tokens_than_the_server_tells_are_refused_with_its_option(
    python: Callable[..., Any], server: str, options: list[str], tmp_path: Path
) -> None:
    words = ["--server", server, "--output", tmp_path / "cache"]
    done = python("cache.py", *options, "--num-tokens", 20, *words, fails=True)
    assert "Requested" in done.stderr
    assert "--num-tokens 20 needs a server with --max-logprobs 20 or more" in done.stderr
