"""Estimate what a run costs at several truncation lengths: memory per GPU, FLOPs, tokens and hours,
what bounds its time, whether it fits, and which placement of its models would be faster.

python launch/plan.py --recipe NAME --nodes 2 --gpus-per-node 8 --gpu h100 [--keep 0.25,0.5,1.0]
[--json FILE]

Needs no GPU and fetches nothing. Lengths come from --mean-tokens, --max-tokens and --rows if any is
given, else from the data if they are on this machine, or else from the longest example that the
recipe allows.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.cli import recipe_parser, run
from kd.constants import DISK_GB_S, NETWORK_GBPS
from kd.errors import UserError
from kd.files import write_json
from kd.recipe import Recipe, load_recipe
from kd.study.cells import parse_fractions

if TYPE_CHECKING:
    from kd.plan.gpus import Site  # the package imports torch
    from kd.plan.lengths import Traces


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
    parser.add_argument("--nodes", type=int, default=1, help="number of nodes (%(default)s)")
    parser.add_argument(
        "--gpus-per-node", type=int, required=True, help="GPUs of each node, with one rank on each"
    )
    parser.add_argument(
        "--gpu", help="kind of GPU, such as h100; adds times, and whether the run fits"
    )
    parser.add_argument(
        "--network-gbps",
        type=float,
        default=NETWORK_GBPS,
        metavar="N",
        help="Gbit/s between nodes, over all adapters of a node (%(default)g)",
    )
    parser.add_argument(
        "--disk-gb-s",
        type=float,
        default=DISK_GB_S,
        metavar="N",
        help="GB/s at which all nodes together write a checkpoint (%(default)g)",
    )
    parser.add_argument(
        "--keep",
        default="0.25,0.5,0.75,1.0",
        metavar="X,Y",
        help="the values of truncation.keep_fraction to plan (%(default)s)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the whole plan to this file"
    )
    stated = parser.add_argument_group("lengths to use instead of those of the data")
    stated.add_argument(
        "--mean-tokens", type=int, metavar="N", help="mean tokens of whole sequences"
    )
    stated.add_argument(
        "--max-tokens", type=int, metavar="N", help="tokens of the longest sequence"
    )
    stated.add_argument("--rows", type=int, metavar="N", help="number of training rows")
    return parser.parse_args()


def make_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plans as JSON. Raises UserError for a bad argument, or an unknown model."""
    keep_fractions = check_arguments(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from kd.plan.cache_cost import describe_cache  # the package imports torch
    from kd.plan.cost import plan_run
    from kd.plan.gpus import Site, named_gpu
    from kd.plan.lengths import find_traces, state_traces
    from kd.plan.placement import settle

    nodes, ranks = arguments.nodes, arguments.gpus_per_node
    site, choice = None, ""
    if arguments.gpu:
        gpu = named_gpu(arguments.gpu)
        site = Site(gpu, nodes, ranks, arguments.network_gbps, arguments.disk_gb_s)
        recipe, choice = settle(recipe, nodes, ranks, gpu.gib, site)
    elif recipe.autos:
        raise UserError(f'{" and ".join(recipe.autos)} = "auto" depends on the GPU: add --gpu KIND')
    figures = arguments.mean_tokens, arguments.max_tokens, arguments.rows
    traces = state_traces(recipe, *figures) if any(figures) else find_traces(recipe)
    plans, notes = [], []
    for keep_fraction in keep_fractions:
        kept = recipe.with_values({"truncation.keep_fraction": keep_fraction})
        lengths, steps = traces.read(kept, nodes * ranks)
        sizes = {"num_nodes": nodes, "gpus_per_node": ranks}
        plan = plan_run(kept, lengths, steps, traces.longest, **sizes)
        plans.append(plan.as_dict(site))
        notes.append(describe_cache(kept, plan, traces, site))
    return {
        "recipe": recipe.run.name,
        "num_nodes": nodes,
        "gpus_per_node": ranks,
        "gpu": arguments.gpu,
        "gpu_peak_tflops": site and site.gpu.tflops,
        "network_gbps": arguments.network_gbps,
        "disk_gb_s": arguments.disk_gb_s,
        "choice": choice,
        "lengths": str(traces),
        "cache": notes[-1],
        "plans": plans,
        "placements": site and placements_of(recipe, traces, site),
    }


def placements_of(recipe: Recipe, traces: "Traces", site: "Site") -> dict[str, Any]:
    """Where the models may live, at the recipe's own length, the fastest first."""
    from kd.plan.placement import compare  # the package imports torch

    rows = [
        {
            "settings": one.settings,
            "fits": one.fits,
            "total_gib": one.plan.memory.total_gib,
            "seconds_per_step": one.plan.step_time(site).seconds,
            "bound": one.plan.step_time(site).bound,
            "mfu": one.plan.mfu(site),
        }
        for one in compare(recipe, traces, site)
    ]
    return {"keep_fraction": recipe.truncation.keep_fraction, "rows": rows}


def check_arguments(arguments: argparse.Namespace) -> tuple[float, ...]:
    """The fractions of --keep. Raises UserError for an argument out of range."""
    for name in ("nodes", "gpus_per_node", "mean_tokens", "max_tokens", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: write at least 1")
    for name in ("network_gbps", "disk_gb_s"):
        value = getattr(arguments, name)
        if not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} {value}: write a rate above 0")
    return parse_fractions(arguments.keep)


if __name__ == "__main__":
    run(main)
