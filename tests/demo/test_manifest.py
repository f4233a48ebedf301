"""The shipped models are those of the manifest, and were never trained on a problem that the demo
scores.
"""

import json

import pytest
from tiny import ROOT

from kd.demo.arithmetic import SETS, draw_rows
from kd.demo.manifest import sha256

ASSETS = ROOT / "recipes" / "assets" / "tiny"
MANIFEST = json.loads((ASSETS / "manifest.json").read_text())


def test_every_shipped_file_has_the_hash_of_the_manifest():
    assert {path: sha256(ASSETS / path) for path in MANIFEST["files"]} == MANIFEST["files"]
    shipped = {str(path.relative_to(ASSETS)) for path in ASSETS.glob("*/*")}
    assert shipped == set(MANIFEST["files"])


@pytest.mark.parametrize("name", [name for name in SETS if "stage" in name])
def test_no_model_was_trained_on_a_problem_that_scores_or_distils(name):
    trained = {row["prompt"] for row in draw_rows(SETS[name], seed=f"{MANIFEST['seed']}/{name}")}
    for other in ("report", "selection", "train_problems"):
        assert not trained & {row["prompt"] for row in draw_rows(SETS[other], seed=f"0/{other}")}
