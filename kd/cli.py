"""What every command in launch/ shares: the recipe arguments, and errors printed once, in one block."""

import argparse
import os
import sys
import time
from collections.abc import Callable

from kd.errors import UserError


def recipe_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", required=True, help="a name from recipes/, or the path of a .toml file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the recipe; may be repeated",
    )
    return parser


def run(main: Callable[[], None]) -> None:
    """Call main(); print a UserError as one block on stderr and exit with status 2.

    Most errors are the same on every rank, and rank 0 speaks for all: it exits at once, upon which the launcher ends
    the others. A rank that is still alive after three seconds met an error of its own, and speaks for itself.
    """
    try:
        main()
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(3)
        where = f" on rank {rank}" if rank else ""
        print(f"\nerror{where}: {error}\n", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: other ranks may be waiting in a collective, and destructors would join them
