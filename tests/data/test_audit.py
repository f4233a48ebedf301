"""The audit's numbers are those of the batches that training reads; its findings are those of the
text.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import build_tokenizer, good_rows, write_jsonl
from rich.console import Console
from tiny import layout_of
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from kd.audit.audit_tables import print_audit, print_previews
from kd.audit.counts import MAX_BINS, LengthSummary, measure_lengths
from kd.audit.data_audit import Audit, audit_data
from kd.audit.findings import Found, find_in_traces, states
from kd.audit.preview import FATES, Preview, Span, preview
from kd.constants import IGNORE_INDEX
from kd.data.dataset import Data, Examples, load_data
from kd.data.loader import Loader
from kd.data.regions import NUM_POSITIONS
from kd.data.step_plan import BatchShape
from kd.data.truncate import SECTIONS
from kd.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
RECIPES = [
    {"truncation": {"keep_fraction": 0.5}},
    {
        "truncation": {"keep_fraction": 0.4, "window": "tail"},
        "data": {"loss_sections": ["prompt", "answer"]},
    },
    {"truncation": {"keep_fraction": 0.5, "window": "middle", "window_context": "keep"}},
    {"truncation": {"cut_after_think": True, "max_tokens": 30}, "data": {"loss_sections": ["cot"]}},
    {"truncation": {"keep_fraction": 0.8, "window": "tail"}, "data": {"random_mask_fraction": 0.3}},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and texts that decode to themselves."""
    built = build_tokenizer()
    built.backend_tokenizer.decoder = decoders.Fuse()
    return built


