"""Report how much of the accuracy of whole traces runs kept, and what they saved: a page with
plots, tables and links to the runs.

python launch/report.py RUNS [RUNS ...] --output DIR
"""

import argparse
from pathlib import Path

from kd.cli import run


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write index.html, report.md and report.json about finished runs."
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="a run's folder, or a folder that holds runs",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        help="a new folder, or that of an earlier report",
    )
    arguments = parser.parse_args()
    from kd.report.render import write_report  # after --help: it imports matplotlib

    write_report(arguments.runs, arguments.output)
    print(arguments.output / "index.html")


if __name__ == "__main__":
    run(main)
