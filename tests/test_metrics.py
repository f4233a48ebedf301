import json
import math
from pathlib import Path
from typing import Any

from kd.metrics import MetricsLog, read_metrics


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_what_is_not_finite_is_null_at_any_depth(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path / "metrics.jsonl", start_step=0, total_steps=1)
    nested = {"forward_kl": math.inf, "by_section": {"cot": {"forward_kl": math.nan, "num_tokens": 3}}}
    parts = [None, {"forward_kl": -math.inf}, {"forward_kl": 0.5}]
    metrics.write({"step": 1, "loss": math.nan, "lr": 0.1, "skipped": True, "diagnostics": nested, "parts": parts})
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "lr": 0.1,
        "skipped": True,
        "diagnostics": {"forward_kl": None, "by_section": {"cot": {"forward_kl": None, "num_tokens": 3}}},
        "parts": [None, {"forward_kl": None}, {"forward_kl": 0.5}],
    }
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
