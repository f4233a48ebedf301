"""The table of divergences: complete, in step with the recipe, and true of what it describes."""

from typing import get_args

import pytest
import torch
from backends import INTERPRETED

from kd.losses import DIVERGENCES, Objective, distillation_loss
from kd.losses.divergences import DIVERGENCE_TABLE
from kd.losses.reference import kd_rows
from kd.recipe import LossSection


def test_the_recipe_names_the_divergences_of_the_table():
    in_recipe = get_args(LossSection.model_fields["divergence"].annotation)
    assert in_recipe == DIVERGENCES == tuple(DIVERGENCE_TABLE)
    assert len(DIVERGENCES) == 7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_those_that_need_a_tail_are_those_that_grow_without_bound_where_p_vanishes(divergence):
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, -1e6]])
    kd = kd_rows(student.double(), teacher.double(), Objective(divergence)).item()
    assert kd > 0.01
    assert (kd > 1e5) == DIVERGENCE_TABLE[divergence].infinite_without_tail


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_parameter_is_refused_at_the_ends_of_its_range_where_the_divergence_vanishes(divergence):
    spec = DIVERGENCE_TABLE[divergence]
    if spec.parameter is None:
        assert Objective(divergence, beta=2.0, alpha=2.0, mix_weight=2.0).parameter == 0.0
        return
    for value in (-0.1, 0.0, 0.3, 1.0, 1.1, float("nan")):
        if 0 < value < 1 or (divergence == "mixed_kl" and value in (0.0, 1.0)):
            assert Objective(divergence, **{spec.parameter: value}).parameter == value
        else:
            with pytest.raises(ValueError, match=f"{spec.parameter}={value!r} must lie"):
                Objective(divergence, **{spec.parameter: value})


@pytest.mark.skipif(not INTERPRETED, reason="compiled here: see test_compilation.py")
@pytest.mark.parametrize("is_mixture", [False, True])
def test_the_kernel_refuses_a_divergence_that_stands_in_the_table_alone(
    make_problem, monkeypatch, is_mixture
):
    unheard_of = DIVERGENCE_TABLE["tvd"]._replace(is_mixture=is_mixture)
    monkeypatch.setitem(DIVERGENCE_TABLE, "unheard_of", unheard_of)
    p = make_problem()
    arguments = (p.student_hidden, p.student_head, p.teacher_hidden, p.teacher_head, p.labels)
    assert distillation_loss(*arguments, divergence="unheard_of", backend="torch").kd > 0.05
    with pytest.raises(Exception, match="does not know this divergence"):
        distillation_loss(*arguments, divergence="unheard_of", backend="triton")
