"""What a reader wants to know first: which length keeps how much of the accuracy of whole
sequences, at which cost, and what qualifies the comparison.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kd.report.compare import Difference, Family, Knee, SeedGroup
from kd.report.plots import COST_NAMES
from kd.report.read_runs import Run, Variant

HALF = 0.5  # the answer is about the length nearest to it, whatever its result
LENGTH_NAMES = {0.25: "a quarter", 0.5: "half", 0.75: "three quarters"}
NO_FLOPS = "FLOPs are not recorded for every run, so costs are compared by the tokens read."
UNRECORDED = "a cost that is not recorded"
ONE_SEED = (
    "Each length has one evaluated seed: the intervals do not include what differs between seeds."
)
CACHED = (
    "These runs read a teacher's cache: the pass of the teacher that filled it is not in their "
    "costs."
)


@dataclass(frozen=True)
class Headline:
    """Of one task, or of a family without evaluations (task is None). cell is None where the text
    says what is missing for a comparison. runs and their differences are those of the text and of
    the curves drawn with it; is_text_affected: the runs of the text already differ.
    """

    task: str | None
    text: str
    notes: tuple[str, ...] = ()
    drawn: tuple[Variant, ...] = ()
    cell: SeedGroup | None = None
    full: SeedGroup | None = None
    knee: Knee | None = None
    runs: tuple[Run, ...] = ()
    differences: tuple[Difference, ...] = ()
    is_text_affected: bool = True


def headlines(family: Family) -> list[Headline]:
    """One for each task; one that says so where no run is evaluated."""
    if not family.tasks:
        return [_without_scores(family)]
    return [_answer(family, task) for task in family.tasks]


def _answer(family: Family, task: str) -> Headline:
    drawn = tuple(v for v in family.variants if _shorter(family, v, task))
    if not drawn:
        return Headline(task, _what_is_missing(family, task))
    curve = [cell for cell in family.curve(drawn[0]) if task in cell.scores]
    cell, full, knee = _shorter(family, drawn[0], task), curve[-1], family.knee(drawn[0], task)
    assert cell is not None
    assert knee is not None
    cells = {id(c): c for variant in drawn for c in family.curve(variant) if task in c.scores}
    runs = tuple(run for c in cells.values() for run in c.runs)
    return Headline(
        task,
        _sentence(family, task, cell, full, knee),
        (_what_is_compared(drawn[0], curve, task), *_notes(curve, task)),
        drawn,
        cell,
        full,
        knee,
        runs,
        tuple(family.differences_among({run.name for run in runs})),
        bool(family.differences_among({run.name for c in curve for run in c.runs})),
    )


def _shorter(family: Family, variant: Variant, task: str | None) -> SeedGroup | None:
    """Of the cells shorter than whole sequences the one whose length is nearest to a half; with a
    task, only cells whose accuracy kept is known.
    """
    cells = [
        cell
        for cell in family.curve(variant)
        if cell.keep_fraction < 1 and (task is None or family.kept(cell, task) is not None)
    ]
    return min(cells, key=lambda cell: abs(cell.keep_fraction - HALF), default=None)


def _sentence(family: Family, task: str, cell: SeedGroup, full: SeedGroup, knee: Knee) -> str:
    accuracies = (
        f"accuracy {cell.scores[task].accuracy:.3f} against {full.scores[task].accuracy:.3f}"
    )
    interval = _kept_interval(family, cell, task)
    within = f"95 % interval {interval}; {accuracies}" if interval else accuracies
    return (
        f"Training on {_length_name(cell)} (keep_fraction {cell.keep_fraction:g}) keeps "
        f"{_percent(family.kept(cell, task))} % of the accuracy of whole sequences ({within}) at "
        f"{_costs(family, cell, knee.cost)}; {_cheapest(family, task, cell, knee)}."
    )


def _cheapest(family: Family, task: str, cell: SeedGroup, knee: Knee) -> str:
    level = "the cheapest length that is level with whole sequences"
    if knee.cell is cell:
        return f"it is {level}"
    if knee.cell.keep_fraction == 1.0:
        return "no cheaper length is level with whole sequences"
    interval = _kept_interval(family, knee.cell, task)
    told = [f"{_percent(family.kept(knee.cell, task))} %", *([interval] if interval else [])]
    cost = _costs(family, knee.cell, knee.cost, with_time=False)
    return f"{level} is {knee.cell.keep_fraction:g} ({', '.join(told)}, at {cost})"


def _what_is_compared(variant: Variant, curve: Sequence[SeedGroup], task: str) -> str:
    sizes = {e.num_problems for cell in curve for e in cell.scores[task].evaluations}
    problems = f"{sizes.pop():,} problems" if len(sizes) == 1 else "problems"
    return (
        f"The sentence compares runs of {variant}, evaluated on {problems} of {task} with "
        f"{_seeds(curve, task)}."
    )


def _seeds(curve: Sequence[SeedGroup], task: str) -> str:
    numbers = [len(cell.scores[task].evaluations) for cell in curve]
    if len(set(numbers)) == 1:
        return f"{count(numbers[0], 'seed')} of each length"
    lengths = [
        f"{count(number, 'seed')} of {cell.keep_fraction:g}"
        for number, cell in zip(numbers, curve, strict=True)
    ]
    return ", ".join(lengths)


def _notes(curve: Sequence[SeedGroup], task: str) -> list[str]:
    notes = []
    single = [cell for cell in curve if len(cell.scores[task].evaluations) == 1]
    if len(single) == len(curve):
        notes.append(ONE_SEED)
    elif single:
        lengths = " and ".join(f"{cell.keep_fraction:g}" for cell in single)
        notes.append(
            f"keep_fraction {lengths} has only one evaluated seed: its interval does not include "
            "what differs between seeds."
        )
    if any(cell.costs.flops is None for cell in curve):
        notes.append(NO_FLOPS)
    if any(run.cache is not None for cell in curve for run in cell.runs):
        notes.append(CACHED)
    return notes


def _what_is_missing(family: Family, task: str) -> str:
    scored = [cell for cell in family.cells if task in cell.scores]
    full = [cell for cell in scored if cell.keep_fraction == 1.0]
    if len(full) == len(scored):
        accuracies = ", ".join(f"{cell.scores[task].accuracy:.3f}" for cell in full)
        return (
            f"On {task} only whole sequences are evaluated (keep_fraction 1, accuracy "
            f"{accuracies}). To see what a shorter length keeps, train and evaluate one with "
            "truncation.keep_fraction below 1."
        )
    if any(cell.scores[task].accuracy == 0 for cell in full):
        return (
            f"Whole sequences solve no problem of {task} (keep_fraction 1, accuracy 0.000), so "
            "there is no accuracy to keep. Train them longer, or evaluate easier problems."
        )
    return (
        f"What a shorter length keeps on {task} is not known: no evaluated run has whole sequences "
        "(keep_fraction 1) and the same loss sections. Train and evaluate one."
    )


def _without_scores(family: Family) -> Headline:
    text = (
        "What a length keeps is not known: no run is evaluated. Run launch/evaluate.py on the "
        "runs' export/best, and write this report again."
    )
    for variant in family.variants:
        cell = _shorter(family, variant, None)
        full = family.full_of(cell) if cell else None
        if cell and full:
            cost = family.measured_cost([cell, full])
            costs = _costs(family, cell, cost)
            if costs != UNRECORDED:
                text += (
                    f" Training on {_length_name(cell)} (keep_fraction {cell.keep_fraction:g}) "
                    f"takes {costs} of whole sequences."
                )
            runs = (*cell.runs, *full.runs)
            found = family.differences_among({run.name for run in runs})
            return Headline(None, text, runs=runs, differences=tuple(found))
    return Headline(None, text)


def _costs(family: Family, cell: SeedGroup, cost: str, with_time: bool = True) -> str:
    names = [cost, "training_s"] if with_time else [cost]
    ratios = {name: family.relative_cost(cell, name) for name in names}
    known = [f"{r:.2f} of the {COST_NAMES[name]}" for name, r in ratios.items() if r is not None]
    return " and ".join(known) or UNRECORDED


def _kept_interval(family: Family, cell: SeedGroup, task: str) -> str | None:
    """In percent: "94.2-97.3 %"."""
    interval = family.kept_interval(cell, task)
    return interval and f"{_percent(interval[0])}-{_percent(interval[1])} %"


def _length_name(cell: SeedGroup) -> str:
    name = LENGTH_NAMES.get(cell.keep_fraction, f"{100 * cell.keep_fraction:g} %")
    limit = cell.variant.max_tokens
    return f"{name} of each sequence" + (f", at most {limit} tokens" if limit else "")


def _percent(share: float | None) -> str:
    assert share is not None
    return f"{100 * share:.1f}"


def count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
