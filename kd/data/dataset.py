"""A recipe's training and validation examples, truncated when read, and a report on every row.

The split is drawn over the rows that pass max_full_tokens, before truncation, so recipes that
differ only in truncation train and validate on the same rows.

Shapes: N examples, 3 sections (prompt, chain of thought, answer), W tokens read of a sequence.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from kd.data.account import DataReport, FileReport, SplitReport
from kd.data.sources import SOURCES
from kd.data.tokenised import tokenise_rows
from kd.data.trace_rows import find_rows
from kd.data.truncate import IntArray, Windows, count_supervised, make_labels, plan_windows
from kd.errors import NothingToLearn, UserError
from kd.recipe import Recipe, SourceTable


@dataclass(frozen=True)
class Example:
    """One truncated sequence of W tokens."""

    input_ids: IntArray  # int64 (W,)
    # int64 (W,), not shifted: the token itself where supervised, else IGNORE_INDEX
    labels: IntArray
    row: int  # of the file or hub dataset, counted from 0; of several sources, of all together
    num_tokens_3: IntArray  # of the full sequence, per section
    read_start: int  # of input_ids[0] in the full sequence
    source: int = 0  # which of data.sources
    # Of the whole sequence's tokens, by which a teacher's cache finds it
    key: bytes = b""


def key_of(token_ids: IntArray) -> bytes:
    """A hash of a whole sequence's tokens, 16 bytes."""
    return hashlib.blake2b(token_ids.astype("<i8").tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Examples:
    """N examples, read and truncated when asked for; arrays hold what needs no token."""

    recipe: Recipe
    table: datasets.Dataset  # of tokenise_rows, input_ids as numpy
    row_N: IntArray  # of `table`, and so of the file or hub dataset
    num_tokens_N3: IntArray  # of the full sequences, per section
    # Of each source in `table`
    first_row_S: IntArray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.row_N)

    def __getitem__(self, i: int) -> Example:
        row, windows, data = int(self.row_N[i]), self.windows, self.recipe.data
        input_ids = self.table[row]["input_ids"].astype(np.int64)
        window = int(windows.read_start_N[i]), int(windows.start_N[i]), int(windows.stop_N[i])
        labels = make_labels(
            input_ids,
            self.num_tokens_N3[i],
            window,
            data.loss_sections,
            data.random_mask_fraction,
            mask_seed=(self.recipe.run.seed, row),
        )
        return Example(
            input_ids[window[0] : window[2]],
            labels,
            row,
            self.num_tokens_N3[i],
            window[0],
            int(self.source_N[i]),
            key_of(input_ids),
        )

    def prompt_ids(self, i: int) -> IntArray:
        """Example i's whole prompt, whatever a truncation leaves of it."""
        tokens: IntArray = self.table[int(self.row_N[i])]["input_ids"].astype(np.int64)
        return tokens[: int(self.num_tokens_N3[i, 0])]

    def key(self, i: int) -> bytes:
        """Example i's, without its labels."""
        return key_of(self.table[int(self.row_N[i])]["input_ids"])

    def select(self, chosen: IntArray | npt.NDArray[np.bool_]) -> "Examples":
        """The examples at positions `chosen` (or where it is true), in that order."""
        return replace(self, row_N=self.row_N[chosen], num_tokens_N3=self.num_tokens_N3[chosen])

    @property
    def num_sources(self) -> int:
        return len(self.first_row_S)

    @cached_property
    def source_N(self) -> IntArray:
        """Which of data.sources each example is from: int64 (N,)."""
        found: IntArray = np.searchsorted(self.first_row_S, self.row_N, side="right") - 1
        return found

    @cached_property
    def windows(self) -> Windows:
        return plan_windows(self.num_tokens_N3, self.recipe.truncation)

    @cached_property
    def num_input_tokens(self) -> IntArray:
        """Length of each example as it is read: int64 (N,)."""
        return self.windows.num_read_N

    @cached_property
    def num_supervised_tokens(self) -> IntArray:
        """Labels of each example: int64 (N,)."""
        data = self.recipe.data
        return count_supervised(
            self.num_tokens_N3, self.windows, data.loss_sections, data.random_mask_fraction
        )


