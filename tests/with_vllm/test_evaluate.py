"""launch/evaluate.py with vLLM in its process, with a server, and with transformers: one set of
responses.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vllm

pytestmark = pytest.mark.vllm
TEACHER = "recipes/assets/tiny/teacher"


@pytest.fixture(scope="module")
def evaluated(
    python: Callable[..., Any],
    problems: Path,
    server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(results, responses) of each backend, greedy."""
    found = {}
    choices = {
        "transformers": ("--backend", "transformers"),
        "vllm": ("--backend", "vllm"),
        "server": ("--server", server),
    }
    for name, options in choices.items():
        folder = tmp_path_factory.mktemp(name)
        common = ["--recipe", "tiny_trunc50", "--set", f"evaluation.path={problems}"]
        common += ["--model", TEACHER, "--label", "teacher", "--output", folder]
        python("evaluate.py", *common, *options)
        lines = (folder / "teacher.responses.jsonl").read_text().splitlines()
        results = json.loads((folder / "teacher.json").read_text())
        found[name] = results, [json.loads(line) for line in lines]
    return found


@pytest.mark.parametrize("backend", ["vllm", "server"])
def test_greedy_responses_are_those_of_transformers(evaluated, backend: str) -> None:
    """To the last token, in float32: the trained teacher is nowhere of two minds on this task."""
    expected = evaluated["transformers"][1]
    assert len(expected) == 50
    assert len({row["response"] for row in expected}) == 50
    assert evaluated[backend][1] == expected


def test_results_name_what_generated_them_and_agree_on_the_rest(evaluated) -> None:
    backends = {name: results["backend"] for name, (results, _) in evaluated.items()}
    assert backends["vllm"] == f"vllm {vllm.__version__}"
    assert backends["server"] == f"vllm {vllm.__version__}, a server"
    for results, _ in evaluated.values():
        assert results["accuracy"] == evaluated["transformers"][0]["accuracy"] >= 0.98
        assert results["unclosed_fraction"] == 0.0
        assert results["mean_response_tokens"] > 50


def test_another_model_than_the_server_has_is_refused_by_name(
    python: Callable[..., Any], problems: Path, server: str, tmp_path: Path
) -> None:
    common = ["--recipe", "tiny_trunc50", "--set", f"evaluation.path={problems}"]
    student = "recipes/assets/tiny/student_base"
    options = ["--model", student, "--server", server, "--output", tmp_path]
    done = python("evaluate.py", *common, *options, fails=True)
    assert f"--server {server} serves {TEACHER}, not --model = '{student}'" in done.stderr
    assert not list(tmp_path.glob("*.json"))
