"""Forked processes are what processes of their own are: nothing leaks between them, a rank that
hangs or dies ends its group, and their numbers are those of ranks under the deepspeed launcher.
"""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from forked import Forked, Ranks, run, run_ranks, server_of
from tiny import ROOT, launcher_command, wait_until, write_tiny_recipe

from kd.runs.records import read_metrics

pytestmark = pytest.mark.process
SHOW = """
import json, os, sys
facts = {"argv": list(sys.argv), "cwd": os.getcwd(), "path": sys.path[:2], "session": os.getsid(0)}
facts |= {"environment": dict(os.environ), "pid": os.getpid(), "name": __name__}
facts["open files"] = len(os.listdir("/proc/self/fd"))
import gc  # which must not close a descriptor of the server a second time
numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(30)]
gc.collect()
facts["still open"] = all(os.fstat(number) for number in numbers)
os.environ["LEFT"], sys.argv[1:] = "behind", []
os.chdir("/")
print(json.dumps(facts))
"""
RANK_0_WAITS = """
import os, sys, time
print("rank", os.environ["RANK"], flush=True)
if os.environ["RANK"] == "1":
    {end}
time.sleep(60)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "scripts" / "show.py"
    path.parent.mkdir()
    path.write_text(SHOW)
    return path


def test_a_script_has_its_own_arguments_folder_and_session(script: Path, tmp_path: Path) -> None:
    done = run([script, "a", "--b"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["argv"] == [str(script), "a", "--b"]
    assert facts["cwd"] == str(tmp_path)
    assert facts["path"][0] == str(script.parent)
    assert str(ROOT / "tests") not in facts["path"]
    assert facts["session"] == facts["pid"]
    assert facts["name"] == "__main__"
    assert facts["still open"]


def test_environment_and_folder_do_not_leak_from_one_to_the_next(script: Path) -> None:
    mine = {**os.environ, "MINE": "1", "PYTHONPATH": "/somewhere"}
    del mine["PATH"]
    first = json.loads(run([script], env=mine, cwd=script.parent).stdout)
    second = json.loads(run([script]).stdout)
    assert first["environment"] == mine
    assert first["path"] == [str(script.parent), "/somewhere"]
    assert second["environment"] == dict(os.environ)
    assert second["cwd"] == str(ROOT)
    assert "/somewhere" not in second["path"]
    assert first["open files"] == second["open files"] == 4  # three, and the folder's own


def test_a_variable_that_is_read_at_import_has_a_server_of_its_own() -> None:
    code = "import torch; print(torch.get_num_threads())"
    two = {**os.environ, "OMP_NUM_THREADS": "2"}
    assert [run(["-c", code], env=env).stdout for env in (two, None)] == ["2\n", "1\n"]
    assert server_of(two) is not server_of(dict(os.environ))


def test_what_is_imported_ahead_prints_nothing() -> None:
    """For what a command's imports print is missing from the output that tests look at."""
    run(["-c", ""])
    assert server_of(dict(os.environ)).log.read_text() == ""


@pytest.mark.parametrize(
    ("code", "status", "shows"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no such file')", 1, "no such file\n"),
        ("1 // 0", 1, "ZeroDivisionError"),
        ("import os; os._exit(4)", 4, ""),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'at exit')", 0, "at exit"),
    ],
)
def test_it_ends_as_a_process_does(code: str, status: int, shows: str) -> None:
    done = run(["-c", code])
    assert done.returncode == status
    assert shows in done.stderr


def test_a_module_is_run_as_python_runs_it() -> None:
    done = run(["-m", "json.tool", "--help"])
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python")


def test_a_process_that_hangs_is_killed_and_what_it_wrote_is_shown(tmp_path: Path) -> None:
    code = f"""
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
print("before the hang", flush=True)
time.sleep(60)
"""
    with pytest.raises(TimeoutError, match="still running after 2 s\nbefore the hang"):
        run(["-c", code], timeout=2)
    for pid in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=pid: has_ended(int(pid)), f"the end of {pid}")


def test_a_rank_that_hangs_fails_with_the_output_of_all_and_no_rank_is_left() -> None:
    ranks = Ranks(["-c", RANK_0_WAITS.format(end="pass")], 2)
    with pytest.raises(TimeoutError) as error:
        ranks.communicate(timeout=2)
    assert "still running after 2 s" in str(error.value)
    assert "rank 0\n" in str(error.value)
    assert "rank 1\n" in str(error.value)
    for rank in ranks.ranks:
        wait_until(lambda rank=rank: rank.poll() == -signal.SIGKILL, "its end")


