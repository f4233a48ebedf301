"""What the report says, from top to bottom, and in which words: first the answers."""

from collections.abc import Sequence

from kd.report import plots, report_tables
from kd.report.blocks import (
    Block,
    Entry,
    PageSection,
    Plot,
    Sources,
    by_name,
    metrics_of,
    scores_of,
)
from kd.report.compare import Family
from kd.report.headline import Headline, count, headlines
from kd.report.read_runs import Run, RunsRead, Variant

KEPT = (
    "Accuracy kept against the cost of training, both relative to whole sequences. The number at a "
    "point is its keep_fraction. A ring marks the cheapest length that is level with whole "
    "sequences."
)
READING = (
    "Runs are compared when they have the same teacher, student and data. Only finished runs are "
    "compared and drawn. The last column of a table links to the files that the numbers of the row "
    "come from: s0 is the run of seed 0. After a / come the files of the whole sequences that a "
    "ratio divides by."
)
KNEE = (
    "A length is level with whole sequences when the upper bound of its 95 % interval is at least "
    "the lower bound of theirs, with all seeds pooled. The knee of a curve is its cheapest level "
    "length, by FLOPs, or by tokens read where FLOPs are not recorded. Level does not mean equal: "
    "few problems make wide intervals, which overlap easily."
)
ACCURACY = (
    "Accuracy pools the problems of all seeds, and its interval is Wilson's at 95 %. The interval "
    "treats the problems of different seeds as independent, so it is too narrow when the seeds "
    "answer the same problems. Several samples of one problem count for as many as the interval of "
    "their own evaluation says. Kept is the accuracy divided by that of whole sequences "
    "(keep_fraction 1, all else equal); its 95 % interval (MOVER-R) combines the intervals of both."
)
WINDOWS = "With keep_fraction 1 every window is the whole sequence."
COSTS = (
    "Costs are means over seeds; the number in brackets is relative to whole sequences "
    "(keep_fraction 1, all else equal). Training time is the sum of step_ms: it includes batches, "
    "forward, backward and optimizer of every step, and excludes loading, validation, checkpoints, "
    "export and evaluation. The hardware is listed below. Peak memory is that of rank 0: on a GPU "
    "the GPU's, on a CPU that of the whole process with Python and its libraries. FLOPs and tokens "
    "are sums over all steps and ranks."
)
CACHES = (
    "The teacher ran once over whole traces, and these runs read its outputs from the cache. "
    '"FLOPs of all" adds this pass and the runs. "With a teacher in each" is what the runs would '
    'have cost without the cache, by the same formula. "Pays from" is the number of such runs from '
    "which the cache is cheaper."
)
CURVES = (
    "The losses of different lengths are means over different tokens. A curve therefore shows "
    "whether its own run has converged, and not which run is better. The divergence from the "
    "teacher is measured at the end of training, by position in the whole, untruncated trace. A "
    "line ends where no token is supervised."
)
DIFFERENCES = (
    "Warning: these runs differ in more than length, window, loss sections and seed. A difference "
    "between their results may come from these differences:"
)
# Of the warning next to an answer: differences whose values it names, and letters of a value
MAX_DIFFERENCES, MAX_VALUE = 3, 40


def answer_sections(families: Sequence[Family], found: RunsRead) -> list[PageSection]:
    """What a reader wants to know first, with what qualifies it: a section for each answer."""
    parts = [
        PageSection(2, _title(family, answer), _answer(family, answer))
        for family in families
        for answer in headlines(family)
    ]
    if not families:
        text = "No run is finished, so there is nothing to compare."
        parts.append(PageSection(2, "No comparison", [Entry(text, look="answer")]))
    parts[0].blocks.extend(_not_counted(found))
    return parts


def sections(families: Sequence[Family], found: RunsRead) -> list[PageSection]:
    titles = [
        f"Tables and curves: {_pair(family)}" if len(families) > 1 else "Tables and curves"
        for family in families
    ]
    parts = [
        section
        for family, title in zip(families, titles, strict=True)
        for section in _family(family, title)
    ]
    environments = PageSection(
        2, "Hardware, versions, commits", [report_tables.environments(found.runs)]
    )
    return [_what_was_read(families, found), *parts, environments]


