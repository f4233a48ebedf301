"""The table of faults: what a user sees of each, as Markdown."""

import re
import socket
from pathlib import Path
from typing import Any

NOISE = re.compile(r"it/s|step/s|Warning|warnings\.warn|^\s*$|^\[[\d-]+ [\d:,]+\]")


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| fault, on one of two ranks | what the user sees | seconds to the end | steps lost |",
        "|---|---|---|---|",
    ]
    for row in rows:
        seconds = "at the next start" if row["seconds"] is None else f"{row['seconds']:.1f}"
        shows = (
            row["shows"]
            if len(row["shows"]) < 140
            else f"{row['shows'][:140].rsplit(' ', 1)[0]} ..."
        )
        lines.append(f"| {row['fault']} | `{shows}` | {seconds} | {row['lost_steps']} |")
    return "\n".join(lines) + "\n"


def message_of(stderr: str, pattern: str, folder: Path) -> str:
    """The line of stderr that holds the pattern, without the time, the paths and the host of the
    test.
    """
    lines = [
        line for line in stderr.splitlines() if re.search(pattern, line) and not NOISE.search(line)
    ]
    assert lines, f"nothing says {pattern!r}:\n{stderr[-4000:]}"
    return (
        re.sub(r"^\d\d:\d\d:\d\d ", "", lines[0])
        .replace(str(folder), "RUN")
        .replace(f" on {socket.gethostname()}", " on HOST")
        .strip()
    )
