"""Runs side by side: seeds pooled into cells, and the cheapest level with whole sequences."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kd.report.evaluations import Evaluation
from kd.report.read_runs import NOT_RECORDED, ComparedPair, Costs, Run, Variant


class Score(NamedTuple):
    """Of the responses of all evaluations together. Shares are fractions."""

    num_correct: int
    num_responses: int
    accuracy: float
    ci95: tuple[float, float]
    unclosed_fraction: float
    mean_response_tokens: float
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True)
class SeedGroup:
    """The finished runs that differ by their seed only. costs are means over them."""

    keep_fraction: float
    variant: Variant
    runs: tuple[Run, ...]
    costs: Costs
    scores: dict[str, Score]


class Difference(NamedTuple):
    """A fact in which what is compared differs: each value, and the names of those that have it."""

    name: str
    values: dict[str, list[str]]


class Knee(NamedTuple):
    """The cheapest cell that is level with whole sequences, by that cost."""

    cell: SeedGroup
    cost: str


@dataclass(frozen=True)
class Family:
    """All finished runs of one pair of models on one data set."""

    pair: ComparedPair
    cells: tuple[SeedGroup, ...]  # by variant, then by keep_fraction
    # Task -> role and its score, the same score once
    references: dict[str, list[tuple[str, Score]]]
    differences: tuple[Difference, ...]

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells for run in cell.runs]

    @property
    def tasks(self) -> list[str]:
        return sorted({task for cell in self.cells for task in cell.scores})

    @property
    def variants(self) -> list[Variant]:
        return list(dict.fromkeys(cell.variant for cell in self.cells))

    def full_of(self, cell: SeedGroup) -> SeedGroup | None:
        """The cell of keep_fraction = 1 and all else equal, whatever its window."""
        return next((full for full in self.curve(cell.variant) if full.keep_fraction == 1.0), None)

    def curve(self, variant: Variant) -> list[SeedGroup]:
        """The cells of a variant by keep_fraction, with whole sequences of the head window."""
        whole = variant if variant.max_tokens else variant._replace(window="head")
        cells = [
            cell
            for cell in self.cells
            if cell.variant == variant or (cell.variant == whole and cell.keep_fraction == 1.0)
        ]
        return sorted(cells, key=lambda cell: cell.keep_fraction)

    def kept(self, cell: SeedGroup, task: str) -> float | None:
        """The cell's accuracy / that of whole sequences; None where there is no such accuracy, or
        it is 0.
        """
        full = self.full_of(cell)
        if full is None or task not in full.scores or task not in cell.scores:
            return None
        return _ratio(cell.scores[task].accuracy, full.scores[task].accuracy)

    def kept_interval(self, cell: SeedGroup, task: str) -> tuple[float, float] | None:
        """95 %, of kept(): it holds the uncertainty of both accuracies. None where kept() is None,
        of whole sequences themselves, and where theirs may be 0.
        """
        full = self.full_of(cell)
        if full is None or full is cell or self.kept(cell, task) is None:
            return None
        return _ratio_interval(cell.scores[task], full.scores[task])

    def relative_cost(self, cell: SeedGroup, cost: str) -> float | None:
        """A field of Costs, of the cell / of whole sequences; None where one is missing."""
        full = self.full_of(cell)
        return (
            None if full is None else _ratio(getattr(cell.costs, cost), getattr(full.costs, cost))
        )

    def measured_cost(self, cells: Iterable[SeedGroup]) -> str:
        """The field of Costs that they are compared by: FLOPs where all have them, else tokens
        read.
        """
        return "num_input_tokens" if any(cell.costs.flops is None for cell in cells) else "flops"

    def differences_among(self, names: Collection[str]) -> list[Difference]:
        """The differences that are left where only the runs of these names are compared."""
        found = []
        for name, values in self.differences:
            shared = {
                value: [m for m in members if m in names] for value, members in values.items()
            }
            shared = {value: members for value, members in shared.items() if members}
            # A seed that is counted twice is one value with two runs.
            is_repeated = len(values) == 1 and any(len(m) > 1 for m in shared.values())
            if len(shared) > 1 or is_repeated:
                found.append(Difference(name, shared))
        return found

    def knee(self, variant: Variant, task: str) -> Knee | None:
        """The cheapest cell of a curve whose 95 % interval's upper bound is at least the lower
        bound of full's.

        By measured_cost(). None without a score of full.
        """
        cells = [cell for cell in self.curve(variant) if task in cell.scores]
        full = next((cell for cell in cells if cell.keep_fraction == 1.0), None)
        if full is None:
            return None
        cost = self.measured_cost(cells)
        lowest = full.scores[task].ci95[0]
        level = [cell for cell in cells if cell.scores[task].ci95[1] >= lowest]
        return Knee(min(level, key=lambda cell: getattr(cell.costs, cost)), cost)


def compare(runs: Iterable[Run]) -> list[Family]:
    """The finished runs, by pair of models and data set."""
    by_pair: dict[ComparedPair, list[Run]] = defaultdict(list)
    for run in runs:
        if run.is_finished:
            by_pair[run.pair].append(run)
    return [_family(pair, members) for pair, members in sorted(by_pair.items())]


def pool(evaluations: Sequence[Evaluation]) -> Score:
    """One score of all their responses, with Wilson's interval as if the evaluations were
    independent of each other.
    """
    from kd.evaluate.score import wilson_interval  # it imports torch, which takes seconds

    num_correct = sum(evaluation.num_correct for evaluation in evaluations)
    num_responses = sum(evaluation.num_responses for evaluation in evaluations)
    size = sum(_effective_size(evaluation) for evaluation in evaluations)
    accuracy = num_correct / num_responses
    return Score(
        num_correct,
        num_responses,
        accuracy,
        wilson_interval(accuracy * size, size),
        sum(e.unclosed_fraction * e.num_responses for e in evaluations) / num_responses,
        sum(e.mean_response_tokens * e.num_responses for e in evaluations) / num_responses,
        tuple(evaluations),
    )


def _effective_size(evaluation: Evaluation) -> float:
    """As many independent responses as the evaluation's interval is worth.

    Samples of one problem are alike, and the evaluation's interval knows how much. A bound b of
    Wilson's interval of share p solves (b - p)^2 = z^2 b (1 - b) / size (Wilson 1927, eq. 4).
    """
    from kd.evaluate.score import Z_95

    if evaluation.num_samples == 1:
        return evaluation.num_problems
    low, high = evaluation.ci95
    bound = low if evaluation.accuracy > 0 else high
    return Z_95**2 * bound * (1 - bound) / (bound - evaluation.accuracy) ** 2


def _family(pair: ComparedPair, runs: list[Run]) -> Family:
    by_cell: dict[tuple[Variant, float], list[Run]] = defaultdict(list)
    for run in runs:
        by_cell[run.variant, run.keep_fraction].append(run)
    cells = [_cell(by_cell[key]) for key in sorted(by_cell, key=_order)]
    return Family(pair, tuple(cells), _references(runs), tuple(_all_differences(runs)))


def _order(key: tuple[Variant, float]) -> tuple[Any, ...]:
    """All sections first, the head window first, the student before adapters, short before long."""
    (sections, window, max_tokens, lora, rollouts), keep_fraction = key
    place = -sections.count("+"), sections, lora or "", rollouts or "", window != "head", window
    return *place, max_tokens or 0, keep_fraction


def _cell(runs: list[Run]) -> SeedGroup:
    runs = sorted(runs, key=lambda run: (run.seed, run.name))
    tasks = sorted({task for run in runs for task in run.scores})
    scores = {
        task: pool([run.scores[task] for run in runs if task in run.scores]) for task in tasks
    }
    costs = Costs._make(_mean(values) for values in zip(*[run.costs for run in runs], strict=True))
    return SeedGroup(runs[0].keep_fraction, runs[0].variant, tuple(runs), costs, scores)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _references(runs: list[Run]) -> dict[str, list[tuple[str, Score]]]:
    """Evaluations of one model with one result, in several folders, are one."""
    same: dict[tuple[str, str, str, int, int], dict[str, Evaluation]] = defaultdict(dict)
    for run in runs:
        for role, e in run.references:
            same[e.task, role, e.model, e.num_problems, e.num_correct][str(e.path)] = e
    found: dict[str, list[tuple[str, Score]]] = defaultdict(list)
    # Reversed: "teacher" before "student ...".
    for (task, role, *_), evaluations in sorted(same.items(), reverse=True):
        first, *others = evaluations.values()
        found[task].append((role, pool([first])._replace(evaluations=(first, *others))))
    return found


def _all_differences(runs: list[Run]) -> list[Difference]:
    """Between the runs, between their evaluations of each task, and runs that are there twice."""
    found = _differences([(run.name, run.facts) for run in runs])
    for task in sorted({task for run in runs for task in run.scores}):
        scored = [(run.name, run.scores[task].settings) for run in runs if task in run.scores]
        shared = {
            e.path: (e.label, e.settings)
            for run in runs
            for _, e in run.references
            if e.task == task
        }
        found += [
            d._replace(name=f"evaluation of {task}: {d.name}")
            for d in _differences([*scored, *shared.values()])
        ]
    return found + _repeated(runs)


def _differences(facts: Sequence[tuple[str, dict[str, str]]]) -> list[Difference]:
    found = []
    for key in sorted({key for _, values in facts for key in values}):
        names: dict[str, list[str]] = defaultdict(list)
        for name, values in facts:
            names[values.get(key, NOT_RECORDED)].append(name)
        if len(names) > 1:
            found.append(
                Difference(key, {value: sorted(set(names[value])) for value in sorted(names)})
            )
    return found


def _repeated(runs: list[Run]) -> list[Difference]:
    same: dict[tuple[Variant, float, int], list[str]] = defaultdict(list)
    for run in runs:
        same[run.variant, run.keep_fraction, run.seed].append(run.name)
    return [
        Difference(
            "one seed is counted more than once",
            {f"{variant}, keep_fraction {fraction:g}, seed {seed}": names},
        )
        for (variant, fraction, seed), names in same.items()
        if len(names) > 1
    ]


def _ratio(value: float | None, full: float | None) -> float | None:
    return None if value is None or not full else value / full


def _ratio_interval(score: Score, full: Score) -> tuple[float, float] | None:
    """Of score.accuracy / full.accuracy, from the intervals of both (MOVER-R: Donner and Zou 2012,
    section 3), which are taken as independent. None where full's lower bound is 0.
    """
    (p, (low, high)), (p_full, (low_full, high_full)) = (
        (of.accuracy, of.ci95) for of in (score, full)
    )
    if low_full == 0:
        return None
    product = p * p_full
    # Each bound is a root of a * r^2 - 2 * product * r + c = 0, written so that it exists for a = 0
    a, c = high_full * (2 * p_full - high_full), low * (2 * p - low)
    lower = c / (product + math.sqrt(max(product**2 - a * c, 0.0))) if p > 0 else 0.0
    a, c = low_full * (2 * p_full - low_full), high * (2 * p - high)
    return lower, (product + math.sqrt(max(product**2 - a * c, 0.0))) / a
