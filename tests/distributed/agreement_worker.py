"""One rank: agree with the others on the recipe, then join their process group. agreement_worker.py RECIPE [SET ...]"""

import sys

import torch.distributed as dist

from kd.agreement import check_same_everywhere
from kd.cli import run
from kd.engine.distributed import init_distributed
from kd.recipe import load_recipe


def main() -> None:
    check_same_everywhere(load_recipe(sys.argv[1], sys.argv[2:]))
    init_distributed()
    dist.barrier()
    print(f"rank {dist.get_rank()} goes on")


if __name__ == "__main__":
    run(main)
