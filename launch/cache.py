"""Run the teacher once over whole traces, and store the result for every length, seed and student:

deepspeed launch/cache.py --recipe NAME --output FOLDER [--kind hidden --dtype bf16]

Then train with --set teacher.cache=FOLDER: no teacher is loaded. Run the same command again to fill
what is missing: new rows, damaged shards, or the rest after an interruption. torchrun, srun and
plain python can start it too. A teacher behind a server can fill a cache of its most likely tokens:

python launch/cache.py --recipe NAME --output FOLDER --kind top_k --server http://HOST:8000
"""

import argparse
import sys
from pathlib import Path

from kd.cli import recipe_parser, run
from kd.distributed.interruption import Interruption
from kd.errors import UserError
from kd.recipe import load_recipe


def main() -> None:
    interruption = Interruption()
    arguments = parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.verify:
        verify(arguments.output)
        return
    from kd.training.fill_cache import fill_cache, make_kind  # after --help: it imports torch

    kind = make_kind(recipe, arguments.kind, arguments.dtype, arguments.num_tokens)
    shard_bytes = arguments.shard_mib * 2**20
    if arguments.server is not None:
        from kd.training.fill_from_server import fill_from_server

        folder, url = arguments.output, arguments.server
        fill_from_server(recipe, kind, folder, url, interruption, shard_bytes=shard_bytes)
        return
    fill_cache(recipe, kind, arguments.output, interruption, shard_bytes=shard_bytes)


def parse_args() -> argparse.Namespace:
    parser = recipe_parser(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="folder of the cache"
    )
    parser.add_argument(
        "--kind",
        choices=("hidden", "vector", "top_k", "sampled"),
        default="hidden",
        help="hidden: last hidden states, for any divergence and temperature. The others are for "
        "the recipe's loss.temperature only. vector: exact forward_kl for a student with a frozen "
        "head; top_k: the most likely tokens; sampled: drawn tokens, for forward_kl",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "int8"),
        default="bf16",
        help="dtype of hidden and vector; hidden is exact if this is no narrower than the "
        "teacher's dtype",
    )
    parser.add_argument(
        "--num-tokens",
        type=int,
        metavar="K",
        help="tokens per position of top_k (128) or sampled (12)",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="a vLLM server that has loaded the teacher, for top_k; if the weights are on this "
        "machine too, they are loaded to compare a few rows",
    )
    parser.add_argument(
        "--shard-mib", type=int, default=256, metavar="N", help="MiB per shard (%(default)s)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every byte, list what is damaged, and fill nothing",
    )
    parser.add_argument(
        "--local_rank",
        type=int,
        help="set by some launchers and ignored; LOCAL_RANK is read instead",
    )
    arguments = parser.parse_args()
    if arguments.shard_mib < 1:
        raise UserError(f"--shard-mib {arguments.shard_mib}: write at least 1")
    return arguments


def verify(folder: Path) -> None:
    """Raises UserError that names each damaged shard."""
    from kd.cache.store import damage_of, read_manifest

    read_manifest(folder)
    damaged = [f"  {shard}: {what}" for shard, what in damage_of(folder)]
    if damaged:
        listing = "\n".join(damaged)
        raise UserError(
            f"{folder}: {len(damaged)} shards are damaged:\n"
            f"{listing}\n"
            "Run launch/cache.py with the recipe that filled it: it fills only these again"
        )
    print(f"ok: {folder} has no damaged shard", file=sys.stderr)


if __name__ == "__main__":
    run(main)