def audit(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> tuple[Audit, Data]:
    data = load_data(recipe, tokenizer)
    return audit_data(recipe, data, tokenizer), data


def printed(write: Callable[[Console], None], **settings: Any) -> str:
    console = Console(file=StringIO(), width=100, highlight=False, **settings)
    write(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("sections", RECIPES, ids=str)
def test_tokens_are_those_of_the_loaders_batches_and_of_the_data_report(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, sections: dict[str, Any]
) -> None:
    audited, data = audit(
        recipe(**{name: dict(values) for name, values in sections.items()}), tokenizer
    )
    loader = Loader(data.train, BatchShape(4, 2), seed=0, pad_token_id=0)
    batches = [
        batch
        for step in range(loader.steps_per_epoch)
        for batch in loader.micro_batches(step, layout_of(0, 1))
    ]
    assert sum(len(batch.places) for batch in batches) == len(data.train) == 20
    total, report = audited.tokens["total"], data.report.train
    assert (
        total.num_input_tokens
        == report.num_input_tokens
        == sum(batch.num_input_tokens for batch in batches)
    )
    assert (
        total.num_supervised_tokens
        == report.num_supervised_tokens
        == sum(batch.num_supervised_tokens for batch in batches)
    )
    assert total.num_full_tokens == report.num_full_tokens
    cells = np.concatenate([batch.region_index for batch in batches])
    supervised = np.bincount(cells // NUM_POSITIONS, minlength=3).tolist()
    assert [audited.tokens[name].num_supervised_tokens for name in SECTIONS] == supervised
    kept = np.zeros(3, dtype=int)
    for example in (data.train[i] for i in range(20)):
        sections_read = np.repeat(range(3), example.num_tokens_3)[example.read_start :][
            : len(example.input_ids)
        ]
        kept += np.bincount(sections_read, minlength=3)
    assert [audited.tokens[name].num_input_tokens for name in SECTIONS] == kept.tolist()
    for name, whole in zip(SECTIONS, data.train.num_tokens_N3.sum(axis=0).tolist(), strict=True):
        counts = audited.tokens[name]
        assert (
            counts.num_input_tokens + counts.num_dropped_tokens == counts.num_full_tokens == whole
        )
        assert counts.kept_fraction == counts.num_input_tokens / whole
        assert counts.supervised_fraction == counts.num_supervised_tokens / max(
            counts.num_input_tokens, 1
        )


def test_the_share_of_a_section_of_which_nothing_is_kept_is_zero(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = audit(recipe(truncation={"keep_fraction": 0.3}), tokenizer)[0].tokens["answer"]
    assert (answer.num_input_tokens, answer.kept_fraction, answer.supervised_fraction) == (
        0,
        0.0,
        0.0,
    )


@pytest.mark.parametrize("longest", [3, 11, 12, 13, 599, 600, 32768])
def test_every_length_is_in_its_bin(recipe: MakeRecipe, longest: int) -> None:
    length_N = np.linspace(3, longest, 40).astype(np.int64)
    counts_N3 = np.stack([np.ones_like(length_N), length_N - 2, np.ones_like(length_N)], axis=1)
    examples = Examples(
        recipe(truncation={"keep_fraction": 0.5}),
        table=None,
        row_N=np.arange(40),
        num_tokens_N3=counts_N3,
    )
    lengths = measure_lengths(examples)
    bins = list(pairwise(lengths.edges))
    assert 1 <= len(bins) <= MAX_BINS
    assert len({stop - start for start, stop in bins}) == 1
    kept_N = np.maximum(length_N // 2, 1)
    assert lengths.whole_histogram == tuple(sum(a <= n < b for n in length_N) for a, b in bins)
    assert lengths.kept_histogram == tuple(sum(a <= n < b for n in kept_N) for a, b in bins)
    assert sum(lengths.whole_histogram) == sum(lengths.kept_histogram) == 40


def test_lengths_are_summarised_by_mean_median_95th_percentile_and_maximum(
    recipe: MakeRecipe,
) -> None:
    counts_N3 = np.stack([np.full(101, 4), np.arange(101) ** 2, np.full(101, 6)], axis=1)
    examples = Examples(
        recipe(truncation={"max_tokens": 50}),
        table=None,
        row_N=np.arange(101),
        num_tokens_N3=counts_N3,
    )
    lengths = measure_lengths(examples)
    assert lengths.whole == LengthSummary(mean=3360.0, median=2510.0, p95=9035.0, max=10010)
    assert (lengths.kept.median, lengths.kept.p95, lengths.kept.max) == (50, 50, 50)
    assert lengths.kept.mean == pytest.approx((10 + 11 + 14 + 19 + 26 + 35 + 46 + 94 * 50) / 101)


def one_row(tmp_path: Path, **row: str) -> None:
    write_jsonl(
        tmp_path / "rows.jsonl", [{"prompt": "1+1?", "reasoning": "So 2.", "answer": "2"} | row]
    )


@pytest.mark.parametrize("window", ["head", "tail"])
def test_the_close_marker_is_lost_exactly_where_the_kept_text_lacks_it(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, window: str
) -> None:
    one_row(tmp_path)
    whole = load_data(recipe(), tokenizer).train[0].input_ids
    marker = int(np.flatnonzero(whole == tokenizer.get_vocab()["</think>"])[0])
    for num_kept in range(2, len(whole) + 1):
        made = recipe(truncation={"window": window, "max_tokens": num_kept})
        found = audit(made, tokenizer)[0].found["close_marker_dropped"]
        holds = num_kept > marker if window == "head" else num_kept >= len(whole) - marker
        assert found.num_examples == (not holds), num_kept
        assert found.first_rows == (() if holds else (1,))


def test_a_marker_that_is_read_as_context_is_not_lost(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    one_row(tmp_path)
    truncation = {"window": "tail", "max_tokens": 2, "window_context": "keep"}
    assert (
        audit(recipe(truncation=truncation), tokenizer)[0]
        .found["close_marker_dropped"]
        .num_examples
        == 0
    )


FILLER = "wait, " * 12
ANSWERS = [  # at keep_fraction = 0.5: dropped, not in cot, not boxed
    ({"reasoning": "so 42. " + FILLER, "answer": r"It is \boxed{42}."}, (0, 0, 0)),
    ({"reasoning": FILLER + "so 42.", "answer": r"It is \boxed{42}."}, (1, 0, 0)),
    ({"reasoning": FILLER, "answer": r"It is \boxed{42}."}, (1, 1, 0)),
    ({"reasoning": "so 142 or 4.42 " + FILLER, "answer": "42"}, (1, 1, 1)),
    ({"reasoning": "(42) " + FILLER, "answer": "42"}, (0, 0, 1)),
    (
        {"reasoning": r"so \frac{1}{2} " + FILLER, "answer": r"\boxed{3} no: \boxed{\frac{1}{2}}"},
        (0, 0, 0),
    ),
    ({"prompt": "Is it 42?", "reasoning": FILLER, "answer": "42"}, (1, 1, 1)),
]


def test_answers_are_read_as_evaluation_reads_them_and_searched_behind_the_prompt(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "1?", **row} for row, _ in ANSWERS])
    audited, _ = audit(recipe(truncation={"keep_fraction": 0.5}), tokenizer)
    names = ("answer_dropped", "answer_not_in_cot", "answer_not_boxed")
    for name, flags in zip(names, zip(*(flags for _, flags in ANSWERS), strict=True), strict=True):
        rows = tuple(1 + i for i, flag in enumerate(flags) if flag)
        assert (audited.found[name].num_examples, audited.found[name].first_rows) == (
            len(rows),
            rows[:5],
        ), name
    assert audited.found["answer_not_found"].num_examples == 0


def test_an_answer_between_markers_of_its_own_is_read_without_them(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    one_row(tmp_path)
    audited, _ = audit(recipe(data={"answer_open": "<<\n", "answer_close": "\n>>"}), tokenizer)
    assert [
        audited.found[name].num_examples for name in ("answer_not_in_cot", "answer_not_found")
    ] == [0, 0]


def test_rows_are_named_by_their_number_in_the_file_lowest_first(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast
) -> None:
    audited, data = audit(
        recipe(data={"num_validation": 5}, truncation={"keep_fraction": 0.3}), tokenizer
    )
    found = audited.found["close_marker_dropped"]
    assert found.num_examples == len(data.train) == 15
    assert found.first_rows == tuple(sorted(1 + data.train.row_N)[:5])


def test_more_examples_than_a_batch_are_all_looked_at(
    recipe: MakeRecipe,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fillers = [FILLER * (1 + i // 4) for i in range(20)]
    reasonings = [
        filler + "so 42." if i % 2 else "so 42. " + filler for i, filler in enumerate(fillers)
    ]
    rows = [{"prompt": f"{i}?", "reasoning": reasonings[i], "answer": "42"} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    train = load_data(recipe(truncation={"keep_fraction": 0.5}), tokenizer).train
    expected = find_in_traces(train, tokenizer)
    assert expected["answer_dropped"] == Found(10, first_rows=(2, 4, 6, 8, 10))
    monkeypatch.setattr("kd.audit.findings.BATCH_SIZE", 3)
    assert find_in_traces(train, tokenizer) == expected


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        pytest.param("qwen3", marks=pytest.mark.slow),
        pytest.param("deepseek", marks=pytest.mark.slow),
    ],
)
def test_what_ends_behind_the_thought_keeps_the_marker_that_closes_it(
    recipe: MakeRecipe, tmp_path: Path, request: pytest.FixtureRequest, name: str
) -> None:
    one_row(tmp_path, reasoning="So it is 2.", answer=r"\boxed{2}")
    found = audit(recipe(truncation={"cut_after_think": True}), request.getfixturevalue(name))[
        0
    ].found
    assert [of.num_examples for of in found.values()] == [0] * 5


def test_without_a_close_marker_no_answer_is_found(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = audit(recipe(data={"think_close": "\n"}), tokenizer)[0].found
    counts = {name: of.num_examples for name, of in found.items() if of.num_examples}
    assert counts == {"answer_not_found": 20}


@pytest.mark.parametrize(
    ("text", "answer", "stated"),
    [
        ("so 7.", "7", True),
        ("x=7;", "7", True),
        ("1, 7", "7", True),
        ("17", "7", False),
        ("71", "7", False),
        ("0.7", "7", False),
        ("7.5", "7", False),
        ("7,000", "7", False),
        ("17 and 7", "7", True),
        ("7*x7", "x", False),
        ("2\\pi", "\\pi", True),
        ("\\pir", "\\pi", False),
        ("(a+b)c", "(a+b)", True),
        ("", "7", False),
    ],
)
def test_a_word_or_number_is_stated_by_itself_and_not_by_a_longer_one(
    text: str, answer: str, stated: bool
) -> None:
    assert states(text, answer) is stated


@pytest.mark.parametrize("sections", RECIPES, ids=str)
def test_a_preview_is_the_whole_trace_with_the_labels_of_training(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, sections: dict[str, Any]
) -> None:
    train = load_data(
        recipe(**{name: dict(values) for name, values in sections.items()}), tokenizer
    ).train
    for i in range(3):
        example, shown = train[i], preview(train, i, tokenizer)
        row = good_rows(20)[example.row]
        assert shown.row == example.row + 1
        assert "".join(span.text for span in shown.spans) == (
            f"<|user|>{row['prompt']}<eos><|assistant|><think>\n{row['reasoning'].strip()}\n</think>\n\n"
            f"{row['answer']}<eos>"
        )
        fates = "".join(span.fate[0] * span.num_tokens for span in shown.spans)
        read = "".join("c" if label == IGNORE_INDEX else "s" for label in example.labels)
        behind = int(example.num_tokens_3.sum()) - example.read_start - len(read)
        assert fates == "d" * example.read_start + read + "d" * behind
        named = [span.section for span in shown.spans for _ in range(span.num_tokens)]
        assert named == np.repeat(SECTIONS, example.num_tokens_3).tolist()
        assert all((a.section, a.fate) != (b.section, b.fate) for a, b in pairwise(shown.spans))


def test_without_colour_each_span_is_named_and_with_colour_the_words_are_the_same() -> None:
    shown = Preview(3, tuple(Span("cot", fate, 2, f"[red]{fate}!") for fate in FATES))
    plain = printed(lambda console: print_previews(console, [shown]))
    assert "row 3: 2 supervised, 2 context, 2 dropped" in plain
    for fate in FATES:
        assert f"cot 2 {fate} [red]{fate}!" in " ".join(plain.split())
    coloured = printed(
        lambda console: print_previews(console, [shown]),
        force_terminal=True,
        color_system="standard",
    )
    assert "\x1b[" in coloured
    assert "\x1b[" not in plain


def test_texts_cannot_write_to_the_terminal_and_long_ones_lose_their_middle() -> None:
    spans = (
        Span("prompt", "context", 4, "\x1b[2J\na\\b"),
        Span("cot", "supervised", 900, "A" * 500 + "B" * 500),
    )
    plain = printed(lambda console: print_previews(console, [Preview(1, spans)]))
    assert "\\x1b[2J\\na\\b" in plain
    assert "\x1b" not in plain
    assert (plain.count("A") - plain.count("ABC"), plain.count("B")) == (200, 200)
    assert "[... 600 characters ...]" in " ".join(plain.split())


def test_of_many_spans_the_middle_is_counted() -> None:
    spans = tuple(Span("cot", FATES[1 + i % 2], 3, f"<{i}>") for i in range(40))
    plain = printed(lambda console: print_previews(console, [Preview(1, spans)]))
    assert [f"<{i}>" in plain for i in range(40)] == [i < 8 or i >= 32 for i in range(40)]
    assert "... 72 24 spans not shown" in " ".join(plain.split())


def test_what_is_printed_and_written_are_the_counts_and_the_filters(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bad = [{"prompt": "1?", "reasoning": "", "answer": "1"}] * 2 + [
        {"prompt": "1?", "reasoning": "1" * 300, "answer": "1"}
    ]
    no_label = [{"prompt": "1+" * 60, "reasoning": "1", "answer": "1"}]
    write_jsonl(tmp_path / "rows.jsonl", [*good_rows(20), *bad, *no_label])
    made = recipe(
        truncation={"keep_fraction": 0.5, "max_full_tokens": 200}, data={"loss_sections": ["cot"]}
    )
    audited, data = audit(made, tokenizer)
    content = json.loads(json.dumps(audited.to_json(), allow_nan=False))
    assert content["truncation"]["keep_fraction"] == 0.5
    assert content["report"]["files"][0]["read"]["bad_rows"] == {"empty reasoning": 2}
    assert content["report"]["files"][0]["num_too_long"] == 1
    assert content["report"]["train"]["num_without_label"] == 1
    assert (
        content["tokens"]["total"]["num_supervised_tokens"]
        == data.report.train.num_supervised_tokens
    )
    assert content["found"]["close_marker_dropped"]["num_examples"] == 20
    assert sum(content["lengths"]["kept_histogram"]) == 20
    plain = " ".join(printed(lambda console: print_audit(console, audited)).split())
    cot = audited.tokens["cot"]
    assert (
        f"cot {cot.num_full_tokens} {cot.num_input_tokens} {cot.kept_fraction:.3f} "
        f"{cot.num_dropped_tokens} {cot.num_supervised_tokens}" in plain
    )
    for text in (
        "dropped 2: empty reasoning",
        "dropped 1: longer than truncation.max_full_tokens = 200",
        str(data.report.train),
        "are dropped: no supervised token 1 0.048",
        "lose the marker that closes the thought 20 1.000 1, 2, 3, 4, 5",
        "loss_sections = ['cot']",
    ):
        assert text in plain


def test_bars_are_in_proportion_and_what_is_there_is_seen(
    recipe: MakeRecipe, tokenizer: PreTrainedTokenizerFast
) -> None:
    audited, _ = audit(recipe(), tokenizer)
    histogram = (900, 1, 0, 450)
    lengths = replace(
        audited.lengths,
        edges=(0, 10, 20, 30, 40),
        whole_histogram=histogram,
        kept_histogram=histogram,
    )
    plain = printed(lambda console: print_audit(console, replace(audited, lengths=lengths)))
    bars = {
        bin: line.count("#")
        for line in plain.splitlines()
        for bin in re.findall(r"^ *(\d+-\d+) ", line)
    }
    assert bars == {"0-9": 36, "10-19": 2, "20-29": 0, "30-39": 18}
