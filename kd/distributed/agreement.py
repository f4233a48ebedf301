"""Check that every rank has the same software, environment and recipe before the run starts.

A variable that did not reach one host, or another version of a package there, changes results
silently. A host that has lost its GPUs is worse: its ranks ask for another backend, and all ranks
wait for each other. So the facts are exchanged through the key-value store that torch's rendezvous
opens before there is a process group.
"""

import json
import socket
from datetime import timedelta
from typing import Any

from kd.distributed.rendezvous import store_of_run, wait_for
from kd.errors import UserError

REMEDIES = {
    "software": "install the same versions on every host, most simply in one environment on a "
    "shared file system; if a commit is None because a host has no git, set KD_COMMIT in "
    "launch/nodes.env",
    "environment": "write the variable into launch/nodes.env, which launch/hosts.sh and "
    "launch/slurm pass to every host; if the device differs, that host has lost its GPUs or their "
    "driver: leave it out",
    "recipe": "start every host with the same command and the same files",
}


def check_same_everywhere(facts: dict[str, Any], timeout: timedelta) -> None:
    """facts: this rank's "software", "environment" and "recipe", of kd.runs.environment.

    Collective: every rank must call this, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set;
    no process group is needed. Raises the same UserError on every rank when one of them differs
    from rank 0: it names the rank and its host, each fact with both values, and the remedy.
    """
    everyone = gather_facts(facts, timeout)
    verdict = agree(None if everyone is None else describe_differences(everyone), timeout)
    if verdict:
        raise UserError(verdict)


def gather_facts(facts: dict[str, Any], timeout: timedelta) -> list[dict[str, Any]] | None:
    """The facts (JSON) of all ranks by rank, each with its "host"; None except on rank 0.

    Collective: every rank must call this.
    """
    store, rank, world_size = store_of_run(timeout)
    store.set(f"facts/{rank}", json.dumps({"host": socket.gethostname(), **facts}))
    if rank:
        return None
    missing = set(range(world_size))

    def all_came() -> bool:
        missing.difference_update(r for r in sorted(missing) if store.check([f"facts/{r}"]))
        return not missing

    def who_is_missing() -> str:
        hosts: dict[str, list[int]] = {}
        for other in range(world_size):
            if other not in missing:
                host = json.loads(store.get(f"facts/{other}"))["host"]
                hosts.setdefault(host, []).append(other)
        here = ", ".join(f"{host}: {_ranges(ranks)}" for host, ranks in hosts.items())
        return f"rank {_ranges(sorted(missing))} of {world_size} has not started ({here} are here)"

    wait_for(all_came, who_is_missing, timeout)
    return [json.loads(store.get(f"facts/{other}")) for other in range(world_size)]


def _ranges(ranks: list[int]) -> str:
    """0-3, 6."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def agree(verdict: str | None, timeout: timedelta) -> str:
    """Rank 0's verdict, on every rank; returns when all have it, so that rank 0 may leave.

    Collective: every rank must call this.
    """
    store, rank, world_size = store_of_run(timeout)
    if rank == 0:
        store.set("verdict", verdict or "")
    wait_for(
        lambda: store.check(["verdict"]),
        lambda: f"rank {rank}: rank 0 still waits for other ranks to start",
        timeout,
    )
    answer = store.get("verdict").decode()
    if store.add("verdict/readers", 1) == world_size:
        store.set("verdict/all_read", "yes")
    if rank == 0:
        wait_for(
            lambda: store.check(["verdict/all_read"]),
            lambda: "rank 0: a rank that started has not read the result",
            timeout,
        )
    return answer


def describe_differences(everyone: list[dict[str, Any]]) -> str | None:
    """What the first rank that differs from rank 0 has and rank 0 has not; None when all are
    alike.
    """
    first = everyone[0]
    different = [
        rank
        for rank, facts in enumerate(everyone)
        if any(facts[kind] != first[kind] for kind in REMEDIES)
    ]
    if not different:
        return None
    rank, other = different[0], everyone[different[0]]
    more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
    lines = [f"rank {rank} on {other['host']}{more} differs from rank 0 on {first['host']}:"]
    for kind, remedy in REMEDIES.items():
        names = [
            name
            for name in first[kind] | other[kind]
            if first[kind].get(name) != other[kind].get(name)
        ]
        values = [
            f"{name} = {first[kind].get(name)!r} on rank 0, {other[kind].get(name)!r} there"
            for name in names
        ]
        lines += [f"  {value}" for value in values]
        lines += [f"  -> {remedy}"] if names else []
    return "\n".join(lines)
