import json
import math
from pathlib import Path
from typing import Any

from kd.runs.records import read_metrics
from kd.training.metrics import MetricsLog

COSTS = {"step_ms": 1.0, "peak_memory_gib": 1.0, "num_input_tokens": 2, "num_supervised_tokens": 1}


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_what_is_not_finite_is_null_at_any_depth(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl", start_step=0, total_steps=1)
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
    log = MetricsLog(tmp_path / "metrics.jsonl", start_step=0, total_steps=3)
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
