"""Random loss problems, and what a call of the loss returns and leaves behind."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from backends import INTERPRETED
from torch import Tensor

from kd.losses import DistillationLoss, distillation_loss


@dataclass(frozen=True)
class Problem:
    """The five positional arguments of distillation_loss, and biases for the tests that want
    them.
    """

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    student_bias: Tensor
    teacher_bias: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(t if t is self.labels else t.to(dtype) for t in vars(self).values()))


@dataclass(frozen=True)
class Outcome:
    """A result, and the gradients of student hidden states, head and bias: None where none
    arrived.
    """

    result: DistillationLoss
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None]


def _make_problem(
    rows: tuple[int, ...] = (13,),
    hidden_sizes: tuple[int, int] = (6, 9),
    vocab_sizes: tuple[int, int] = (31, 31),
    ignored: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(min(vocab_sizes) - 3, rows, generator=generator)
    labels.view(-1)[:: max(1, labels.numel() // max(1, ignored))][:ignored] = -100
    return Problem(
        normal(*rows, hidden_sizes[0]),
        normal(vocab_sizes[0], hidden_sizes[0]),
        normal(*rows, hidden_sizes[1]),
        normal(vocab_sizes[1], hidden_sizes[1]),
        labels,
        normal(vocab_sizes[0]),
        normal(vocab_sizes[1]),
    )


def _evaluate(
    problem: Problem,
    *,
    frozen: tuple[str, ...] = (),
    bias: bool = False,
    teacher: bool = True,
    grad_output: float = 1.0,
    **options: Any,
) -> Outcome:
    hidden, head, student_bias = (
        tensor.detach().clone().requires_grad_(name not in frozen)
        for name, tensor in (
            ("hidden", problem.student_hidden),
            ("head", problem.student_head),
            ("bias", problem.student_bias),
        )
    )
    if bias:
        options |= {"student_bias": student_bias, "teacher_bias": problem.teacher_bias}
    teacher_hidden, teacher_head = (
        (problem.teacher_hidden, problem.teacher_head) if teacher else (None, None)
    )
    result = distillation_loss(
        hidden, head, teacher_hidden, teacher_head, problem.labels, **options
    )
    result.loss.backward(torch.full_like(result.loss, grad_output))
    return Outcome(result, (hidden.grad, head.grad, student_bias.grad))


@pytest.fixture(scope="session", autouse=True)
def _triton_finds_its_builtins_once() -> Iterator[None]:
    """At every call of a function inside a kernel Triton's interpreter looks through its language
    for what to replace, which takes half of the time: here it remembers where that stands.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    names: dict[Any, list[str]] = {}
    is_builtin = interpreter.tl.core.is_builtin

    def patch_builtins(package: Any, builder: Any, scope: Any) -> None:
        if package not in names:
            members = inspect.getmembers(package)
            names[package] = [name for name, member in members if is_builtin(member)]
        for name in names[package]:
            member = getattr(package, name)
            if is_builtin(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", patch_builtins)
        yield


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    return _make_problem


@pytest.fixture
def evaluate() -> Callable[..., Outcome]:
    return _evaluate
