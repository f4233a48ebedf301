"""A finished run's export, pushed to the Hugging Face hub with a model card that is made from the
run; or the card alone.

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
        "model card: its recipe and the command that trains it, models, data, scores with 95 % "
        "intervals, cost, versions. The card holds the paths that the recipe holds: read it first, "
        "with --card. It was run against a server that stands in for the hub, and not against the "
        "hub itself."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run with SUCCESS")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--push", metavar="OWNER/NAME", help="a model repository, which is made if it is not there"
    )
    what.add_argument(
        "--card", type=Path, metavar="FILE", help="write the model card, push nothing"
    )
    parser.add_argument(
        "--which", choices=["best", "last"], default="best", help="which export; best when absent"
    )
    parser.add_argument(
        "--license",
        metavar="ID",
        help="of the model, an id of the hub's list or other; when absent, the one that the base "
        "model's README.md states, in its folder or on the hub. It is required where that states "
        "none: nothing is guessed, since whoever loads the model relies on it",
    )
    of_push = parser.add_argument_group("of --push")
    of_push.add_argument(
        "--private",
        action="store_true",
        help="make the repository private; an error where it is there and public",
    )
    of_push.add_argument("--revision", metavar="BRANCH", help="made if it is not there")
    of_push.add_argument("--card-only", action="store_true", help="push the card and no other file")
    of_push.add_argument(
        "--dry-run", action="store_true", help="list what would be pushed; no token is needed"
    )
    args = parser.parse_args()
    if args.card and (args.private or args.revision or args.card_only or args.dry_run):
        parser.error("--private, --revision, --card-only and --dry-run go with --push")
    return args


def write_card(path: Path, card: str) -> None:
    try:
        write_text(path, card)
    except OSError as error:
        raise UserError(f"--card = {str(path)!r}: cannot write there: {error}") from error
    print(path)


if __name__ == "__main__":
    run(main)
