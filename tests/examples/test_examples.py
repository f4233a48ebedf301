"""The examples run, and what they compute is the gradient of full logits in one process."""

import json
import re

import pytest
from forked import run
from full_gradients import TEXTS, full_gradients, largest_error, random_pair, tokenizer
from plain_loop import batch_loss
from tiny import ROOT
from tiny_pair import collate
from trainer_gradients import trainer_gradients

RANK_CASES = [
    *(f"fsdp2-{tied}" for tied in ("tied", "untied", "teacher tied")),
    *(f"trainer-{tied}-accumulation{n}" for tied in ("tied", "untied") for n in (1, 2)),
]


def losses_in(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\bloss(?:': '?| )(\d+\.\d+)", output)]


def check_falls(losses: list[float], num_steps: int) -> None:
    assert len(losses) == num_steps
    assert 0.4 < losses[0] < 0.7
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.process
@pytest.mark.parametrize(("script", "num_steps"), [("plain_loop.py", 12), ("trainer.py", 6)])
def test_a_script_of_one_process_prints_a_falling_loss(tmp_path, script, num_steps):
    done = run([ROOT / "examples" / script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    check_falls(losses_in(done.stdout), num_steps)


@pytest.mark.dist
def test_the_script_of_two_ranks_prints_a_falling_loss(launch):
    done = launch("examples/fsdp2.py")
    assert done.returncode == 0, done.stderr[-4000:]
    check_falls(losses_in(done.stdout), 8)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_plain_loop_has_the_gradients_of_full_logits(tied):
    student, teacher = random_pair(student_tied=tied)
    expected_loss, expected = full_gradients(student, teacher)
    loss = batch_loss(student, teacher, collate(tokenizer(), TEXTS))
    loss.backward()
    assert expected_loss > 1.0
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5)
    actual = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert largest_error(actual, expected) < 1e-5


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_trainer_has_the_gradients_of_the_whole_batch(tmp_path, tied, accumulation):
    student, teacher = random_pair(student_tied=tied)
    expected_loss, expected = full_gradients(student, teacher)
    loss, actual = trainer_gradients(student, teacher, tmp_path, 1, accumulation)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert largest_error(actual, expected) < 1e-5


@pytest.fixture(scope="module")
def of_two_ranks(launch, tmp_path_factory):
    output = tmp_path_factory.mktemp("examples") / "results.json"
    path = f"{ROOT / 'examples'}:{ROOT / 'tests'}"
    done = launch("tests/examples/two_ranks_worker.py", str(output), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.dist
@pytest.mark.parametrize("case", RANK_CASES)
def test_two_ranks_have_the_gradients_of_one_process(of_two_ranks, case):
    assert list(of_two_ranks) == RANK_CASES
    loss, expected_loss, error = of_two_ranks[case]
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert error < 1e-5
