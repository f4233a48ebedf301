"""A folder is held by one process, for as long as it lives."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd.errors import UserError
from kd.runs.lock import hold, is_free

pytestmark = pytest.mark.process


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the folder until it is killed."""
    lines = [
        "import sys, time",
        "from pathlib import Path",
        "from kd.runs.lock import hold",
        "hold(Path(sys.argv[1]))",
    ]
    code = "\n".join([*lines, "print('held', flush=True)", "time.sleep(60)"])
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_holds_is_refused_with_its_name(tmp_path: Path, holder):
    assert not is_free(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"is in use by process {holder.pid} on .*: wait until it ends, or end it; if its "
        rf"node",
    ):
        hold(tmp_path, patience_seconds=0)


def test_a_killed_process_holds_nothing(tmp_path: Path, holder):
    holder.kill()
    holder.wait()
    assert is_free(tmp_path)
    hold(tmp_path, patience_seconds=0)
    hold(tmp_path, patience_seconds=0)  # it is this process's own


def test_a_holder_that_has_not_written_its_name_yet_is_waited_for(tmp_path: Path):
    lock = "fcntl.flock(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(0.3)"
    write = "file.write('process 1 on elsewhere'); file.flush(); time.sleep(60)"
    code = f"import fcntl, sys, time; file = open(sys.argv[1], 'w'); {lock}; {write}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by process 1 on elsewhere"):
            hold(tmp_path, patience_seconds=0)
    finally:
        process.kill()
        process.wait()
