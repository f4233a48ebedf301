"""A run that learns from what a real server of the teacher writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.runs.records import read_metrics

pytestmark = pytest.mark.vllm

STEPS = 3
Script = Callable[..., Any]


def common(problems: Path, folder: Path) -> list[str]:
    """Settings of a run on traces of these problems, whose thoughts are none."""
    traces = [json.loads(line) for line in problems.read_text().splitlines()]
    rows = [{**row, "reasoning": "1+1=2;", "id": str(i)} for i, row in enumerate(traces)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        f"run.output_dir={folder}",
        "run.name=served",
        f"data.path={folder}/traces.jsonl",
        f"data.cache_dir={folder}/tokenised",
        "data.num_validation=4",
        "training.global_batch_size=8",
        f"training.selection_path={problems}",
        "rollout.source=teacher",
    ]


def test_the_teachers_responses_come_from_a_server(
    server: str, python: Script, problems: Path, tmp_path: Path
) -> None:
    traces = [json.loads(line) for line in problems.read_text().splitlines()]
    settings = [
        *common(problems, tmp_path),
        f"training.max_steps={STEPS}",
        f"rollout.server={server}",
        "rollout.temperature=0.1",
        "rollout.max_new_tokens=96",
    ]
    words = [word for setting in settings for word in ("--set", setting)]
    python("train.py", "--recipe", "tiny_trunc50", *words)
    records = read_metrics(tmp_path / "served" / "metrics.jsonl")
    assert len(records) == STEPS
    assert all(record["rollouts"]["num_sequences"] == 8 for record in records)
    assert all(record["rollouts"]["ended_fraction"] == 1.0 for record in records)
    lines = (tmp_path / "served" / "rollouts.jsonl").read_text().splitlines()
    answers = {row["prompt"]: row["answer"] for row in traces}
    for sample in map(json.loads, lines):
        response = sample["response"].partition("</think>")[2]
        assert response == f"{answers[sample['prompt']]}<eos>", sample


def test_a_server_that_is_away_is_named_by_its_key(
    python: Script, problems: Path, tmp_path: Path
) -> None:
    settings = [*common(problems, tmp_path), "rollout.server=http://127.0.0.1:9"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = python("train.py", "--recipe", "tiny_trunc50", *words, fails=True)
    assert "rollout.server = http://127.0.0.1:9: no answer to /v1/models" in done.stderr
