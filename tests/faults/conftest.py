"""What each fault showed, how long it took and what it cost: collected by the tests, written when
they end.
"""

from typing import Any

import pytest
from fault_messages import markdown
from tiny import ROOT

from kd.files import write_json, write_text
from kd.runs.environment import environment


@pytest.fixture(scope="session")
def fault_table() -> list[dict[str, Any]]:
    """Rows {fault, shows, seconds, lost_steps}, written to build/faults as JSON and Markdown."""
    rows: list[dict[str, Any]] = []
    yield rows
    if rows:
        folder = ROOT / "build" / "faults"
        command = "make fault"
        write_json(
            folder / "faults.json", {"command": command, "environment": environment(), "rows": rows}
        )
        write_text(folder / "faults.md", markdown(rows))
