"""Train a recipe's student: `deepspeed launch/train.py --recipe NAME`; with --check, only check the
recipe.
"""

import contextlib
import sys

from kd.cli import recipe_parser, run
from kd.distributed.interruption import Interruption
from kd.distributed.ports import port_of_run
from kd.recipe import load_recipe


def main() -> None:
    interruption = Interruption()
    parser = recipe_parser(__doc__)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue from the newest whole checkpoint, or from PATH",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="resolve, check and print the recipe, and train nothing",
    )
    parser.add_argument(
        "--print-run",
        action="store_true",
        help="print the run's folder and port, and train nothing",
    )
    parser.add_argument(
        "--local_rank",
        type=int,
        help="set by some launchers and ignored; LOCAL_RANK is read instead",
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.print_run:
        print(recipe.run_dir, port_of_run(recipe.run_dir), sep="\n")
        return
    if arguments.check:
        from kd.runs.check import check_recipe

        check_recipe(recipe)
        with contextlib.suppress(BrokenPipeError):  # all is checked: head may have read enough
            print(recipe.model_dump_json(indent=2))
        print(f"ok: results will be in {recipe.run_dir}", file=sys.stderr)
        return
    # After --check: it imports torch, transformers and deepspeed
    from kd.training.loop import (
        train,
    )

    train(recipe, interruption, resume=arguments.resume)


if __name__ == "__main__":
    run(main)
