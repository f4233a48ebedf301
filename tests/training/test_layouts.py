"""A global batch has the loss and the gradients of one process, however it is cut up, on however
many ranks, and wherever teacher and student live.
"""

from typing import Any

import pytest
from layouts_worker import CUTS, STUDENTS, TEACHERS, TRAINED
from stages import results_of

pytestmark = pytest.mark.dist


# Three ranks share eight sequences unequally; of four, some have nothing to do.
@pytest.fixture(scope="module", params=[3, 2], ids="{} ranks".format)
def results(
    request: pytest.FixtureRequest, launch: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    return results_of("layouts_worker.py", launch, folder, num_rows=40, num_ranks=request.param)


@pytest.mark.parametrize("cut", CUTS)
def test_loss_and_gradients_are_those_of_one_process(results: dict[str, Any], cut: str) -> None:
    found = {name: result for name, result in results.items() if name.endswith(cut)}
    assert len(found) == len(STUDENTS) * (len(TEACHERS) + len(TRAINED))
    for name, result in found.items():
        loss, expected = result["loss"]
        assert loss == pytest.approx(expected, rel=1e-5), name
        assert result["gradient"] < 1e-5, name


def test_the_cuts_differ(results: dict[str, Any]) -> None:
    assert len({result["micro_batches"] for result in results.values()}) > 1
