"""Heads split by tokens over 2 and 4 gloo ranks give the numbers of whole heads."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from backends import BACKENDS

from kd.losses import DIVERGENCES, distillation_loss_with_diagnostics
from kd.losses.checks import check_group
from kd.losses.sharding import vocab_shard

VOCAB_SIZE = 29  # over 4 ranks: 8, 8, 8 and 5
OPTIONS = [
    {"divergence": divergence, "beta": 0.3, "alpha": 0.2, "mix_weight": 0.7, "temperature": 1.7}
    for divergence in DIVERGENCES
]
OPTIONS += [
    {"ce_weight": 0.0, "student_softcap": 2.0, "student_scale": 0.4, "reduction": "mean"},
    {"divergence": "jsd", "token_weights": torch.linspace(0, 2, 13)},
    {"kd_weight": 0.0},
]


def outcome_of(problem, backend, first_token, num_tokens, options):
    """loss, kd, ce, diagnostics and the gradients of hidden states, head and bias, of tokens from
    `first_token` on.
    """
    tokens = slice(first_token, first_token + num_tokens)
    is_last = tokens.stop == VOCAB_SIZE
    teacher_tokens = slice(first_token, None if is_last else tokens.stop)
    hidden = problem.student_hidden.clone().requires_grad_()
    head, bias = (
        t[tokens].clone().requires_grad_() for t in (problem.student_head, problem.student_bias)
    )
    result, diagnostics = distillation_loss_with_diagnostics(
        hidden,
        head,
        problem.teacher_hidden,
        problem.teacher_head[teacher_tokens],
        problem.labels,
        student_bias=bias,
        teacher_bias=problem.teacher_bias[teacher_tokens],
        chunk_size=4,
        backend=backend,
        vocab_size=VOCAB_SIZE,
        **options,
    )
    (2.5 * result.loss).backward()
    numbers = torch.stack([result.loss.detach(), result.kd, result.ce])
    return numbers, diagnostics and torch.stack(diagnostics), hidden.grad, head.grad, bias.grad


def run_rank(rank, num_ranks, folder, tensors, backend):
    problem = SimpleNamespace(**tensors)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks
    )
    shard = vocab_shard(dist.group.WORLD, VOCAB_SIZE)
    outcomes = [
        outcome_of(
            problem, backend, shard.offset, shard.size, {**options, "group": dist.group.WORLD}
        )
        for options in OPTIONS
    ]
    torch.save((shard.offset, shard.size, outcomes), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_are_those_of_whole_heads(make_problem, tmp_path, backend, num_ranks):
    # the teacher's head has more rows than the shared vocabulary: its last slice does too
    problem = make_problem(vocab_sizes=(VOCAB_SIZE, VOCAB_SIZE + 4))
    whole = [outcome_of(problem, "reference", 0, VOCAB_SIZE, options) for options in OPTIONS]
    # a dict of tensors, for the fixtures' classes cannot be imported by another process
    mp.spawn(run_rank, (num_ranks, str(tmp_path), vars(problem), backend), nprocs=num_ranks)
    for rank in range(num_ranks):
        offset, size, outcomes = torch.load(tmp_path / f"rank{rank}.pt")
        assert size == (VOCAB_SIZE + num_ranks - 1) // num_ranks or rank == num_ranks - 1
        for options, actual, expected in zip(OPTIONS, outcomes, whole, strict=True):
            assert expected[0][0] > 0.1
            tokens = slice(offset, offset + size)
            same = [*expected[:3], *(gradient[tokens] for gradient in expected[3:])]
            for value, truth in zip(actual, same, strict=True):
                if truth is None:
                    assert value is None
                else:
                    torch.testing.assert_close(
                        value, truth, rtol=1e-9, atol=1e-12, msg=f"rank {rank}, {options}"
                    )


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "vocab_size=None with a group.*whole"),
        ({"vocab_size": 40}, r"student_head has 31 rows; rank 0.*\[0, 40\) of vocab_size=40"),
        ({"vocab_size": 31, "backend": "reference"}, "backend='reference' takes whole heads"),
    ],
)
def test_heads_that_do_not_fit_the_group_are_named(
    make_problem, evaluate, group_of_one, options, message
):
    with pytest.raises(ValueError, match=message):
        evaluate(make_problem(), group=group_of_one, **options)


def test_a_rank_without_a_token_is_an_error(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda _: 4)
    monkeypatch.setattr(dist, "get_rank", lambda _: 0)
    assert [vocab_shard(None, size).size for size in (4, 10)] == [1, 3]
    with pytest.raises(ValueError, match="vocab_size=9 leaves the last of 4 ranks no token"):
        vocab_shard(None, 9)


def test_slices_of_two_sizes_are_an_error_unless_they_are_the_last(monkeypatch):
    """Heads of 30 and 40 rows, each dealt over 2 ranks by itself: the teacher's second slice is
    five tokens off.
    """
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    message = r"teacher_head has 20 rows; rank 0.*\[0, 15\)"
    for rank, expectation in ((0, pytest.raises(ValueError, match=message)), (1, nullcontext())):
        monkeypatch.setattr(dist, "get_rank", lambda _, rank=rank: rank)
        with expectation:
            check_group(None, 30, {"student": 15, "teacher": 20})