@pytest.mark.parametrize(
    ("end", "status"),
    [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 247), ("raise ValueError('odd')", 1)],
)
def test_a_rank_that_dies_ends_the_others_with_the_launchers_status(end: str, status: int) -> None:
    ranks = Ranks(["-c", RANK_0_WAITS.format(end=end)], 2)
    output, errors = ranks.communicate(timeout=30)
    assert ranks.wait() == status
    assert sorted(output.splitlines()) == ["rank 0", "rank 1"]
    assert ("ValueError: odd" in errors) == (status == 1)
    assert ranks.ranks[0].returncode == -signal.SIGTERM


def test_a_rank_may_finish_what_it_does_when_told_to_end() -> None:
    handler = "signal.signal(15, lambda *_: (print('saved', flush=True), os._exit(85)))"
    code = f"import signal, os\n{handler}\n{RANK_0_WAITS.format(end='sys.exit(7)')}"
    done = run_ranks(["-c", code], 2)
    assert done.returncode == 7
    assert "saved" in done.stdout


def test_children_of_a_killed_client_end_with_its_server(tmp_path: Path) -> None:
    """pytest may be killed: nothing that it started may stay."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT / "tests")!r})
import tiny, forked
print(forked.Forked(["-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""
    client = Forked(["-c", code])
    pid = int(wait_until(lambda: client.written()[0], "its child", 60))
    assert not has_ended(pid)
    client.send_signal(signal.SIGKILL)
    wait_until(lambda: has_ended(pid), "the child's end")


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_what_a_nested_process_starts_is_forked_too_with_its_files_signals_and_status() -> None:
    child = "import os, time; print('child', os.getppid(), flush=True); time.sleep(60)"
    code = f"""
import os, subprocess, sys, time
process = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, text=True)
print(process.stdout.readline(), os.getppid())
process.terminate()
print(process.wait(), subprocess.call([sys.executable, "-c", "import sys; sys.exit(3)"]))
"""
    process = Forked(["-c", code], nested=True)
    output, errors = process.communicate(30)
    assert process.wait() == 0, errors
    word, server, same, first, second = output.split()
    assert (word, server, first, second) == ("child", same, str(-signal.SIGTERM), "3")


@pytest.mark.dist
def test_two_forked_runs_and_one_of_the_deepspeed_launcher_have_the_same_losses_bit_for_bit(
    tmp_path: Path,
) -> None:
    """The launcher's ranks hash strings in other ways than the forked ones, too."""
    recipe = write_tiny_recipe(tmp_path)

    def arguments(name: str) -> list[str]:
        return ["launch/train.py", "--recipe", str(recipe), f"--set=run.name={name}", *STEPS]

    done = [run_ranks(arguments(name), 2) for name in ("one", "two")]
    command = launcher_command(*arguments("launcher"))
    done += [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)]
    assert [run.returncode for run in done] == [0, 0, 0], done[-1].stderr[-3000:]
    curves = [losses(tmp_path / "runs" / name) for name in ("one", "two", "launcher")]
    assert len(curves[0]) == 4
    assert curves[0] == curves[1] == curves[2]


STEPS = ["--set=training.max_steps=4", "--set=training.checkpoint_every=4"]
FIELDS = ("step", "loss", "kd", "ce", "grad_norm", "val_loss", "diagnostics", "val_diagnostics")


def losses(run: Path) -> list[list[object]]:
    records = read_metrics(run / "metrics.jsonl")
    return [[record.get(field) for field in FIELDS] for record in records]


def test_coverage_of_a_process_that_leaves_at_once_is_saved(tmp_path: Path) -> None:
    """As kd.cli leaves; where coverage measures subprocesses."""
    import coverage  # noqa: F401

    (tmp_path / "rc").write_text(f"[run]\nparallel = true\ndata_file = {tmp_path}/data\n")
    (tmp_path / "leave.py").write_text("import os\nos._exit(5)\n")
    environment = {**os.environ, "COVERAGE_PROCESS_START": str(tmp_path / "rc")}
    assert run([tmp_path / "leave.py"], env=environment).returncode == 5
    (data,) = tmp_path.glob("data.*")
    from coverage import CoverageData

    measured = CoverageData(str(data))
    measured.read()
    assert measured.lines(str(tmp_path / "leave.py")) == [1, 2]
