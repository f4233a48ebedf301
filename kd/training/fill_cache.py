"""Fill a teacher's cache: each trace of a recipe's data once, whole, over all ranks. Read
fill_cache() from top to bottom.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from kd.cache.cache_records import REMEDY, CacheManifest
from kd.cache.kinds import Heads, Kind, VectorKind, head_sha256, kind_of, parameters_of
from kd.cache.store import (
    SHARD_BYTES,
    Cache,
    ShardWriter,
    damage_of,
    open_cache,
    read_manifest,
    remove_shard,
    remove_unfinished,
    set_filled,
)
from kd.cli import CacheRequest
from kd.data.collate import collate
from kd.data.dataset import Data, Example, Examples
from kd.data.step_plan import BatchShape, deal
from kd.data.tokenizers import load_tokenizers
from kd.distributed.interruption import Interruption
from kd.distributed.layout import Layout
from kd.distributed.peers import gather_peers, watching
from kd.distributed.process_group import (
    any_rank,
    find_ranks,
    on_rank_zero,
)
from kd.errors import Interrupted, UserError
from kd.files import write_json
from kd.logs import configure_logging
from kd.plan.cache_cost import filling_flops
from kd.recipe import Recipe
from kd.runs.lock import hold
from kd.runs.records import FILLED
from kd.runs.shared_folder import check_shared
from kd.teachers.live import LiveTeacher
from kd.teachers.prefixes import check_prefixes
from kd.training.build import build_live_teacher
from kd.training.cache_identity import check_same, check_serves, make_manifest, student_head
from kd.training.meeting import load_data_by_node, meet

log = logging.getLogger(__name__)

TOKENS_PER_MICRO_BATCH = 8192  # where the recipe has no budget
ROWS_PER_GROUP = 16  # of each rank, between two looks at signals


def fill_cache(
    recipe: Recipe,
    kind: Kind,
    folder: Path,
    interruption: Interruption,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Bring the cache in folder to hold every row of the recipe's data, training and validation;
    shards that are damaged are filled again.

    Collective: every rank must call this. Raises UserError, on every rank, for whatever the user
    can put right; Interrupted when the interruption was requested, and what is done is kept.
    """
    recipe = whole_traces(recipe)
    find_ranks()
    with watching([]):
        layout = meet(recipe)
        peers = gather_peers()
        interruption.arm()
    with watching(peers):
        configure_logging(layout.rank)
        on_rank_zero(lambda: hold(folder))
        check_shared(f"--output {str(folder)!r}", folder, layout)
        tokenizer = load_tokenizers(recipe)
        data = load_data_by_node(recipe, tokenizer, layout)
        manifest = on_rank_zero(lambda: make_manifest(recipe, kind, tokenizer))
        on_rank_zero(lambda: prepare(folder, manifest))
        missing = missing_rows(open_cache(folder), data)
        log.info("%s: filling %d rows", folder, len(missing))
        if missing:
            teacher = build_live_teacher(recipe, layout)
            examples, longest = missing[0]
            check_prefixes(teacher, torch.tensor(examples[longest].input_ids, device=layout.device))
            writer = ShardWriter(folder, f"rank{layout.rank:05d}", shard_bytes)
            _fill(recipe, kind, writer, missing, teacher, tokenizer, layout, interruption)
        on_rank_zero(lambda: finish(folder, data, recipe, kind))


def finish(folder: Path, data: Data, recipe: Recipe, kind: Kind) -> None:
    """Say that the cache is whole. Raises UserError when it is not."""
    cache = open_cache(folder)
    if left := len(missing_rows(cache, data)):
        raise UserError(f"{folder}: {left} rows are still missing: run the same command again")
    filled = set_filled(folder, filling_flops(recipe, kind, cache.lengths_N))
    log.info(
        "%s: complete, %d rows of %d tokens, %.2f GiB, %.1f rank minutes",
        folder,
        len(cache),
        filled.num_tokens,
        filled.bytes / 2**30,
        filled.rank_seconds / 60,
    )


def make_kind(recipe: Recipe, name: str, dtype: str, num_tokens: int | None) -> Kind:
    """The kind of a cache for this recipe. Raises UserError for what a kind does not have."""
    if num_tokens is not None and num_tokens < 1:
        raise UserError(f"--num-tokens {num_tokens}: write at least 1")
    parameters: dict[str, Any] = {}
    if name in ("hidden", "vector"):
        if num_tokens is not None:
            raise UserError(
                f"--num-tokens {num_tokens}: --kind {name} holds no tokens: leave it out"
            )
        parameters["dtype"] = dtype
    elif num_tokens is not None:
        parameters["k"] = num_tokens
    if name == "vector":
        if dtype == "int8":
            raise UserError("--dtype int8: vectors are stored in fp32 or bf16; write one of them")
        parameters["head_sha256"] = head_sha256(student_head(recipe, torch.device("cpu")))
    if name != "hidden":
        parameters["temperature"] = recipe.loss.temperature
    return kind_of(name, parameters)


