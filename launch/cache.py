"""Compute once what a teacher says of whole traces, for every truncation length, seed and student:

deepspeed launch/cache.py --recipe NAME --output FOLDER [--kind hidden --dtype bf16]

Then train with --set teacher.cache=FOLDER, and no teacher is loaded. Started again it fills what is
missing: more rows, damaged shards, or what was left when it was stopped. torchrun, srun and plain
python start it too. A teacher that is served somewhere fills a cache of its likeliest tokens:

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
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--kind",
        choices=("hidden", "vector", "top_k", "sampled"),
        default="hidden",
        help="hidden: last states, for any divergence and temperature; and at loss.temperature: "
        "vector, exact forward_kl for a student whose head is frozen; top_k, the likeliest tokens; "
        "sampled, drawn tokens, for forward_kl",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "int8"),
        default="bf16",
        help="of hidden (exact where it is no narrower than the teacher's own) and vector",
    )
    parser.add_argument(
        "--num-tokens", type=int, metavar="K", help="of top_k (128) and sampled (12)"
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="of a vLLM server that has the teacher, for top_k: none is loaded here, but for a few "
        "rows to compare where its weights are",
    )
    parser.add_argument(
        "--shard-mib", type=int, default=256, metavar="N", help="MiB of a shard (%(default)s)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every byte, name what is damaged, fill nothing"
    )
    parser.add_argument(
        "--local_rank", type=int, help="set by some launchers; LOCAL_RANK is what counts"
    )
    arguments = parser.parse_args()
    if arguments.shard_mib < 1:
        raise UserError(f"--shard-mib {arguments.shard_mib}: at least 1 is needed")
    return arguments


def verify(folder: Path) -> None:
    """Raises UserError that names each damaged shard."""
    from kd.cache.store import damage_of, read_manifest

    read_manifest(folder)
    damaged = [f"  {shard}: {what}" for shard, what in damage_of(folder)]
    if damaged:
        listing = "\n".join(damaged)
        raise UserError(
            f"{folder}: {len(damaged)} shards are damaged:\n{listing}\nFill it again with the "
            "recipe that filled it: only these are filled"
        )
    print(f"ok: {folder} is whole", file=sys.stderr)


if __name__ == "__main__":
    run(main)
