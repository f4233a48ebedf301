"""The chunk plan: what a budget is spent on, and what is said of it."""

import logging

import pytest
import torch

from kd.constants import LOGITS_GIB
from kd.losses import distillation_loss
from kd.losses.chunk_plan import (
    ChunkPlan,
    even_parts,
    plan_chunks,
)


@pytest.mark.parametrize("vocab_size", [32000, 49152, 128256, 151936, 248320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits_gib", [LOGITS_GIB, 5.0])
def test_plan_spends_most_of_the_budget_and_no_more_on_whole_tiles(vocab_size, dtype, logits_gib):
    plan = plan_chunks(vocab_size, dtype, logits_gib=logits_gib)
    assert 0.85 < sum(plan) * vocab_size * dtype.itemsize / (logits_gib * 2**30) <= 1
    assert plan.student_rows >= 8 * plan.teacher_rows
    assert plan.student_rows % plan.teacher_rows == plan.teacher_rows % 128 == 0


def test_qwen_plans_are_those_that_the_readme_counts_with():
    assert plan_chunks(151936, torch.float32) == ChunkPlan(3072, 384)
    assert plan_chunks(151936, torch.bfloat16) == ChunkPlan(6144, 768)


def test_without_a_teacher_all_rows_are_the_students():
    plan = plan_chunks(151936, torch.float32, has_teacher=False)
    assert plan == ChunkPlan(3456, 0)


def test_chunk_size_replaces_the_budget():
    assert plan_chunks(151936, torch.float32, chunk_size=4096) == ChunkPlan(4096, 512)
    assert plan_chunks(151936, torch.float32, chunk_size=3) == ChunkPlan(3, 1)
    assert plan_chunks(151936, torch.float32, chunk_size=3, has_teacher=False) == ChunkPlan(3, 0)


@pytest.mark.parametrize("budget_bytes", [1, 4 * 1000 - 1, 4 * 1000, 2 * 4 * 1000, 5 * 4 * 1000])
def test_no_budget_is_too_small_for_a_row_each(budget_bytes):
    plan = plan_chunks(1000, torch.float32, logits_gib=budget_bytes / 2**30)
    assert plan.teacher_rows == 1
    assert plan.student_rows == max(1, budget_bytes // 4000 - 1)


@pytest.mark.parametrize("max_rows", [1, 5, 127, 128, 384, 3072])
@pytest.mark.parametrize("num_rows", [1, 2, 127, 128, 129, 500, 3073, 4096, 32768])
def test_parts_are_even_in_order_and_no_more_than_are_needed(num_rows, max_rows):
    parts = list(even_parts(num_rows, max_rows))
    sizes = [part.stop - part.start for part in parts]
    assert [row for part in parts for row in range(num_rows)[part]] == list(range(num_rows))
    assert len(parts) == -(-num_rows // max_rows)
    unit = 1 if max_rows % 128 else 128
    assert 0 < min(sizes) <= max(sizes) <= min(max_rows, min(sizes) + unit)
    assert all(size % unit == 0 for size in sizes[:-1])


def test_no_rows_have_no_part_and_a_batch_just_above_a_chunk_is_halved():
    assert list(even_parts(0, 384)) == []
    assert list(even_parts(3328, 3072)) == [slice(0, 1664), slice(1664, 3328)]


def test_a_plan_is_logged_once_whatever_the_number_of_rows(make_problem, caplog):
    for num_rows in (13, 7):
        p = make_problem((num_rows,), vocab_sizes=(41, 41))
        with caplog.at_level(logging.INFO, "kd.losses"):
            distillation_loss(
                p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels
            )
    (record,) = caplog.records
    assert "in float64 by backend torch" in record.getMessage()
    assert "all rows at once" in record.getMessage()


def test_a_plan_for_more_rows_than_a_chunk_says_how_many_there_are(make_problem, caplog):
    p = make_problem((13,), vocab_sizes=(37, 37))
    with caplog.at_level(logging.INFO, "kd.losses"):
        distillation_loss(
            *(p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels),
            chunk_size=5,
        )
    assert "chunks of 5 student and" in caplog.text
