"""Show what a recipe's truncation keeps and drops of its traces, before you spend a GPU hour.

    python launch/audit.py --recipe NAME [--show 5] [--set section.key=value ...] [--json FILE]

Needs no GPU, and no network when models and data are cached. The numbers are also written to
audit.json in the run's folder.
"""

from pathlib import Path

from rich.console import Console

from kd.audit.audit_tables import print_audit, print_previews
from kd.audit.data_audit import audit_data
from kd.audit.preview import preview
from kd.cli import recipe_parser, run
from kd.data.dataset import load_data
from kd.data.tokenizers import load_tokenizers
from kd.errors import UserError
from kd.files import write_json
from kd.logs import configure_logging
from kd.recipe import load_recipe


def main() -> None:
    parser = recipe_parser(
        "Show what a recipe's truncation keeps and drops of its training examples."
    )
    parser.add_argument(
        "--show",
        type=int,
        default=5,
        metavar="N",
        help="how many examples to print, from the start of the training split",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="default: audit.json in the recipe's run folder",
    )
    args = parser.parse_args()
    if args.show < 0:
        raise UserError(f"--show = {args.show}: give the number of examples to print, 0 for none")
    if args.json is not None and args.json.is_dir():
        raise UserError(f"--json = {str(args.json)!r} is a folder: name a file")
    configure_logging(rank=0)
    recipe = load_recipe(args.recipe, args.overrides)
    tokenizer = load_tokenizers(recipe)
    data = load_data(recipe, tokenizer)
    audit = audit_data(recipe, data, tokenizer)
    path = args.json or recipe.run_dir / "audit.json"
    try:
        write_json(path, audit.to_json())
    except OSError as error:
        raise UserError(
            f"--json = {str(path)!r}: cannot be written ({error}); name another file"
        ) from None
    console = Console(highlight=False)
    print_audit(console, audit)
    if args.show:
        print_previews(
            console,
            [preview(data.train, i, tokenizer) for i in range(min(args.show, len(data.train)))],
        )
    console.print(f"\n{path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
