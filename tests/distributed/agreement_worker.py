"""One rank: agree with the others on the recipe, then join their process group. agreement_worker.py
RECIPE [SET ...]
"""

import sys
from datetime import timedelta

import torch.distributed as dist

from kd.cli import run
from kd.distributed.agreement import check_same_everywhere
from kd.distributed.process_group import init_distributed
from kd.recipe import load_recipe
from kd.runs.environment import facts_of_rank


def main() -> None:
    check_same_everywhere(
        facts_of_rank(load_recipe(sys.argv[1], sys.argv[2:])), timedelta(minutes=2)
    )
    init_distributed()
    dist.barrier()
    print(f"rank {dist.get_rank()} goes on")


if __name__ == "__main__":
    run(main)
