"""Study how the part of each trace that a student is trained on changes its quality and cost: one
run per cell.

python launch/study.py --recipe tiny --keep 0.25,0.5,0.75,1.0 --seeds 3
python launch/report.py runs/studies/tiny -o report

The same command continues an interrupted study, and skips cells that are done.
"""

import sys
from pathlib import Path

from kd.cli import CacheRequest, axis_arguments, recipe_parser, run
from kd.errors import UserError
from kd.logs import configure_logging
from kd.study.cells import axes_of, make_study


def main() -> None:
    parser = axis_arguments(recipe_parser("Train and score one run for each cell of a study."))
    parser.add_argument(
        "--output", type=Path, help="folder of the study; default: run.output_dir/studies/RECIPE"
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        help="train on these hosts, with launch/hosts.sh, instead of on this machine",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="with --hostfile: how often to restart a cell after a dead rank or host, as "
        "launch/hosts.sh does (%(default)s)",
    )
    parser.add_argument(
        "--cache",
        nargs="?",
        const="hidden",
        choices=("hidden", "top_k", "sampled"),
        help="run the teacher once over whole traces and train every cell from this cache; the "
        "values are those of --kind in launch/cache.py (%(const)s)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=("fp32", "bf16", "int8"),
        default="bf16",
        help="dtype of hidden states (%(default)s)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check and list the cells, and train nothing"
    )
    arguments = parser.parse_args()
    if arguments.restarts < 0 or (arguments.restarts and not arguments.hostfile):
        raise UserError(
            f"--restarts {arguments.restarts}: write a whole number, and add --hostfile"
        )
    configure_logging(rank=0)
    axes = axes_of(arguments)
    cache = None
    if arguments.cache:
        if arguments.hostfile:
            raise UserError(
                "--cache cannot be combined with --hostfile: fill a cache on the hosts with "
                "launch/cache.py, then add --set teacher.cache=FOLDER"
            )
        cache = CacheRequest(arguments.cache, arguments.cache_dtype)
    study = make_study(arguments.recipe, arguments.overrides, axes, arguments.output, cache)
    from kd.study.runner import Runner, check_study  # imports torch and transformers

    if arguments.dry_run:
        check_study(study)
        print(*(cell.point.name for cell in study.cells), sep="\n")
        return
    runner = Runner(study, arguments.hostfile, arguments.restarts)
    num_failed = 0
    for index, (cell, outcome) in enumerate(runner.run(), start=1):
        text = outcome.text if outcome.status == "done" else f"{outcome.status}: {outcome.text}"
        print(f"{index}/{len(study.cells)}  {cell.point.name}  {text}", flush=True)
        num_failed += outcome.status == "failed"
    print(f"\nreport: python launch/report.py {study.folder} -o {study.folder}/report")
    if num_failed:
        sys.exit(
            f"{num_failed} of {len(study.cells)} cells failed; run the same command to try them "
            "again"
        )


if __name__ == "__main__":
    run(main)
