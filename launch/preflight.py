"""Check what a run needs before it starts: one line per check; exit status 1 when a check fails.

python launch/preflight.py --recipe NAME                      on this machine, a rank for each GPU
python launch/preflight.py --recipe NAME --hostfile HOSTFILE  on the hosts of launch/hosts.sh
srun python launch/preflight.py --recipe NAME                 in a job: srun starts the ranks
"""

import os
import re
import sys
from pathlib import Path

from kd.cli import recipe_parser, run
from kd.errors import UserError
from kd.files import read_text
from kd.recipe import SHIPPED_DIR, load_recipe


def read_nodes_env() -> dict[str, str]:
    """The variables that a job gets: KEY=VALUE lines of launch/nodes.env, or of DS_ENV_FILE."""
    path = Path(os.environ.get("DS_ENV_FILE") or SHIPPED_DIR / "launch" / "nodes.env")
    if not path.is_file():
        return {}
    lines = [line for line in read_text(path).splitlines() if line]
    for line in lines:
        if not re.match(r"[A-Za-z_][A-Za-z_0-9]*=", line):
            raise UserError(f"{path}: {line}: write KEY=VALUE")
    return dict(line.split("=", 1) for line in lines)


def main() -> None:
    parser = recipe_parser(
        "Check hosts, network, disk, models and memory before you run this recipe."
    )
    parser.add_argument(
        "--hostfile", type=Path, help="start a rank for each slot of these hosts, over ssh"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for a missing rank (%(default)g)",
    )
    parser.add_argument(
        "--min-bandwidth",
        type=float,
        default=0.0,
        metavar="GB/S",
        help="fail if the network is slower than this",
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from kd.distributed.process_group import is_rank  # imports torch and deepspeed

    if is_rank():
        if "SLURM_PROCID" in os.environ:  # else the launcher has brought them
            os.environ |= read_nodes_env()
        from kd.logs import configure_logging
        from kd.preflight.ranks import check_ranks

        configure_logging(rank=1)  # only warnings
        passed = check_ranks(
            recipe, timeout_seconds=arguments.timeout, min_bandwidth=arguments.min_bandwidth
        )
        sys.stdout.flush()
        os._exit(0 if passed else 1)  # a process group that never came about would be waited for
    from kd.preflight.start import start_here, start_on_hosts

    if arguments.hostfile:
        sys.exit(start_on_hosts(recipe, arguments.hostfile, sys.argv[1:]))
    sys.exit(start_here(recipe, sys.argv[1:]))


if __name__ == "__main__":
    run(main)
