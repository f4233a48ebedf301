import json
import math
from pathlib import Path
from typing import Any

from kd.runs.records import read_metrics
from kd.training.metrics import MetricsLog, StepLines, whole_lines
from kd.training.progress_lines import ProgressLines, WallTime

COSTS = {"step_ms": 1.0, "peak_memory_gib": 1.0, "num_input_tokens": 2, "num_supervised_tokens": 1}


def metrics_log(folder: Path, total_steps: int) -> MetricsLog:
    progress = ProgressLines(
        WallTime(), total_steps=total_steps, every_seconds=0.0, divergence=None
    )
    path = folder / "metrics.jsonl"
    return MetricsLog(path, start_step=0, total_steps=total_steps, progress=progress)


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_what_is_not_finite_is_null_at_any_depth(tmp_path: Path) -> None:
    metrics = metrics_log(tmp_path, total_steps=1)
    nested = {
        "forward_kl": math.inf,
        "by_section": {"cot": {"forward_kl": math.nan, "num_supervised_tokens": 3}},
        "by_position": [None],
    }
    parts = [None, {"forward_kl": -math.inf}, {"forward_kl": 0.5}]
    metrics.write(
        COSTS
        | {
            "step": 1,
            "loss": math.nan,
            "tokens_per_second": 2.0,
            "lr": 0.1,
            "skipped": True,
            "diagnostics": nested,
            "parts": parts,
        }
    )
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == COSTS | {
        "step": 1,
        "loss": None,
        "tokens_per_second": 2.0,
        "lr": 0.1,
        "skipped": True,
        "diagnostics": {
            "forward_kl": None,
            "by_section": {"cot": {"forward_kl": None, "num_supervised_tokens": 3}},
            "by_position": [None],
        },
        "parts": [None, {"forward_kl": None}, {"forward_kl": 0.5}],
    }
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_what_a_full_disk_refuses_is_written_when_there_is_room(tmp_path, monkeypatch, caplog):
    log = metrics_log(tmp_path, total_steps=3)
    record = COSTS | {"loss": 1.0, "lr": 0.1, "tokens_per_second": 2.0}
    log.write(record | {"step": 1})

    class FullDisk:
        name = "metrics.jsonl"

        def write(self, _):
            raise OSError(28, "No space left on device")

    file, log._lines._file = log._lines._file, FullDisk()
    log.write(record | {"step": 2})
    assert "No space left on device" in caplog.text
    log._lines._file = file
    log.write(record | {"step": 3})
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_lines_of_steps_that_are_repeated_stand_aside_and_a_torn_one_is_left_out(tmp_path: Path):
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert whole_lines(tmp_path / "absent.jsonl") == []
    lines = StepLines(path, whole_lines(path), start_step=2)
    lines.write({"step": 3, "response": "again"})
    lines.close()
    assert whole_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "response": "again"}]
    assert whole_lines(tmp_path / "rollouts.abandoned.jsonl") == [{"step": 3}]