def check_request(recipe: Recipe, request: CacheRequest, folder: Path) -> None:
    """Raise UserError unless a cache of this kind serves the recipe's loss, and the folder is new
    or holds one of the same kind.
    """
    kind = make_kind(recipe, *request)
    check_serves(kind, recipe, f"the cache {folder}")
    if (folder / "manifest.json").exists():
        there = read_manifest(folder)
        here = there.model_copy(update={"kind": kind.name, "parameters": parameters_of(kind)})
        check_same(there, here, folder)


def whole_traces(recipe: Recipe) -> Recipe:
    """The recipe without truncation, and with a teacher that runs."""
    if recipe.teacher is None:
        raise UserError(f"{recipe.run.name} has no [teacher] to fill a cache from: add one")
    values = {"keep_fraction": 1.0, "max_tokens": None, "window": "head", "cut_after_think": False}
    changes: dict[str, Any] = {f"truncation.{key}": value for key, value in values.items()}
    changes["data.loss_sections"] = ["prompt", "cot", "answer"]
    return recipe.with_values({**changes, "teacher.cache": None})


def prepare(folder: Path, manifest: CacheManifest) -> None:
    """A manifest in the folder that says the same, and no shard that is not whole."""
    path = folder / "manifest.json"
    if path.exists():
        check_same(read_manifest(folder), manifest, folder)
    else:
        write_json(path, manifest.model_dump())
    (folder / FILLED).unlink(missing_ok=True)
    (folder / "shards").mkdir(exist_ok=True)
    remove_unfinished(folder)
    for shard, what in damage_of(folder):
        log.warning("%s is damaged: %s; filling its rows again", shard, what)
        remove_shard(shard)


def missing_rows(cache: Cache, data: Data) -> list[tuple[Examples, int]]:
    """The rows that the cache lacks, each once, the longest first."""
    found: dict[bytes, tuple[Examples, int]] = {}
    for examples in (data.train, data.validation):
        if examples is None:
            continue
        for i in range(len(examples)):
            key = examples.key(i)
            if key not in cache:
                found.setdefault(key, (examples, i))
    return sorted(found.values(), key=lambda row: -int(row[0].num_input_tokens[row[1]]))


def _fill(
    recipe: Recipe,
    kind: Kind,
    writer: ShardWriter,
    missing: list[tuple[Examples, int]],
    teacher: LiveTeacher,
    tokenizer: PreTrainedTokenizerFast,
    layout: Layout,
    interruption: Interruption,
) -> None:
    """Groups of rows, each dealt over the ranks as a global batch is."""
    vocab_size = read_manifest(writer.folder).vocab_size
    student = student_head(recipe, layout.device) if isinstance(kind, VectorKind) else None
    budget = recipe.training.max_tokens_per_micro_batch or TOKENS_PER_MICRO_BATCH
    interrupted = False
    bar = tqdm(total=len(missing), unit="row", disable=layout.rank != 0)
    for group in groups(missing, ROWS_PER_GROUP * layout.world_size):
        lengths = np.array([len(example.input_ids) for example in group])
        shape = BatchShape(len(group), max_tokens=budget)
        problem = None
        for micro in deal(lengths, shape, layout.world_size)[layout.rank]:
            batch = collate([group[i] for i in micro], tokenizer.pad_token_id).to(layout.device)
            hidden_BLH = teacher.hidden_states(**batch.model_inputs)
            heads = Heads(teacher.head, student, vocab_size)
            try:
                for hidden_LH, place in zip(hidden_BLH, batch.places, strict=False):
                    seed = int.from_bytes(place.key[:7], "big")
                    writer.add(place.key, kind.encode(hidden_LH[: place.length], heads, seed))
            except OSError as error:  # its peers learn of it below, and none waits for it
                problem = error
        bar.update(len(group))
        _stop_together(problem, writer.folder, layout)
        interrupted = any_rank(interruption.is_requested(), layout.device)
        if interrupted:
            break
    try:
        writer.flush()
        problem = None
    except OSError as error:
        problem = error
    _stop_together(problem, writer.folder, layout)
    if interrupted:
        raise Interrupted


def groups(missing: list[tuple[Examples, int]], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(missing), size):
        yield [examples[i] for examples, i in missing[start : start + size]]


def _stop_together(problem: OSError | None, folder: Path, layout: Layout) -> None:
    """Raise UserError on every rank when one of them cannot write."""
    if any_rank(problem is not None, layout.device):
        reason = problem.strerror if problem else "another rank cannot write"
        raise UserError(
            f"{folder}: {reason}: free some space and run the same command again; what is written "
            f"is kept ({REMEDY})"
        )
