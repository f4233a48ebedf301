"""Rows tokenised once for all truncation lengths, and kept on disk under a key of all that changes
a token.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerFast

from kd.data.account import ReadReport
from kd.data.sections import render, tokenise
from kd.data.sources import SOURCES, read_row
from kd.data.trace_rows import TraceRows, parse
from kd.data.turns import BadRow
from kd.errors import UserError
from kd.recipe import DataSection, key_facts

FORMAT_VERSION = 2  # raise it with every change of code that changes the tokens of some row

_FEATURES = datasets.Features(
    {
        "reason": datasets.Value("string"),  # why the row is dropped, else empty
        "input_ids": datasets.List(datasets.Value("int32")),
        "num_prompt": datasets.Value("int32"),
        "num_cot": datasets.Value("int32"),
        "num_answer": datasets.Value("int32"),
    }
)
_OTHER_TASK = "row of another task"


# The keys of [data] that change the tokens of a row.
_KEYS = {key for key in DataSection.model_fields if key_facts()[f"data.{key}"].in_token_key}


def tokenise_rows(
    rows: TraceRows, data: DataSection, tokenizer: PreTrainedTokenizerFast
) -> tuple[datasets.Dataset, ReadReport]:
    """All rows, tokenised now or by an earlier run that left them in data.cache_dir; row i of the
    table is row i.

    Columns: input_ids, num_prompt, num_cot, num_answer; and reason, why a row cannot be used and
        has no tokens.
    Rows are read only to be tokenised. Raises UserError when they cannot be, naming the row when a
    column is missing, or, with data.on_bad_row = "error", when a row is bad.
    """
    folder = Path(data.cache_dir) / _cache_key(rows, data, tokenizer)
    if not folder.exists():
        _build(folder, rows, data, tokenizer)
    table = datasets.load_from_disk(str(folder))
    report, first_bad = _report(rows.name, table["reason"][:])
    if data.on_bad_row == "error" and first_bad is not None:
        raise UserError(
            f"{rows.name}: row {first_bad + 1} (counted from 1): {table[first_bad]['reason']}\n"
            f"{sum(report.bad_rows.values())} of {report.num_rows} rows cannot be used; source "
            f"{data.source!r} needs "
            f"{'; '.join(SOURCES[data.source].columns)}. Correct them, or set data.on_bad_row = "
            f'"drop"'
        )
    return table, report


def _cache_key(rows: TraceRows, data: DataSection, tokenizer: PreTrainedTokenizerFast) -> str:
    """Truncation, sections of the loss, filters and seeds are left out: they change no token."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {
        "format_version": FORMAT_VERSION,
        "rows": [rows.name, rows.fingerprint],
        "data": data.model_dump(include=_KEYS),
        # Calls of a tokenizer rewrite the state of its padding and truncation.
        "tokenizer": {
            key: value for key, value in backend.items() if key not in ("padding", "truncation")
        },
        "chat_template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,  # templates may print them
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _build(
    folder: Path, rows: TraceRows, data: DataSection, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Written aside and renamed: never half a cache, and of two processes that race one wins and
    none is harmed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        table = rows.read()
        table = table.map(
            _tokenise_row,
            with_indices=True,
            remove_columns=table.column_names,
            features=_FEATURES,
            fn_kwargs={"name": rows.name, "data": data, "tokenizer": tokenizer},
            num_proc=data.num_proc if data.num_proc > 1 else None,
            load_from_cache_file=False,
            cache_file_name=str(aside / "unsaved.arrow"),
            new_fingerprint=folder.name,
            desc=f"Tokenising {rows.name}",
        )
        table.save_to_disk(str(aside / "whole"))
        try:
            os.rename(aside / "whole", folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same tokens
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _tokenise_row(
    row: dict[str, Any],
    index: int,
    *,
    name: str,
    data: DataSection,
    tokenizer: PreTrainedTokenizerFast,
) -> dict[str, Any]:
    try:
        trace = read_row(SOURCES[data.source], parse(row))
        if trace is not None:
            return {**asdict(tokenise(tokenizer, render(tokenizer, trace, data))), "reason": ""}
        reason = _OTHER_TASK
    except BadRow as error:
        reason = str(error)
    except UserError as error:
        raise UserError(f"{name}: row {index + 1} (counted from 1): {error}") from None
    return {"reason": reason, "input_ids": [], "num_prompt": 0, "num_cot": 0, "num_answer": 0}


def _report(name: str, reasons: list[str]) -> tuple[ReadReport, int | None]:
    """The account of all rows, and the index of the first bad one."""
    bad = [i for i, reason in enumerate(reasons) if reason not in ("", _OTHER_TASK)]
    counts = Counter(reasons[i] for i in bad).most_common()
    return ReadReport(name, len(reasons), reasons.count(_OTHER_TASK), dict(counts)), bad[
        0
    ] if bad else None
