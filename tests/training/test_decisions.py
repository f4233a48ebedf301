"""What a run decides between two steps, without processes, models or files."""

import math

import pytest

from kd.errors import Interrupted, UserError
from kd.recipe import TrainingSection
from kd.training.decisions import Progress, run_steps
from kd.training.step import StepResult, Validation


class FakeRun:
    """Takes steps that do nothing, and writes down what it is told to do."""

    def __init__(self, losses=None, bad_steps=(), interrupted_after=(), accuracies=None):
        self.calls = []
        self.accuracies = accuracies  # of each step
        self.losses = losses  # validation loss of each step, or None without a validation set
        self.bad_steps, self.interrupted_after = bad_steps, interrupted_after
        self.step = 0

    def take_step(self, step):
        self.step = step + 1
        self.calls.append(f"step {self.step}")
        return StepResult(1.0, 1.0, 1.0, 8, 16, 1.0, self.step in self.bad_steps, None)

    def validate(self):
        self.calls.append("validate")
        return self.losses and Validation(self.losses[self.step - 1], 0.0, 0.0, None)

    def evaluate(self):
        self.calls.append("evaluate")
        return self.accuracies and self.accuracies[self.step - 1]

    def record(self, validation):
        self.calls.append("record")

    def stop(self, progress, result):
        self.calls.append("stop")
        raise UserError("not finite")

    def is_interrupted(self):
        return self.step in self.interrupted_after

    def save(self, progress):
        self.calls.append(f"save {progress.step}")

    def leave(self, progress):
        self.calls.append(f"leave {progress.step}")
        raise Interrupted


def training(**changes):
    values = {"checkpoint_every": 2, "validate_every": 2, "skip_nonfinite": 0}
    return TrainingSection(**values | changes)


def test_every_nth_step_and_the_last_are_validated_recorded_and_saved():
    run = FakeRun()
    progress = run_steps(run, Progress(), 5, training())
    assert run.calls == [
        *("step 1", "record"),
        *("step 2", "validate", "record", "save 2"),
        *("step 3", "record"),
        *("step 4", "validate", "record", "save 4"),
        *("step 5", "validate", "record", "save 5"),
    ]
    assert progress == Progress(step=5)


def test_validations_may_be_more_or_less_frequent_than_checkpoints():
    often, seldom = FakeRun(), FakeRun()
    run_steps(often, Progress(), 5, training(checkpoint_every=4, validate_every=2))
    assert [call for call in often.calls if call[0] in "vs" and call[:2] != "st"] == [
        *("validate", "validate", "save 4"),
        *("validate", "save 5"),
    ]
    run_steps(seldom, Progress(), 5, training(checkpoint_every=2, validate_every=3))
    assert [call for call in seldom.calls if call[0] in "vs" and call[:2] != "st"] == [
        *("save 2", "validate", "save 4"),
        *("validate", "save 5"),
    ]


@pytest.mark.parametrize(
    ("total", "checkpoint_every", "validated"),
    [
        (100, 50, [*range(10, 101, 10)]),
        (105, 50, [*range(10, 101, 10), 105]),
        (100, 25, [10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90, 100]),
        (5, 5, [1, 2, 3, 4, 5]),
        (100, 1000, [*range(10, 101, 10)]),
    ],
)
def test_a_recipe_that_says_nothing_of_it_is_validated_ten_times_and_wherever_it_is_saved(
    total, checkpoint_every, validated
):
    section = TrainingSection(checkpoint_every=checkpoint_every)
    steps = range(1, total + 1)
    assert [step for step in steps if section.validates_after(step, total)] == validated


def test_the_best_step_is_one_that_was_saved():
    run = FakeRun(losses=[9.0, 0.1, 0.2, 0.3, 0.5, 0.4])
    progress = run_steps(run, Progress(), 6, training(checkpoint_every=3, validate_every=1))
    assert (progress.best_step, progress.best_loss) == (3, 0.2)
    apart = training(checkpoint_every=3, validate_every=2)
    assert run_steps(FakeRun(losses=run.losses), Progress(), 6, apart).best_step == 6