def _what_was_read(families: Sequence[Family], found: RunsRead) -> PageSection:
    runs, cells, damaged = found
    num_finished = sum(run.is_finished for run in runs)
    counts = (
        f"Runs read: {len(runs)}, finished: {num_finished}. Combinations of teacher, student and "
        f"data: {len(families)}. "
    )
    blocks: list[Block] = [
        Entry(counts + READING),
        *[Entry(note) for run in runs for note in run.notes],
    ]
    left_out = report_tables.not_compared(runs, cells)
    if left_out:
        blocks += [Entry("Not compared:"), left_out]
    if damaged:
        blocks += [
            Entry("Left out because a file is damaged:", look="warning"),
            report_tables.left_out(damaged),
        ]
    return PageSection(2, "What was read", blocks)


def _answer(family: Family, answer: Headline) -> list[Block]:
    blocks: list[Block] = [_answer_entry(answer)]
    if answer.differences:
        blocks.append(Entry(_warning(answer), look="warning"))
    if answer.drawn and answer.task is not None:
        lines = answer.drawn[: plots.MAX_LINES]
        caption = Entry(KEPT, by_name(answer.runs))
        blocks.append(Plot("kept", caption, plots.kept(family, lines, answer.task)))
    notes = [f"Data: {family.pair.data}.", *answer.notes]
    if len(answer.drawn) > plots.MAX_LINES:
        notes.append(f"Curves that are not drawn here: {len(answer.drawn) - plots.MAX_LINES}.")
    return [*blocks, Entry(" ".join(notes), look="note")]


def _title(family: Family, answer: Headline) -> str:
    task = f": {answer.task}" if len(family.tasks) > 1 else ""
    return f"{_pair(family)}{task}"


def _pair(family: Family) -> str:
    return f"{family.pair.teacher} -> {family.pair.student}"


def _answer_entry(answer: Headline) -> Entry:
    if answer.cell is None or answer.full is None or answer.knee is None or answer.task is None:
        return Entry(answer.text, by_name(answer.runs, "metrics.jsonl"), look="answer")
    details = []
    shorter = {id(cell): cell for cell in (answer.cell, answer.knee.cell) if cell != answer.full}
    for cell in shorter.values():
        scores, whole = (scores_of(of, answer.task) for of in (cell, answer.full))
        length = f"keep_fraction {cell.keep_fraction:g}"
        details.append(Sources(f"accuracy of {length}", scores, whole))
        details.append(Sources(f"cost of {length}", metrics_of(cell), metrics_of(answer.full)))
    return Entry(answer.text, details=tuple(details), look="answer")


def _warning(answer: Headline) -> str:
    told = []
    for index, (name, values) in enumerate(answer.differences):
        parts = [
            f"{_shortened(value)} in {count(len(members), 'run')}"
            for value, members in values.items()
        ]
        told.append(f"{name} ({'; '.join(parts)})" if index < MAX_DIFFERENCES else name)
    whose = "these runs" if answer.is_text_affected else "the curves of this plot"
    text = (
        f"Warning: {whose} differ in more than length, window, loss sections and seed, which may "
        f"explain their results: {', '.join(told)}."
    )
    return text if answer.is_text_affected else f"{text} The runs of the sentence above do not."


def _shortened(value: str) -> str:
    return value if len(value) <= MAX_VALUE else f"{value[:MAX_VALUE]}..."


def _not_counted(found: RunsRead) -> list[Block]:
    """What the answers leave out, in one line; the sections below list it."""
    unfinished = sum(not run.is_finished for run in found.runs)
    unscored = sum(run.is_finished and not run.scores for run in found.runs)
    numbers = [
        count(len(found.damaged), "damaged run or file", "damaged runs or files"),
        count(unfinished, "unfinished run"),
        count(unscored, "run without an evaluation", "runs without an evaluation"),
        count(len(found.cells), "cell of a study without a run", "cells of studies without a run"),
    ]
    told = [text for text in numbers if not text.startswith("0 ")]
    if not told:
        return []
    text = f"Not counted are {', '.join(told)}; the sections below list them."
    if found.damaged:
        return [Entry(f"Warning: some results may be missing. {text}", look="warning")]
    return [Entry(text, look="note")]


def _family(family: Family, title: str) -> list[PageSection]:
    head = PageSection(2, title, _head(family))
    curves = _drawn_together(family)
    by_task = [section for task in family.tasks for section in _task(family, task, curves)]
    return [head, *by_task, _costs(family, curves), _curves(family, curves)]


