"""benchmarks/balance.py: shares that can be checked by hand, and the committed result."""

import json

import numpy as np
import pytest
from balance import load, row_of
from tiny import ROOT

from kd.data.step_plan import BatchShape, Work

pytestmark = pytest.mark.benchmark


def test_padding_counts_as_load_and_not_as_work() -> None:
    lengths = np.array([4, 2, 2])
    padded = BatchShape(3, max_tokens=12, work=Work(1.0, 0.0))
    assert load(lengths, padded) == 12.0
    assert load(lengths, BatchShape(3, max_tokens=12, layout="packed", work=Work(1.0, 1.0))) == 32.0
    assert load(np.empty(0, dtype=np.int64), padded) == 0.0


def test_a_budget_wastes_less_than_single_sequences() -> None:
    budget, single = (
        row_of(4096, 1.0, 8, way, Work(), num_draws=2) for way in ("packed budget", "one sequence")
    )
    assert 0.95 < budget["useful_share"] <= 1.0
    assert budget["useful_share"] > single["useful_share"]
    assert budget["micro_batches_per_rank"] < single["micro_batches_per_rank"] / 3


@pytest.mark.parametrize(("keep", "least"), [(1.0, 0.95), (0.5, 0.92)])
@pytest.mark.parametrize("ranks", [8, 32])
def test_the_committed_shares_reach_their_targets(ranks: int, keep: float, least: float) -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "balance.json").read_text())
    (row,) = [
        row
        for row in content["rows"]
        if (row["longest"], row["keep_fraction"], row["ranks"], row["way"])
        == (4096, keep, ranks, "packed budget")
    ]
    assert row["useful_share"] >= least
