"""Which ranks share a node, and where hpZ's groups of consecutive ranks may lie."""

from typing import Any

import pytest

from kd.distributed.nodes import Nodes, divide, size_to_plan
from kd.engine.ds_config import check_hpz
from kd.errors import UserError
from kd.recipe import Recipe


def check(size: int, nodes: Nodes) -> None:
    sections: dict[str, Any] = {"student": {"model": "unused"}, "data": {"path": "unused.jsonl"}}
    recipe = Recipe.model_validate(
        sections | {"loss": {"kd_weight": 0.0}, "deepspeed": {"student": "mine.json"}}
    )
    check_hpz(recipe, {"zero_optimization": {"zero_hpz_partition_size": size}}, nodes)


@pytest.mark.parametrize(
    ("keys", "nodes"),
    [
        ("aaaa", ((0, 1, 2, 3),)),
        ("aabb", ((0, 1), (2, 3))),
        ("abab", ((0, 2), (1, 3))),  # as srun --distribution=cyclic numbers them
        ("abbb", ((0,), (1, 2, 3))),
    ],
)
def test_ranks_with_the_same_key_share_a_node(keys: str, nodes: Nodes) -> None:
    assert divide(keys) == nodes


@pytest.mark.parametrize(
    ("size", "nodes"),
    [
        (1, ((0,), (1,))),
        (2, ((0, 1), (2, 3))),
        (2, ((0, 1, 2, 3),)),
        (4, ((0, 1, 2, 3),)),
        (2, ((0, 1), (2, 3, 4, 5))),
        (2, ((0, 1, 4, 5), (2, 3))),
    ],
)
def test_hpz_is_accepted_where_its_groups_stay_in_a_node(size: int, nodes: Nodes) -> None:
    check(size, nodes)


@pytest.mark.parametrize(
    ("size", "nodes", "counts"),
    [(4, ((0, 1), (2, 3)), "2"), (8, ((0, 1),), "2"), (2, ((0, 1), (2, 3, 4)), "2 and 3")],
)
def test_hpz_that_does_not_divide_a_node_is_refused(size: int, nodes: Nodes, counts: str) -> None:
    with pytest.raises(UserError) as error:
        check(size, nodes)
    assert str(error.value).startswith(
        f"deepspeed.student = 'mine.json': zero_hpz_partition_size = {size} does not divide the "
        f"ranks of every node "
        f"({counts}): set it to "
    )


def test_hpz_is_refused_where_ranks_are_not_numbered_node_by_node() -> None:
    with pytest.raises(
        UserError,
        match="puts ranks 0 and 1 into one group, but they are on different nodes: number",
    ):
        check(2, ((0, 2), (1, 3)))


@pytest.mark.parametrize(
    ("nodes", "size"), [(((0, 1), (2, 3)), (2, 2)), (((0, 1, 2), (3,)), (1, 4)), (((0,),), (1, 1))]
)
def test_nodes_of_unequal_size_are_planned_as_one(nodes: Nodes, size: tuple[int, int]) -> None:
    assert size_to_plan(nodes) == size
