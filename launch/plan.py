"""What a run costs at several truncation lengths: memory of each GPU, FLOPs, tokens and hours, and
whether it fits.

python launch/plan.py --recipe NAME --nodes 2 --gpus-per-node 8 --gpu h100 [--keep 0.25,0.5,1.0]
[--json FILE]

Needs no GPU, and nothing is fetched. Lengths are those of the data where they are here, else those
of --mean-tokens and --max-tokens, or the longest that the recipe lets pass.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from kd.cli import recipe_parser, run
from kd.constants import DEFAULT_MFU
from kd.errors import UserError
from kd.files import write_json
from kd.recipe import load_recipe
from kd.study.cells import parse_fractions


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub's library is imported
    arguments = parse_args()
    # DeepSpeed says on stdout that a login node has no GPU.
    with contextlib.redirect_stdout(sys.stderr):
        report = make_report(arguments)
    if arguments.json:
        write_json(arguments.json, report)
    from kd.plan.plan_table import print_report  # the package imports torch

    print_report(report)


def parse_args() -> argparse.Namespace:
    parser = recipe_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, required=True, help="and as many ranks")
    parser.add_argument("--gpu", help="its kind, as in h100: for hours, and whether the run fits")
    parser.add_argument(
        "--keep",
        default="0.25,0.5,0.75,1.0",
        metavar="X,Y",
        help="truncation.keep_fraction of each",
    )
    parser.add_argument(
        "--mfu", type=float, default=DEFAULT_MFU, help="share of the GPUs' peak that is reached"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    stated = parser.add_argument_group("lengths, in place of the data's")
    stated.add_argument(
        "--mean-tokens", type=int, metavar="N", help="of whole sequences, on average"
    )
    stated.add_argument("--max-tokens", type=int, metavar="N", help="of the longest one")
    stated.add_argument("--rows", type=int, metavar="N", help="for training")
    return parser.parse_args()


def make_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plans as JSON. Raises UserError for a bad argument, or an unknown model."""
    keep_fractions = check_arguments(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from kd.plan.cost import plan_run
    from kd.plan.gpus import named_gpu  # the package imports torch
    from kd.plan.lengths import find_traces, state_traces

    gpu = named_gpu(arguments.gpu) if arguments.gpu else None
    figures = arguments.mean_tokens, arguments.max_tokens, arguments.rows
    traces = state_traces(recipe, *figures) if any(figures) else find_traces(recipe)
    plans = []
    for keep_fraction in keep_fractions:
        kept = recipe.with_values({"truncation.keep_fraction": keep_fraction})
        plan = plan_run(
            kept,
            *traces.read(kept, arguments.nodes * arguments.gpus_per_node),
            traces.longest,
            num_nodes=arguments.nodes,
            gpus_per_node=arguments.gpus_per_node,
        )
        plans.append(plan.as_dict(gpu, arguments.mfu))
    return {
        "recipe": recipe.run.name,
        "num_nodes": arguments.nodes,
        "gpus_per_node": arguments.gpus_per_node,
        "gpu": arguments.gpu,
        "gpu_peak_tflops": gpu and gpu.tflops,
        "mfu": arguments.mfu,
        "lengths": str(traces),
        "plans": plans,
    }


def check_arguments(arguments: argparse.Namespace) -> tuple[float, ...]:
    """The fractions of --keep. Raises UserError for an argument out of range."""
    for name in ("nodes", "gpus_per_node", "mean_tokens", "max_tokens", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1 is needed")
    if not 0 < arguments.mfu <= 1:
        raise UserError(
            f"--mfu {arguments.mfu}: write a share of the GPUs' peak above 0 and up to 1, as in 0.4"
        )
    return parse_fractions(arguments.keep)


if __name__ == "__main__":
    run(main)
