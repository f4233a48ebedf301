"""A step that learns from sampled responses has the loss and the gradients of one process, wherever
both models live and whoever writes.
"""

import json
from typing import Any

import pytest
from rollouts_worker import CASES
from stages import results_of

pytestmark = pytest.mark.dist


# Three ranks share eight sequences unequally; of four, one has nothing to do.
@pytest.fixture(scope="module", params=[3, 2], ids="{} ranks".format)
def results(
    request: pytest.FixtureRequest, launch: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("rollouts")
    return results_of("rollouts_worker.py", launch, folder, num_rows=60, num_ranks=request.param)


@pytest.mark.parametrize("case", CASES)
def test_responses_loss_and_gradients_are_those_of_one_process(
    results: dict[str, Any], case: str
) -> None:
    found = results[case]
    responses, expected = found["responses"]
    assert responses == expected
    loss, expected_loss = found["loss"]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert found["gradient"] < 2e-5
    record, num_tokens = found["record"], sum(map(len, responses))
    assert record["num_sequences"] == found["num_rollouts"] == len(responses)
    assert record["mean_tokens"] == num_tokens / len(responses)
    assert found["tokens_of_rollouts"]["num_supervised_tokens"] == num_tokens


def test_writers_differ(results: dict[str, Any]) -> None:
    """Adapters in effect, another temperature and the teacher write otherwise."""
    texts = {case: json.dumps(found["responses"][0][:4]) for case, found in results.items()}
    assert texts["zero1"] == texts["zero3 whole"] == texts["zero3 by layers"]
    others = {texts[case] for case in ("zero1", "zero3 all", "adapters", "teacher's")}
    assert len(others) == 4


def test_two_samples_of_a_prompt_differ(results: dict[str, Any]) -> None:
    responses, _ = results["zero2, two samples, packed"]["responses"]
    pairs = zip(responses[::2], responses[1::2], strict=True)
    assert any(one != other for one, other in pairs)
