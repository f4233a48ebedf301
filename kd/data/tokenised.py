"""Rows are tokenised once for all truncation lengths, and cached on disk under a key that covers
everything that changes a token.
"""

import hashlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets.arrow_writer import ArrowWriter
from transformers import PreTrainedTokenizerFast

from kd.data.account import ReadReport
from kd.data.sections import render, tokenise
from kd.data.sources import SOURCES, read_row
from kd.data.trace_rows import RawRow, TraceRows, parse
from kd.data.turns import BadRow
from kd.errors import UserError
from kd.recipe import DataSection, key_facts

FORMAT_VERSION = 3  # raise it with every change of code that changes the tokens of some row

_FEATURES = datasets.Features(
    {
        "reason": datasets.Value("string"),  # why the row is dropped, else empty
        "input_ids": datasets.List(datasets.Value("int32")),
        "num_prompt": datasets.Value("int32"),
        "num_cot": datasets.Value("int32"),
        "num_answer": datasets.Value("int32"),
        "prompt_hash": datasets.Value("int64"),  # of its text
        "file": datasets.Value("int32"),  # with `number`: where TraceRows found the row
        "number": datasets.Value("int64"),
    }
)
_OTHER_TASK = "row of another task"
_CHUNK_ROWS = 64  # what a process gets at a time


# The keys of [data] that change the tokens of a row.
_KEYS = {key for key in DataSection.model_fields if key_facts()[f"data.{key}"].in_token_key}


def tokenise_rows(
    rows: TraceRows, data: DataSection, tokenizer: PreTrainedTokenizerFast
) -> tuple[datasets.Dataset, ReadReport]:
    """All rows, tokenised now or by an earlier run that left them in data.cache_dir; row i of the
    table is row i.

    Columns: input_ids, num_prompt, num_cot, num_answer, prompt_hash; file and number, of
        TraceRows.place; and reason, why a row cannot be used and has no tokens.
    Rows are read only to be tokenised. Raises UserError when they cannot be, naming the row when a
    column is missing, or, with data.on_bad_row = "error", when a row is bad.
    """
    folder = Path(data.cache_dir) / _cache_key(rows, data, tokenizer)
    if not folder.exists():
        _build(folder, rows, data, tokenizer)
    table = datasets.load_from_disk(str(folder))
    report, first_bad = _report(rows.name, table["reason"][:])
    if data.on_bad_row == "error" and first_bad is not None:
        bad = table[first_bad]
        raise UserError(
            f"{rows.place(bad['file'], bad['number'])}: {bad['reason']}\n"
            f"{sum(report.bad_rows.values())} of {report.num_rows} rows cannot be used. Source "
            f"{data.source!r} needs {'; '.join(SOURCES[data.source].columns)}. Correct the rows, "
            'or set data.on_bad_row = "drop"'
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
        with ArrowWriter(path=str(aside / "unsaved.arrow"), features=_FEATURES) as writer:
            for chunk in _tokenise(rows, data, tokenizer):
                writer.write_batch({name: [row[name] for row in chunk] for name in _FEATURES})
        table = datasets.Dataset.from_file(str(aside / "unsaved.arrow"))
        table.save_to_disk(str(aside / "whole"))
        try:
            os.rename(aside / "whole", folder)
        except OSError:
            if not folder.exists():  # otherwise another process was first, with the same tokens
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Job(NamedTuple):
    rows: TraceRows
    data: DataSection
    tokenizer: PreTrainedTokenizerFast


def _tokenise(
    rows: TraceRows, data: DataSection, tokenizer: PreTrainedTokenizerFast
) -> Iterator[list[dict[str, Any]]]:
    """All rows in their order, in chunks; data.num_proc of them are in memory, or twice as many."""
    job, raw_rows = _Job(rows, data, tokenizer), rows.read()
    bar = datasets.utils.tqdm(desc=f"Tokenising {rows.name}", unit=" rows")
    chunks = iter(lambda: list(itertools.islice(raw_rows, _CHUNK_ROWS)), [])
    with bar:
        done = _in_processes(job, chunks) if data.num_proc > 1 else _in_this_one(job, chunks)
        for tokenised in done:
            yield tokenised
            bar.update(len(tokenised))


def _in_this_one(job: _Job, chunks: Iterable[list[RawRow]]) -> Iterator[list[dict[str, Any]]]:
    return ([_tokenise_row(job, raw) for raw in chunk] for chunk in chunks)


def _in_processes(job: _Job, chunks: Iterable[list[RawRow]]) -> Iterator[list[dict[str, Any]]]:
    num_proc = job.data.num_proc
    pending: deque[Future[list[dict[str, Any]]]] = deque()
    with ProcessPoolExecutor(num_proc, initializer=_begin, initargs=(job,)) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(_tokenise_chunk, chunk))
                if len(pending) > 2 * num_proc:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UserError(
                f"{job.rows.name}: a tokenising process was killed, perhaps for lack of memory: "
                f"lower data.num_proc = {num_proc}"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_jobs: list[_Job] = []  # of a process of the pool: its only one


def _begin(job: _Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits for it ends the work
    _jobs.append(job)


def _tokenise_chunk(chunk: list[RawRow]) -> list[dict[str, Any]]:
    return [_tokenise_row(_jobs[-1], raw) for raw in chunk]


def _tokenise_row(job: _Job, raw: RawRow) -> dict[str, Any]:
    where, data, tokenizer = job.rows.place(raw.file, raw.number), job.data, job.tokenizer
    found = {"reason": "", "file": raw.file, "number": raw.number}
    row = parse(raw.content, data.columns, where)
    try:
        trace = read_row(SOURCES[data.source], row)
        if trace is not None:
            texts = render(tokenizer, trace, data)
            tokens = asdict(tokenise(tokenizer, texts))
            return {**found, **tokens, "prompt_hash": _hash(texts[0])}
        found["reason"] = _OTHER_TASK
    except BadRow as error:
        found["reason"] = str(error)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return {**found, **_NO_TOKENS}


_NO_TOKENS = {"input_ids": [], "num_prompt": 0, "num_cot": 0, "num_answer": 0, "prompt_hash": 0}


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _report(name: str, reasons: list[str]) -> tuple[ReadReport, int | None]:
    """The account of all rows, and the index of the first bad one."""
    bad = [i for i, reason in enumerate(reasons) if reason not in ("", _OTHER_TASK)]
    counts = Counter(reasons[i] for i in bad).most_common()
    return ReadReport(name, len(reasons), reasons.count(_OTHER_TASK), dict(counts)), bad[
        0
    ] if bad else None