def test_a_resumed_run_takes_the_steps_that_are_left():
    run = FakeRun()
    start = Progress(step=3, num_skipped=1, best_step=2, best_loss=0.5)
    assert run_steps(run, start, 4, training(skip_nonfinite=1)) == start._replace(step=4)
    assert run.calls == ["step 4", "validate", "record", "save 4"]
    assert run_steps(FakeRun(), start, 3, training()) == start, "nothing is left"


def test_the_best_step_has_the_lowest_validation_loss_and_the_first_of_equals():
    run = FakeRun(losses=[9.0, 0.5, 9.0, 0.5, 9.0, 0.4, 9.0, math.nan])
    progress = run_steps(run, Progress(), 8, training())
    assert (progress.best_step, progress.best_loss) == (6, 0.4)
    equal = run_steps(FakeRun(losses=[9.0, 0.5, 9.0, 0.5]), Progress(), 4, training())
    assert equal.best_step == 2


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_that_is_not_finite_is_never_the_best(loss):
    assert run_steps(FakeRun(losses=[loss] * 2), Progress(), 2, training()).best_step is None


def test_an_interruption_saves_the_step_and_leaves():
    run = FakeRun(interrupted_after=(3,))
    with pytest.raises(Interrupted):
        run_steps(run, Progress(), 5, training())
    assert run.calls[-4:] == ["step 3", "record", "save 3", "leave 3"]


def test_an_interruption_at_a_step_that_is_saved_anyway_saves_it_once():
    run = FakeRun(interrupted_after=(2,))
    with pytest.raises(Interrupted):
        run_steps(run, Progress(), 5, training())
    assert run.calls[-5:] == ["step 2", "validate", "record", "save 2", "leave 2"]


def test_an_interruption_at_the_last_step_lets_the_run_end():
    run = FakeRun(interrupted_after=(5,))
    assert run_steps(run, Progress(), 5, training()).step == 5
    assert run.calls[-1] == "save 5"


def test_one_bad_step_too_many_is_recorded_and_neither_validated_nor_saved():
    run = FakeRun(bad_steps=(2, 4))
    with pytest.raises(UserError, match="not finite"):
        run_steps(run, Progress(), 5, training(skip_nonfinite=1))
    assert run.calls[-3:] == ["step 4", "record", "stop"]
    assert "save 2" in run.calls, "one such step was allowed"


def test_bad_steps_are_counted_over_a_resumption():
    start = Progress(step=2, num_skipped=1)
    with pytest.raises(UserError, match="not finite"):
        run_steps(FakeRun(bad_steps=(3,)), start, 5, training(skip_nonfinite=1))


def test_accuracy_is_measured_as_often_as_asked_and_at_every_step_that_is_saved():
    run = FakeRun(accuracies=[0.1] * 5)
    run_steps(run, Progress(), 5, training(checkpoint_every=4, evaluate_every=2))
    steps = [i for i, call in enumerate(run.calls) if call.startswith("step")]
    parts = [run.calls[a:b] for a, b in zip(steps, [*steps[1:], None], strict=True)]
    assert ["evaluate" in part for part in parts] == [False, True, False, True, True]
    none = FakeRun()
    run_steps(none, Progress(), 5, training())
    assert "evaluate" not in none.calls


def test_where_accuracy_chooses_the_best_is_the_first_that_answers_most_among_the_saved():
    losses, accuracies = [9.0, 1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0], [0.9, 0.5, 0.9, 0.7] * 2
    run = FakeRun(losses=losses, accuracies=accuracies)
    by_accuracy = training(evaluate_every=1, select_best="accuracy")
    progress = run_steps(run, Progress(), 8, by_accuracy)
    assert (progress.best_step, progress.best_accuracy, progress.best_loss) == (4, 0.7, 2.0)
    run = FakeRun(losses=losses, accuracies=accuracies)
    progress = run_steps(run, Progress(), 8, training(evaluate_every=1))
    assert (progress.best_step, progress.best_loss, progress.best_accuracy) == (2, 1.0, None)


def test_a_resumed_run_goes_on_choosing_by_accuracy():
    start = Progress(step=4, best_step=4, best_loss=2.0, best_accuracy=0.7)
    run = FakeRun(losses=[1.0] * 8, accuracies=[0.6] * 8)
    progress = run_steps(run, start, 8, training(evaluate_every=2, select_best="accuracy"))
    assert (progress.best_step, progress.best_accuracy) == (4, 0.7)
