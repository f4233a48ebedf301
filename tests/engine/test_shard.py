"""Teachers divided over all ranks or within each node, and hpZ: on one, two and four ranks, the
last as two nodes.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from shard_worker import UNEQUAL_NODES
from tiny import ROOT, launcher_command, save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

pytestmark = pytest.mark.dist
NODES = [[0, 1], [2, 3]]
WORKER = "tests/engine/shard_worker.py"
ALL_RANKS = pytest.mark.parametrize("rank", range(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODELS and OUTPUT of the worker."""
    folder = tmp_path_factory.mktemp("shard")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 170}
    save_tiny_model(folder / "teacher", seed=0, kind="qwen2", tie_word_embeddings=False, **sizes)
    save_tiny_model(folder / "student", seed=1)
    torch.manual_seed(3)
    experts = tiny_config().to_dict() | {"num_experts_per_tok": 1, "num_local_experts": 8}
    MixtralForCausalLM(MixtralConfig(**experts)).save_pretrained(folder / "experts_teacher")
    for size in (2, 4):
        config = json.loads((ROOT / "ds_configs" / "zero3_cpu.json").read_text())
        # Nothing stays from forward to backward, where hpZ gathers.
        config["zero_optimization"] |= {
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        }
        config["zero_optimization"]["zero_hpz_partition_size"] = size
        (folder / f"hpz{size}.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def log(folder: Path) -> str:
    """What rank 0 logged, on two nodes of two ranks: each has a launcher of its own."""
    hostfile = folder / "hostfile"
    hostfile.write_text("first slots=2\nsecond slots=2\n")
    command = launcher_command(WORKER, str(folder), str(folder), num_ranks=2)
    logs = [folder / f"node{node}.log" for node in range(2)]
    launchers = []
    for node, path in enumerate(logs):
        where = [
            "--hostfile",
            str(hostfile),
            "--no_ssh",
            "--node_rank",
            str(node),
            "--master_addr",
            "127.0.0.1",
        ]
        with path.open("w") as file:
            arguments = [command[0], *where, *command[1:]]
            launchers.append(
                subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        statuses = [launcher.wait(timeout=400) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.terminate()
    assert statuses == [0, 0], "\n".join(path.read_text()[-4000:] for path in logs)
    return logs[0].read_text()


@pytest.fixture(scope="module")
def ranks(folder: Path, log: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"rank{rank}_of_4.json").read_text()) for rank in range(4)]


@pytest.fixture(scope="module")
def teacher_bytes(folder: Path) -> int:
    return (
        AutoModelForCausalLM.from_pretrained(
            folder / "teacher", dtype=torch.float32
        ).num_parameters()
        * 4
    )


def test_each_launcher_starts_a_node(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["nodes"] == NODES for rank in ranks)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_teacher_is_divided_by_the_number_of_ranks(
    launch, folder: Path, teacher_bytes: int, num_ranks: int
) -> None:
    done = launch(WORKER, str(folder), str(folder), num_ranks=num_ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(num_ranks):
        result = json.loads((folder / f"rank{rank}_of_{num_ranks}.json").read_text())["world"]
        assert result["teacher shards"] == num_ranks
        assert result["teacher bytes"] == pytest.approx(teacher_bytes / num_ranks, rel=0.1)


@ALL_RANKS
@pytest.mark.parametrize(("shard", "parts"), [("world", 4), ("node", 2)])
def test_a_teacher_is_divided_over_all_ranks_or_within_a_node(
    ranks: list[dict[str, Any]], teacher_bytes: int, rank: int, shard: str, parts: int
) -> None:
    assert ranks[rank][shard]["teacher shards"] == parts
    assert ranks[rank][shard]["teacher bytes"] == pytest.approx(teacher_bytes / parts, rel=0.1)


def test_the_log_says_what_each_rank_holds_of_the_teacher(log: str, teacher_bytes: int) -> None:
    for parts in (4, 2):
        held = f"{teacher_bytes / 2**20 / parts:.1f}"
        assert f"M parameters divided over {parts} of 4 ranks, {held} to {held} MiB per rank" in log


@ALL_RANKS
@pytest.mark.parametrize("part", ["teacher", "teacher head"])
def test_gathers_of_a_teacher_within_a_node_never_leave_it(
    ranks: list[dict[str, Any]], rank: int, part: str
) -> None:
    assert ranks[rank]["world"][part] == [[0, 1, 2, 3]]
    assert ranks[rank]["node"][part] == [NODES[rank // 2]]


@ALL_RANKS
def test_the_student_does_not_see_how_its_teacher_is_divided(
    ranks: list[dict[str, Any]], rank: int
) -> None:
    world, node = ranks[rank]["world"], ranks[rank]["node"]
    assert world["losses"][-1] < world["losses"][0] - 0.5, "the student learned nothing"
    for what in (
        "losses",
        "gradients",
        "student groups",
        "student's gathers in backward",
        "hpZ group",
    ):
        assert node[what] == world[what], what
    assert node["student groups"] == [[0, 1, 2, 3]]


@ALL_RANKS
def test_with_hpz_losses_and_gradients_are_those_of_plain_zero_3(
    ranks: list[dict[str, Any]], rank: int
) -> None:
    assert ranks[rank]["hpz"]["losses"] == ranks[rank]["world"]["losses"]
    assert ranks[rank]["hpz"]["gradients"] == ranks[rank]["world"]["gradients"]


@ALL_RANKS
def test_with_hpz_the_student_gathers_within_a_node_in_backward(
    ranks: list[dict[str, Any]], rank: int
) -> None:
    hpz = ranks[rank]["hpz"]
    assert hpz["student groups"] == [[0, 1, 2, 3]]  # it is still divided over all ranks
    assert hpz["hpZ group"] == NODES[rank // 2]
    assert hpz["student's gathers in backward"] == [NODES[rank // 2]]
    assert hpz["teacher is untouched by hpZ"]


@ALL_RANKS
def test_hpz_does_not_use_old_weights_after_going_back_to_a_checkpoint(
    ranks: list[dict[str, Any]], rank: int
) -> None:
    first, again = ranks[rank]["hpz"]["resumed"]
    assert first[1] < first[0]
    assert again == first


def test_hpz_across_nodes_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert (
            "zero_hpz_partition_size = 4 does not divide the ranks of every node (2)"
            in rank["hpZ across nodes"]
        )


def test_weights_that_did_not_arrive_on_the_second_node_are_found_there(
    ranks: list[dict[str, Any]],
) -> None:
    messages = [rank["damaged node"] for rank in ranks]
    assert messages[:2] == [None, None]
    assert all(
        "teacher.model: hidden states after loading differ" in message for message in messages[2:]
    )


@ALL_RANKS
def test_experts_are_divided_within_nodes_of_different_sizes(
    ranks: list[dict[str, Any]], rank: int
) -> None:
    result = ranks[rank]["unequal nodes"]
    (node,) = (node for node in UNEQUAL_NODES if rank in node)
    assert result["shards"] == len(node)
    assert result["teacher"] == ([list(node)] if len(node) > 1 else [])
    assert result["tied"]
    assert result["error"] < 1e-5
