"""Push a finished run's export to the Hugging Face hub, with a model card made from the run; or
write only the card.

python launch/export.py RUN --push owner/name
python launch/export.py RUN --card FILE
"""

import argparse
from pathlib import Path

from kd.cli import run
from kd.errors import UserError
from kd.files import write_text


def main() -> None:
    args = parse_args()
    from kd.publish.licence import find_licence  # after --help: they import the hub's client
    from kd.publish.model_card import model_card, read_finished
    from kd.publish.push import check_repo_id, exported_files, push

    if args.push:
        check_repo_id(args.push)
    finished = read_finished(args.run)
    files = {} if args.card or args.card_only else exported_files(finished.run.folder, args.which)
    base = finished.base
    revision = base.as_read().get("revision") if base else None
    licence = find_licence(args.license, base.model if base else None, revision)
    card = model_card(finished, args.which, licence)
    if args.card:
        write_card(args.card, card)
        return
    contents: dict[str, Path | bytes] = {**files, "README.md": card.encode()}
    if args.dry_run:
        for name, content in sorted(contents.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>15,} {name}")
        print(f"not pushed to {args.push} (--dry-run)")
        return
    print(push(contents, args.push, private=args.private, revision=args.revision))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Push a finished run's export to the Hugging Face hub in one commit, with a "
        "model card. The card lists the recipe and the command that trains it, models, data, "
        "scores with 95 % intervals, cost and versions. It also shows the paths in the recipe, so "
        "read it first, with --card. Pushing was tested against a server that imitates the hub, "
        "not against the hub."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder of a finished run (it has a file SUCCESS)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="a model repository; it is created if it does not exist",
    )
    what.add_argument(
        "--card", type=Path, metavar="FILE", help="write the model card and push nothing"
    )
    parser.add_argument(
        "--which",
        choices=["best", "last"],
        default="best",
        help="which export to push; default: best",
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the model, as a hub id or in your words; default: what the base model's "
        "README.md states, in its folder or on the hub. It is required if that states none, since "
        "a licence is never guessed",
    )
    of_push = parser.add_argument_group("options of --push")
    of_push.add_argument(
        "--private",
        action="store_true",
        help="make the repository private; an error if it exists and is public",
    )
    of_push.add_argument(
        "--revision", metavar="BRANCH", help="branch to push to; it is created if it does not exist"
    )
    of_push.add_argument("--card-only", action="store_true", help="push only the card")
    of_push.add_argument(
        "--dry-run",
        action="store_true",
        help="list what would be pushed, and push nothing; needs no token",
    )
    args = parser.parse_args()
    if args.card and (args.private or args.revision or args.card_only or args.dry_run):
        parser.error("--private, --revision, --card-only and --dry-run need --push: add it")
    return args


def write_card(path: Path, card: str) -> None:
    try:
        write_text(path, card)
    except OSError as error:
        raise UserError(
            f"--card = {str(path)!r}: cannot be written: {error}; name another file"
        ) from error
    print(path)


if __name__ == "__main__":
    run(main)
