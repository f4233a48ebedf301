"""A worker of this folder, run on every rank with a student under each stage of ZeRO."""

import json
from pathlib import Path
from typing import Any

from tiny import write_tiny_recipe


def results_of(
    worker: str, launch: Any, folder: Path, *, num_rows: int, num_ranks: int
) -> dict[str, Any]:
    """What WORKER RECIPE FOLDER OUTPUT writes: FOLDER holds zero1_fp32.json and zero2_fp32.json."""
    recipe, output = write_tiny_recipe(folder, num_rows=num_rows), folder / "results.json"
    for stage in (1, 2):
        zero = {"stage": stage, "contiguous_gradients": True, "reduce_bucket_size": 5000000}
        (folder / f"zero{stage}_fp32.json").write_text(json.dumps({"zero_optimization": zero}))
    arguments = [str(recipe), str(folder), str(output)]
    done = launch(f"tests/training/{worker}", *arguments, num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text())
    return found
