"""forward_kl from an expected logit: exact by a vector, and unbiased by draws."""

import pytest
import torch

from kd.losses import (
    SampledTargets,
    VectorTargets,
    distillation_loss,
    expected_logit_loss,
)

ROWS, STUDENT, TEACHER, VOCAB = 7, 12, 16, 30
SHARED = 28  # of a student's 30 and a teacher's 28
DRAWS = 12


def problem(seed: int = 0, scale: float = 0.7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator)

    labels = torch.randint(0, SHARED, (1, ROWS), generator=generator)
    labels[0, 2] = -100
    return {
        "hidden": normal(1, ROWS, STUDENT).requires_grad_(),
        "head": normal(VOCAB, STUDENT),
        "bias": normal(VOCAB),
        "teacher": normal(1, ROWS, TEACHER),
        "teacher_head": normal(SHARED, TEACHER),
        "labels": labels,
    }


def log_p_of(given: dict[str, torch.Tensor], temperature: float) -> torch.Tensor:
    return torch.log_softmax(given["teacher"] @ given["teacher_head"].T / temperature, -1)


def vector_of(given: dict[str, torch.Tensor], temperature: float) -> VectorTargets:
    log_p = log_p_of(given, temperature)
    p = log_p.exp()
    return VectorTargets(
        p @ given["head"][:SHARED], p @ given["bias"][:SHARED], -(p * log_p).sum(-1), SHARED
    )


def draws_of(given: dict[str, torch.Tensor], temperature: float, seed: int) -> SampledTargets:
    log_p = log_p_of(given, temperature)
    p, generator = log_p.exp(), torch.Generator().manual_seed(seed)
    ids = torch.multinomial(p[0], DRAWS, replacement=True, generator=generator)[None]
    return SampledTargets(ids, -(p * log_p).sum(-1), SHARED)


def exact(given: dict[str, torch.Tensor], **options: float) -> tuple[float, float, torch.Tensor]:
    teacher = given["teacher"], given["teacher_head"]
    student = {"student_bias": given["bias"], "student_scale": 0.5}
    result = distillation_loss(
        given["hidden"], given["head"], *teacher, given["labels"], **student, **options
    )
    (gradient,) = torch.autograd.grad(result.loss, given["hidden"])
    return float(result.loss), float(result.kd), gradient


def from_targets(
    given: dict[str, torch.Tensor], targets: VectorTargets | SampledTargets, **options: object
) -> tuple[float, float, torch.Tensor]:
    student = {"student_bias": given["bias"], "student_scale": 0.5}
    result = expected_logit_loss(
        given["hidden"], given["head"], targets, given["labels"], **student, **options
    )
    (gradient,) = torch.autograd.grad(result.loss, given["hidden"])
    return float(result.loss), float(result.kd), gradient


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.5)])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_vector_gives_the_exact_loss_and_gradient(temperature, weights, chunk_size):
    given, (kd_weight, ce_weight) = problem(), weights
    options = {"temperature": temperature, "kd_weight": kd_weight, "ce_weight": ce_weight}
    loss, kd, gradient = exact(given, **options)
    targets = vector_of(given, temperature)
    found = from_targets(given, targets, **options, chunk_size=chunk_size)
    assert found[:2] == pytest.approx((loss, kd), rel=1e-5)
    torch.testing.assert_close(found[2], gradient, rtol=1e-4, atol=1e-6)


def test_another_head_than_the_vectors_gives_another_loss():
    given = problem()
    targets = vector_of(given, 1.0)
    given["head"] = given["head"] + 0.1
    assert from_targets(given, targets)[1] != pytest.approx(exact(given)[1], rel=1e-3)


@pytest.mark.parametrize("are_right", [True, False])
def test_draws_have_the_exact_loss_and_gradient_on_average_and_wrong_weights_have_not(are_right):
    given, temperature = problem(), 2.0
    options = {"temperature": temperature, "kd_weight": 1.0, "ce_weight": 0.0}
    _, kd, gradient = exact(given, **options)
    kds, along = [], []
    for seed in range(200):
        targets = draws_of(given, temperature, seed)
        if not are_right:  # the most frequent token of a row once more, in the place of another
            ids_BLK = targets.ids_BLK.clone()
            ids_BLK[..., :2] = ids_BLK.mode(-1).values[..., None]
            targets = SampledTargets(ids_BLK, targets.entropy_BL, SHARED)
        found = from_targets(given, targets, **options)
        kds.append(found[1])
        along.append(float((found[2] * gradient).sum() / gradient.norm()))

    def errors(values: list[float], expected: float) -> float:
        """In standard errors of the mean."""
        tensor = torch.tensor(values)
        return float((tensor.mean() - expected).abs() / (tensor.std() / len(values) ** 0.5))

    worst = max(errors(kds, kd), errors(along, float(gradient.norm())))
    assert (worst < 4) is are_right, worst


def test_what_a_vector_cannot_say_is_refused():
    given = problem()
    arguments = given["hidden"], given["head"], vector_of(given, 1.0), given["labels"]
    with pytest.raises(ValueError, match=r"student_softcap = 30.0: a vector cannot give"):
        expected_logit_loss(*arguments, student_softcap=30.0)
    given["head"].requires_grad_()
    with pytest.raises(ValueError, match="student_head requires a gradient"):
        expected_logit_loss(*arguments)