def _head(family: Family) -> list[Block]:
    """The data, what is missing, what differs although it should not, and the knees."""
    blocks: list[Block] = [Entry(f"Data: {family.pair.data}")]
    without_full = [
        str(variant)
        for variant in family.variants
        if family.full_of(family.curve(variant)[0]) is None
    ]
    unscored = [run for run in family.runs if not run.scores]
    if without_full:
        blocks.append(
            Entry(
                "These curves have no whole sequences (keep_fraction 1) to compare with: "
                f"{'; '.join(without_full)}."
            )
        )
    if unscored:
        text = (
            f"Warning: {count(len(unscored), 'finished run')} without an evaluation of the "
            "exported student. Run launch/evaluate.py on export/best."
        )
        blocks.append(Entry(text, by_name(unscored), look="warning"))
    if family.differences:
        blocks += [Entry(DIFFERENCES, look="warning"), report_tables.differences(family)]
    knees = report_tables.knees(family)
    return [*blocks, Entry(KNEE), knees] if knees else blocks


def _task(family: Family, task: str, curves: list[list[Variant]]) -> list[PageSection]:
    blocks: list[Block] = [Entry(ACCURACY), report_tables.scores(family, task)]
    for variants in curves:
        blocks += _task_plots(family, variants, task)
    found = report_tables.by_sections(family, task)
    details = [
        PageSection(4, f"Loss sections compared, window: {window}", [table])
        for window, table in found
    ]
    found = report_tables.by_window(family, task)
    details += [
        PageSection(4, f"Windows compared, loss sections: {name}", [Entry(WINDOWS), table])
        for name, table in found
    ]
    return [PageSection(3, f"Accuracy: {task}", blocks), *details]


def _task_plots(family: Family, variants: list[Variant], task: str) -> list[Plot]:
    links = by_name(_runs_of(family, variants))
    accuracy = (
        "Left: accuracy of all seeds pooled with its 95 % interval, and next to it a dot for each "
        "seed. Right: the same accuracy relative to whole sequences. Lines that would hide each "
        "other are moved a little to the side."
    )
    tradeoff = (
        "Accuracy against the cost of training. The number at a point is its keep_fraction; a ring "
        "marks the knee."
    )
    responses = "Left: responses that never close their thought. Right: length of the responses."
    return [
        Plot("accuracy", Entry(accuracy, links), plots.accuracy(family, variants, task)),
        Plot("tradeoff", Entry(tradeoff, links), plots.tradeoff(family, variants, task)),
        Plot("responses", Entry(responses, links), plots.responses(family, variants, task)),
    ]


def _costs(family: Family, curves: list[list[Variant]]) -> PageSection:
    blocks: list[Block] = [Entry(COSTS), report_tables.costs(family)]
    for variants in curves:
        compared = [variant for variant in variants if family.full_of(family.curve(variant)[0])]
        if compared:
            caption = (
                "Cost relative to whole sequences. On the grey line, cost is proportional to "
                "length."
            )
            links = by_name(_runs_of(family, compared), "metrics.jsonl")
            blocks.append(Plot("costs", Entry(caption, links), plots.costs(family, compared)))
    if found := report_tables.caches(family):
        blocks += [Entry(CACHES), found]
    return PageSection(3, "Cost of training", blocks)


def _curves(family: Family, curves: list[list[Variant]]) -> PageSection:
    blocks: list[Block] = [Entry(CURVES)]
    for variants in curves:
        runs = _runs_of(family, variants)
        links = by_name(runs, "metrics.jsonl")
        caption = (
            "Training loss, averaged over at most 100 parts of a run. Each line is a run; dots are "
            "validation losses."
        )
        blocks.append(Plot("losses", Entry(caption, links), plots.losses(family, variants)))
        if any(run.kl_curve for run in runs):
            where = (
                "the last validation"
                if all(run.kl_is_of_validation for run in runs)
                else "the last record"
            )
            caption = f"KL(teacher || student) by position, at {where}. Each line is a run."
            blocks.append(
                Plot(
                    "kl_by_position", Entry(caption, links), plots.kl_by_position(family, variants)
                )
            )
        else:
            blocks.append(Entry("Divergence by position is not recorded.", links))
    return PageSection(3, "Loss, and divergence by position", blocks)


def _drawn_together(family: Family) -> list[list[Variant]]:
    """The variants of two lengths or more, or all, as many to a figure as have looks."""
    lines = [
        variant for variant in family.variants if len(family.curve(variant)) > 1
    ] or family.variants
    return [
        lines[start : start + plots.MAX_LINES] for start in range(0, len(lines), plots.MAX_LINES)
    ]


def _runs_of(family: Family, variants: Sequence[Variant]) -> list[Run]:
    """Of all curves, each once."""
    cells = {id(cell): cell for variant in variants for cell in family.curve(variant)}
    return [run for cell in cells.values() for run in cell.runs]
