"""--help of every command, in one process."""

import runpy
import sys

import pytest
from tiny import ROOT

COMMANDS = sorted(path.name for path in (ROOT / "launch").glob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_is_for_and_names_its_arguments(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # Some set variables and handlers of signals for their process; both are put back.
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "launch" / command))["main"]()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {command}")
    summary = text.split("\n\n")[1]
    assert len(summary.split()) > 5, "it does not say what the command is for"
    assert {"recipe", "RUNS"} & set(text.replace("--", " ").split())