@dataclass(frozen=True)
class Data:
    train: Examples
    validation: Examples | None  # None when the recipe asks for none
    report: DataReport


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Data:
    """Read, tokenise or reuse, filter and split the data. `tokenizer`: of load_tokenizers.

    Rows are shuffled with data.split_seed; the first num_validation are for validation, and the
    next num_train for training. With data.validation_path, validation is that file, or its first
    num_validation rows if that is set. Training rows whose prompt is also in validation are
    counted, and left out with data.exclude_validation_prompts. random_mask_fraction is for training
    alone. Raises UserError for whatever leaves nothing to train on.
    """
    data = recipe.data
    usable, files = _read_sources(recipe, tokenizer)
    order = np.random.default_rng(data.split_seed).permutation(len(usable))
    if data.validation_path is None:
        held_out = usable.select(order[: data.num_validation])
        order = order[data.num_validation :]
    else:
        as_first = data.tables[0].model_copy(
            update={"path": data.validation_path, "revision": None}
        )
        held_out, file = _read(recipe, tokenizer, "data.validation_path", as_first)
        held_out = held_out.select(np.arange(len(held_out))[: data.num_validation or None])
        files.append(file)
    is_shared_N = np.isin(_prompt_hashes(usable)[order], _prompt_hashes(held_out))
    num_excluded = 0
    if data.exclude_validation_prompts:
        num_excluded = int(is_shared_N.sum())
        order, is_shared_N = order[~is_shared_N], is_shared_N[~is_shared_N]
    if len(order) < (data.num_train or 1):
        excluded = f" and {num_excluded} rows with a validation prompt" if num_excluded else ""
        raise UserError(
            f"data.num_train = {data.num_train or 'all'}: of {len(usable)} usable rows, "
            f"{len(order)} are left for training after data.num_validation = "
            f"{data.num_validation}{excluded}: lower one of the two, or add rows\n{files[0]}"
        )
    num_shared = int(is_shared_N[: data.num_train].sum())
    train, train_report = _with_labels("training", usable.select(order[: data.num_train]))
    if not len(held_out):
        return Data(train, None, DataReport(tuple(files), train_report, None))
    unmasked = recipe.with_values({"data.random_mask_fraction": 0.0})
    validation, validation_report = _with_labels("validation", replace(held_out, recipe=unmasked))
    report = DataReport(tuple(files), train_report, validation_report, num_shared, num_excluded)
    return Data(train, validation, report)


def _read_sources(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast
) -> tuple[Examples, list[FileReport]]:
    """The rows of all sources, one after the other: of each as many as the recipe wants, drawn by
    data.split_seed. Raises UserError when a source has too few.
    """
    data = recipe.data
    read = [
        _read(recipe, tokenizer, f"data.sources[{i}].path" if data.sources else "data.path", table)
        for i, table in enumerate(data.tables)
    ]
    if not data.sources:
        return read[0][0], [read[0][1]]
    parts, files = [], []
    wanted = _num_wanted(data.sources, [len(examples) for examples, _ in read])
    for i, ((examples, file), num_taken) in enumerate(zip(read, wanted, strict=True)):
        drawn = np.random.default_rng((data.split_seed, i)).permutation(len(examples))
        parts.append(examples.select(np.sort(drawn[:num_taken])))
        files.append(replace(file, num_taken=num_taken))
    first_row_S = np.cumsum([0, *(len(part.table) for part in parts[:-1])])
    tables = [part.table.with_format(None) for part in parts]
    mixed = Examples(
        recipe,
        datasets.concatenate_datasets(tables).with_format("numpy", columns=["input_ids"]),
        np.concatenate(
            [first + part.row_N for first, part in zip(first_row_S, parts, strict=True)]
        ),
        np.concatenate([part.num_tokens_N3 for part in parts]),
        first_row_S,
    )
    return mixed, files


