"""An audit as tables for a terminal or a log: fates are words, and colours only repeat them."""

from collections.abc import Sequence
from itertools import pairwise

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kd.audit.counts import TokenCounts, TraceLengths
from kd.audit.data_audit import Audit
from kd.audit.preview import Preview, Span
from kd.recipe import Recipe

FOUND_LABELS = {
    "close_marker_dropped": "lose the marker that closes the thought",
    "answer_dropped": "lose every statement of their answer",
    "answer_not_in_cot": "never state it in their whole cot",
    "answer_not_boxed": "have an answer without \\boxed{}",
    "answer_not_found": "have no answer after a close marker",
}
STYLES = {"supervised": "green", "context": "yellow", "dropped": "red"}
LEGEND = {
    "supervised": "read and learned from",
    "context": "read but not learned from: first token, other section, masked, or before the "
    "window",
    "dropped": "never read",
}
BAR_WIDTH = 18
MAX_CHARACTERS = 400
MAX_SPANS = 16


def print_audit(console: Console, audit: Audit) -> None:
    console.print(Text(f"{_settings(audit.recipe)}\n{audit.report}\n"), soft_wrap=True)
    console.print(_token_table(audit.tokens))
    console.print(_example_table(audit))
    console.print(_summary_table(audit.lengths))
    console.print(_histogram(audit.lengths))


def print_previews(console: Console, previews: Sequence[Preview]) -> None:
    """Each trace as a table of its spans; of long texts and lists the middle is only counted."""
    for fate, meaning in LEGEND.items():
        console.print(Text(f"{fate:10}  {meaning}", style=STYLES[fate]), soft_wrap=True)
    for preview in previews:
        console.print(_span_table(preview))


def _settings(recipe: Recipe) -> str:
    settings = recipe.truncation.model_dump(exclude_none=True)
    settings |= recipe.data.model_dump(
        mode="json", include={"loss_sections", "random_mask_fraction"}
    )
    return f"{recipe.run.name}: " + ", ".join(f"{key} = {value}" for key, value in settings.items())


def _token_table(tokens: dict[str, TokenCounts]) -> Table:
    columns = ("section", "whole", "kept", "of whole", "dropped", "supervised", "of kept")
    table = _table("Training tokens: template in prompt, markers in cot, end in answer", *columns)
    for name, counts in tokens.items():
        table.add_row(
            name,
            str(counts.num_full_tokens),
            *(str(counts.num_input_tokens), f"{counts.kept_fraction:.3f}"),
            str(counts.num_dropped_tokens),
            *(str(counts.num_supervised_tokens), f"{counts.supervised_fraction:.3f}"),
        )
    return table


def _example_table(audit: Audit) -> Table:
    train = audit.report.train
    table = _table("Training examples that", "", "examples", "share", "first rows")
    for name, found in audit.found.items():
        rows = ", ".join(map(str, found.first_rows))
        table.add_row(
            FOUND_LABELS[name], *_with_share(found.num_examples, train.num_examples), rows
        )
    num_drawn = train.num_examples + train.num_without_label
    table.add_row(
        "are dropped: no supervised token", *_with_share(train.num_without_label, num_drawn)
    )
    return table


def _with_share(count: int, of: int) -> tuple[str, str]:
    return str(count), f"{count / of:.3f}"


def _summary_table(lengths: TraceLengths) -> Table:
    table = _table("Tokens per trace", "", "mean", "median", "p95", "max")
    for name, summary in (("whole", lengths.whole), ("kept", lengths.kept)):
        table.add_row(
            name,
            f"{summary.mean:.1f}",
            f"{summary.median:.1f}",
            f"{summary.p95:.1f}",
            str(summary.max),
        )
    return table


def _histogram(lengths: TraceLengths) -> Table:
    table = _table("Traces by length", "tokens", "whole", "", "kept", "")
    table.columns[2].justify = table.columns[4].justify = "left"
    most = max(lengths.whole_histogram + lengths.kept_histogram)
    bins = zip(
        pairwise(lengths.edges), lengths.whole_histogram, lengths.kept_histogram, strict=True
    )
    for (start, stop), whole, kept in bins:
        table.add_row(
            f"{start}-{stop - 1}", str(whole), _bar(whole, most), str(kept), _bar(kept, most)
        )
    return table


def _bar(count: int, most: int) -> str:
    return "#" * -(-BAR_WIDTH * count // most)  # rounded up: what is there is seen


def _span_table(preview: Preview) -> Table:
    spans = preview.spans
    counts = {fate: sum(span.num_tokens for span in spans if span.fate == fate) for fate in STYLES}
    title = f"row {preview.row}: " + ", ".join(f"{count} {fate}" for fate, count in counts.items())
    table = _table(title, "section", "tokens", "fate", "text")
    table.columns[2].justify = table.columns[3].justify = "left"
    table.columns[3].overflow = "fold"
    lines = [_span_line(span) for span in spans]
    if len(spans) > MAX_SPANS:
        half = MAX_SPANS // 2
        hidden = spans[half:-half]
        num_tokens = sum(span.num_tokens for span in hidden)
        lines[half:-half] = [("...", str(num_tokens), "", Text(f"{len(hidden)} spans not shown"))]
    for line in lines:
        table.add_row(*line)
    return table


def _span_line(span: Span) -> tuple[str, str, str, Text]:
    return (
        span.section,
        str(span.num_tokens),
        span.fate,
        Text(_shorten(span.text), style=STYLES[span.fate]),
    )


def _shorten(text: str) -> str:
    """One line as a terminal shows it: control characters escaped, a long middle counted."""
    half = MAX_CHARACTERS // 2
    if len(text) > MAX_CHARACTERS:
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _table(title: str, first: str, *others: str) -> Table:
    """The first column is for words, the others for numbers."""
    table = Table(first, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in others:
        table.add_column(name, justify="right")
    return table
