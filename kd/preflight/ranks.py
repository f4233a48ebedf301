"""All checks by every rank: what each finds by itself, then what needs a process group.

A rank that does not come is a line after timeout_seconds, and never a hang.
"""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from kd.distributed.agreement import agree, gather_facts
from kd.distributed.peers import watching
from kd.distributed.process_group import find_ranks, init_distributed, on_rank_zero
from kd.errors import LostPeer, NotMet, UserError
from kd.preflight.disk import check_disk
from kd.preflight.facts import Facts, facts_of_rank, judge, plan_for
from kd.preflight.network import check_bandwidth, check_port
from kd.preflight.verdict import Check, fail, ok
from kd.recipe import Recipe


def check_ranks(recipe: Recipe, *, timeout_seconds: float, min_bandwidth: float) -> bool:
    """Run all checks, print a line for each, and return whether none failed.

    Collective: every rank must call this.
    min_bandwidth: in GB/s. Rank 0 prints, and a rank that cannot reach the others.
    """
    try:
        find_ranks()
    except UserError as error:
        return _show([fail("port", str(error))])
    # Where torchrun started the ranks, its agent listens there already.
    if (
        os.environ["RANK"] == "0"
        and "TORCHELASTIC_RUN_ID" not in os.environ
        and not _show([check_port()])
    ):
        return False

    facts, stage, passed = facts_of_rank(recipe), "rendezvous", True
    try:
        with watching([]):
            everyone = gather_facts(facts, timedelta(seconds=timeout_seconds))
            passed = everyone is None or _show(judge(recipe, everyone))
            if agree(_why_not_together(everyone), timedelta(seconds=timeout_seconds)):
                return False
            stage = "process group"
            layout = init_distributed(timeout_seconds / 60)
            plan = on_rank_zero(lambda: plan_for(recipe, everyone or []))
            passed &= _show([ok(stage, f"{dist.get_backend()}, over {os.environ['MASTER_ADDR']}")])
            stage = "shared folder"
            passed &= _show(check_disk(plan, layout))
            stage = "bandwidth"
            passed &= _show(check_bandwidth(plan, layout, timeout_seconds / 60, min_bandwidth))
            return on_rank_zero(lambda: passed)
    except NotMet as error:
        return _show([fail(stage, str(error))], is_everyones=False)
    except UserError:
        return False  # of the recipe, which judge has shown
    except LostPeer as error:
        return _show([fail(stage, _describe(error, timeout_seconds))], is_everyones=False)


def _describe(error: LostPeer, timeout_seconds: float) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return (
        f"rank {os.environ['RANK']} on {socket.gethostname()} did not reach the others at {where} "
        f"within {timeout_seconds:g} s: check that all ranks started and that no firewall blocks "
        f"them [{str(error.__cause__).strip().splitlines()[0]}]"
    )


def _show(checks: list[Check], *, is_everyones: bool = True) -> bool:
    """Return whether none failed; printed by rank 0, and by each rank that has its own to tell."""
    if os.environ["RANK"] == "0" or not is_everyones:
        for check in checks:
            print(check, flush=True)
    return all(check.status != "FAIL" for check in checks)


def _why_not_together(everyone: list[Facts] | None) -> str | None:
    """Ranks on devices of two kinds would wait in two process groups."""
    devices = {facts["environment"]["device"] for facts in everyone or []}
    return "devices differ" if len(devices) > 1 else None