def _num_wanted(tables: Sequence[SourceTable], num_usable: Sequence[int]) -> list[int]:
    """Rows of each source. With weights as many as the scarcest allows, rounded down."""
    scale = min(
        (num / table.weight for table, num in zip(tables, num_usable, strict=True) if table.weight),
        default=0.0,
    )
    wanted = []
    for i, (table, num) in enumerate(zip(tables, num_usable, strict=True)):
        if table.num_rows is not None and table.num_rows > num:
            raise UserError(
                f"data.sources[{i}].num_rows = {table.num_rows}: {table.name} has {num} usable "
                "rows: lower num_rows, or add rows"
            )
        share = min(int(scale * table.weight * (1 + 1e-12)), num) if table.weight else num
        if not share:
            raise UserError(
                f"data.sources[{i}].weight = {table.weight}: the share of {table.name} is less "
                "than one row, given the rows of the scarcest source; raise this weight, or add "
                "rows to that source"
            )
        wanted.append(table.num_rows or share)
    return wanted


def _read(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, field: str, table: SourceTable
) -> tuple[Examples, FileReport]:
    """All rows of a file or hub dataset that pass max_full_tokens, in their order. Raises UserError
    when none does.
    """
    source = SOURCES[table.source]
    name = table.path or str(source.hub_id)
    rows = find_rows(field, name, source, table.revision)
    own = recipe.data.model_copy(
        update={"source": table.source, "columns": table.columns, "sources": ()}
    )
    tokenised, read_report = tokenise_rows(rows, own, tokenizer)
    columns = tokenised.select_columns(["num_prompt", "num_cot", "num_answer"]).with_format(
        "numpy"
    )[:]
    num_tokens_N3 = np.stack([columns[name] for name in columns], axis=1).astype(np.int64)
    length_N = num_tokens_N3.sum(axis=1)
    longest = recipe.truncation.max_full_tokens
    too_long_N = length_N > (longest or np.inf)
    report = FileReport(read_report, longest, int(too_long_N.sum()))
    usable = np.flatnonzero((length_N > 0) & ~too_long_N)  # a row that cannot be used has no tokens
    if not len(usable):
        raise UserError(f"{field} = {name!r}: none of its rows can be used\n{report}")
    tokens = tokenised.with_format("numpy", columns=["input_ids"])
    return Examples(recipe, tokens, usable, num_tokens_N3[usable]), report


def _report(examples: Examples, has_label_N: npt.NDArray[np.bool_]) -> SplitReport:
    kept = examples.select(has_label_N)
    return SplitReport(
        num_examples=len(kept),
        num_without_label=int((~has_label_N).sum()),
        num_full_tokens=int(kept.num_tokens_N3.sum()),
        num_input_tokens=int(kept.num_input_tokens.sum()),
        num_supervised_tokens=int(kept.num_supervised_tokens.sum()),
    )


def _prompt_hashes(examples: Examples) -> IntArray:
    hashes = examples.table.with_format("numpy", columns=["prompt_hash"])["prompt_hash"][:]
    found: IntArray = np.asarray(hashes, dtype=np.int64)[examples.row_N]
    return found


def _with_labels(name: str, examples: Examples) -> tuple[Examples, SplitReport]:
    """Without the examples that truncation leaves no label. Raises NothingToLearn when none is
    left.
    """
    has_label_N = examples.num_supervised_tokens > 0
    kept, report = examples.select(has_label_N), _report(examples, has_label_N)
    sources = examples.recipe.data.sources
    if len(sources) == examples.num_sources > 1:
        of_sources = [examples.source_N == i for i in range(len(sources))]
        parts = [_report(examples.select(mine), has_label_N[mine]) for mine in of_sources]
        named = {table.name: part for table, part in zip(sources, parts, strict=True)}
        report = replace(report, by_source=named)
    if not len(kept):
        raise NothingToLearn(
            f"no {name} example has a token in data.loss_sections = "
            f"{list(examples.recipe.data.loss_sections)} after truncation: widen [truncation] or "
            "loss_sections\n"
            f"{name}: {report}"
        )
    return kept, report
