"""ChunkPlan: how many rows of logits exist at a time, from a memory budget.

A chunk of the student's rows is large, for each costs a read and a write of the head's fp32
gradient, 8 * V * Hs bytes: against its own product that is about 966 / rows on an H100. A chunk of
the teacher's rows has no such cost and is about a ninth of the budget, in whole tiles of a matrix
product.

Shapes: V rows of a head, Hs hidden size of the student.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kd.constants import LOGITS_GIB

STUDENT_TO_TEACHER = 8
TILE_ROWS = 128


class ChunkPlan(NamedTuple):
    """Rows of logits that exist at a time; teacher_rows is 0 without a teacher."""

    student_rows: int
    teacher_rows: int


def plan_chunks(
    vocab_size: int,
    logits_dtype: torch.dtype,
    *,
    has_teacher: bool = True,
    chunk_size: int | None = None,
    logits_gib: float = LOGITS_GIB,
) -> ChunkPlan:
    """Return the largest plan whose logits, of `vocab_size` columns, fit in `logits_gib`: at
    least a row each.

    A `chunk_size` replaces the student's rows, and with them the budget. The number of rows in a
    batch plays no part: all steps of a run have one plan.
    """
    budget_rows = int(logits_gib * 2**30) // (vocab_size * logits_dtype.itemsize)
    if not has_teacher:
        return ChunkPlan(chunk_size or max(1, _whole_tiles(budget_rows)), 0)
    if chunk_size:
        return ChunkPlan(chunk_size, _whole_tiles(-(-chunk_size // STUDENT_TO_TEACHER)))
    teacher_rows = max(1, _whole_tiles(budget_rows // (STUDENT_TO_TEACHER + 1)))
    student_rows = (budget_rows - teacher_rows) // teacher_rows * teacher_rows
    return ChunkPlan(max(1, student_rows), teacher_rows)


def even_parts(num_rows: int, max_rows: int) -> Iterator[slice]:
    """Yield the rows in order, in as few parts of at most `max_rows` as there can be: of one size,
    give or take a tile, or a row where max_rows is not whole tiles.
    """
    num_parts = -(-num_rows // max_rows)
    unit = 1 if max_rows % TILE_ROWS else TILE_ROWS
    num_units = -(-num_rows // unit)
    # The larger parts come last, where the last tile may be ragged.
    bounds = [unit * (part * num_units // num_parts) for part in range(num_parts)]
    yield from map(slice, bounds, [*bounds[1:], num_rows])


def _whole_tiles(num_rows: int) -> int:
    return num_rows - num_rows % TILE_ROWS if num_rows >= TILE_ROWS else num_rows
