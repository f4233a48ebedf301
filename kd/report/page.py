"""What the report says, from top to bottom, and in which words."""

from collections.abc import Sequence

from kd.report import plots, report_tables
from kd.report.blocks import Block, Entry, PageSection, Plot, by_name
from kd.report.compare import Family
from kd.report.read_runs import Run, RunsRead, Variant

READING = (
    "Runs are compared where teacher, student and data are the same, and finished runs alone are "
    "compared and drawn. A number leads to the file that it came from; a number of several runs "
    "has small links beside it, where s0 is the run of seed 0. After a / stand the runs of the "
    "whole sequences that it is divided by."
)
KNEE = (
    "The knee of a curve is its cheapest length (by FLOPs; by tokens read where FLOPs are not "
    "recorded) that is level with whole sequences: the upper bound of its 95 % interval is at "
    "least the lower bound of theirs, both pooled over seeds. Level is not equal: with few "
    "problems intervals are wide, and easily reached."
)
ACCURACY = (
    "Intervals are Wilson's, at 95 %, of the problems of all seeds pooled: they treat seeds' "
    "problems as independent, and are too narrow where seeds answer the same problems; several "
    "samples of a problem count for as many as the interval of their own evaluation says. Kept is "
    "the accuracy divided by that of the runs with keep_fraction = 1 and all else equal; it is as "
    "uncertain as both."
)
WINDOWS = "With keep_fraction = 1 every window is the whole sequence."
COSTS = (
    "Means over seeds; in brackets relative to the runs with keep_fraction = 1 and all else equal. "
    "Training time is the sum of step_ms: batches, forward, backward and optimizer of every step, "
    "on the hardware below; loading of models, validation, checkpoints, export and evaluation are "
    "not in it. Peak memory is rank 0's: of its GPU, or on a CPU of the whole process, Python and "
    "libraries included. FLOPs and tokens are sums over all steps and ranks."
)
CACHES = (
    "The teacher ran once, over whole traces, and these runs read what it said. FLOPs of all are "
    "those of the one pass and of the runs; beside them what the runs would have taken with a "
    "teacher in each, by the same formula, and from how many such runs on the pass is repaid."
)
CURVES = (
    "Losses of different lengths are means over different tokens: each curve tells whether its own "
    "run has converged, and not which run is better. The divergence from the teacher is told by "
    "position in the whole, untruncated trace, at the end of training; it ends where no token is "
    "supervised."
)
DIFFERENCES = (
    "Warning: these runs are compared, and differ in more than length, window, loss sections and "
    "seed, which may explain what is put down to those:"
)


def sections(families: Sequence[Family], found: RunsRead) -> list[PageSection]:
    parts = [section for family in families for section in _family(family)]
    environments = PageSection(
        2, "Hardware, versions, commits", [report_tables.environments(found.runs)]
    )
    return [_what_was_read(families, found), *parts, environments]


def _what_was_read(families: Sequence[Family], found: RunsRead) -> PageSection:
    runs, cells, damaged = found
    num_finished = sum(run.is_finished for run in runs)
    counts = (
        f"Runs: {len(runs)}, finished: {num_finished}, pairs of models and data: {len(families)}. "
    )
    blocks: list[Block] = [
        Entry(counts + READING),
        *[Entry(note) for run in runs for note in run.notes],
    ]
    left_out = report_tables.not_compared(runs, cells)
    if left_out:
        blocks += [Entry("Not compared:"), left_out]
    if damaged:
        blocks += [Entry("Left out, for a file is damaged:"), report_tables.left_out(damaged)]
    return PageSection(2, "What was read", blocks)


def _family(family: Family) -> list[PageSection]:
    head = PageSection(2, f"{family.pair.teacher} -> {family.pair.student}", _head(family))
    curves = _drawn_together(family)
    by_task = [section for task in family.tasks for section in _task(family, task, curves)]
    return [head, *by_task, _costs(family, curves), _curves(family, curves)]


def _head(family: Family) -> list[Block]:
    """What is compared, what is missing, what differs and should not, and the knees."""
    blocks: list[Block] = [Entry(f"Data: {family.pair.data}")]
    without_full = [
        str(variant)
        for variant in family.variants
        if family.full_of(family.curve(variant)[0]) is None
    ]
    unscored = [run for run in family.runs if not run.scores]
    if without_full:
        blocks.append(
            Entry(f"No full run to compare with (keep_fraction = 1): {'; '.join(without_full)}")
        )
    if unscored:
        text = (
            "Finished, but without an evaluation of the exported student, which launch/evaluate.py "
            "makes."
        )
        blocks.append(Entry(text, by_name(unscored)))
    if family.differences:
        blocks += [Entry(DIFFERENCES), report_tables.differences(family)]
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
        "Left: accuracy of all seeds pooled with its 95 % interval, and beside it a dot for each "
        "seed. Right: the same relative to whole sequences. Lines that would hide each other stand "
        "a little to the side."
    )
    tradeoff = (
        "Accuracy against the cost of training. The number at a point is keep_fraction, a ring "
        "marks the knee."
    )
    responses = "Responses that never close their thought, and the length of responses."
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
                "Cost relative to whole sequences; the grey line is cost in proportion to length."
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
            "Training loss, in means of at most 100 parts of a run; dots are validation. A line is "
            "a run."
        )
        blocks.append(Plot("losses", Entry(caption, links), plots.losses(family, variants)))
        if any(run.kl_curve for run in runs):
            where = (
                "the last validation"
                if all(run.kl_is_of_validation for run in runs)
                else "the last record"
            )
            caption = f"KL(teacher || student) by position, of {where}. A line is a run."
            blocks.append(
                Plot(
                    "kl_by_position", Entry(caption, links), plots.kl_by_position(family, variants)
                )
            )
        else:
            blocks.append(Entry("Divergence by position: not recorded.", links))
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
