"""Processes that begin where the imports end: forked from a server that has imported everything.

A Python process that trains spends 5 to 8 s on importing torch, transformers and deepspeed, and a
suite starts hundreds of them. Here one process, the server, imports them once; a test asks it for a
process by a Unix socket, it forks, and the child runs the script by runpy as `__main__`, so main()
and all below it is the real path. A child has what a process of its own has: arguments, working
directory, environment (all of it, nothing is left of the server's), sys.path, a session of its own,
files as stdout and stderr, a seed of NumPy, an end by atexit or os._exit. It differs in three ways:
what an import prints is not in its output, strings have the same hash in all children, and
/proc/PID/cmdline and /proc/PID/environ are the server's.

    run(["launch/plan.py", "--recipe", "tiny"])                  as `python launch/plan.py ...`
    run_ranks(["launch/train.py", ...], num_ranks=2)             as `deepspeed --num_gpus 2 ...`
    Forked([...]), Ranks([...], 2)                               to look at them while they run

Variables that are read at import make another server (IMPORT_VARIABLES). Tests of launchers, of
signals to them, and of what is imported start real processes. With nested=True, sys.executable of a
child is a front that asks the same server, so that what it starts with it is forked as well.

`python tests/forked.py SOCKET` is the server. It ends with its stdin, and its children with it.
`python tests/forked.py --front SOCKET ...` is such a front.
"""

import atexit
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Read while torch, triton, transformers, datasets, deepspeed or the interpreter itself start.
IMPORT_VARIABLES = ("DS_", "HF_", "LANG", "LC_", "MKL_", "OMP_", "PYTHON", "TORCH", "TRITON_")
IMPORT_VARIABLES += ("TRANSFORMERS_", "TOKENIZERS_", "LD_", "XDG_", "HOME")
# As deepspeed.launcher.launch: how long ranks run on when one has failed, and then have to end.
GRACE_SECONDS, END_SECONDS = 0.5, 30
MAX_REQUEST_BYTES = 200_000


class Request(NamedTuple):
    """Of a process; all but the files is sent as JSON."""

    arguments: list[str]
    cwd: str
    env: dict[str, str]
    front: str  # the child's sys.executable, or ""
    files: list[int]  # stdin, stdout, stderr


class Forked:
    """One process of a server, with the methods of subprocess.Popen that tests use.

    stdout and stderr are open files, subprocess.DEVNULL, subprocess.STDOUT for stderr, or None for
    temporary files, which communicate() reads.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
        stdout: IO[Any] | int | None = None,
        stderr: IO[Any] | int | None = None,
        nested: bool = False,
    ) -> None:
        """arguments: what would follow `python`: [-u] SCRIPT ..., -m MODULE ... or -c CODE ..."""
        self.args = [str(argument) for argument in arguments]
        sys.audit("forked.Forked", self.args)
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        self.output = _open(stdout)
        self.errors = self.output if stderr == subprocess.STDOUT else _open(stderr)
        self._server = server_of(environment)
        self._status = self._server.connect()
        front = str(self._server.front) if nested else ""
        with open(os.devnull) as nothing:
            files = [nothing.fileno(), self.output.fileno(), self.errors.fileno()]
            _ask(self._status, Request(self.args, str(cwd), environment, front, files))
        self.pid = int(self._receive())

    def poll(self) -> int | None:
        with suppress(TimeoutError):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its status, as subprocess gives it. Raises TimeoutError."""
        if self.returncode is None:
            self._status.settimeout(None if timeout is None else max(timeout, 1e-6))
            self.returncode = os.waitstatus_to_exitcode(int(self._receive()))
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote, once it has ended; raises TimeoutError with what it wrote until then."""
        try:
            self.wait(timeout)
        except TimeoutError:
            raise TimeoutError(_told(self.args, timeout, *self.written())) from None
        return self.written()

    def written(self) -> tuple[str, str]:
        """stdout and stderr so far; no stderr where it goes to stdout."""
        return _read(self.output), "" if self.errors is self.output else _read(self.errors)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """With all processes that it has started and that are in its session's first group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _receive(self) -> bytes:
        with suppress(ConnectionResetError):
            if message := self._status.recv(100):
                return message
        raise RuntimeError(f"the fork server ended:\n{self._server.log.read_text()[-4000:]}")


class Ranks:
    """Ranks of one node that find each other, as the deepspeed launcher starts and ends them."""

    def __init__(
        self,
        arguments: Sequence[object],
        num_ranks: int,
        *,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> None:
        self.args = [str(argument) for argument in arguments]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1"}
        common |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
        common |= {"LOCAL_SIZE": str(num_ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}
        output, errors = _open(None), _open(None)
        self.returncode: int | None = None
        self.ranks = [
            Forked(
                ["-u", *self.args],
                cwd=cwd,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=errors,
            )
            for rank in range(num_ranks)
        ]

    def poll(self) -> int | None:
        """None while no rank has failed and one runs on; then the launcher's status."""
        if self.returncode is None:
            statuses = [rank.poll() for rank in self.ranks]
            if failed := [status for status in statuses if status]:
                self.returncode = failed[0] & 255
            elif None not in statuses:
                self.returncode = 0
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The launcher's status: 0, or that of the first rank that failed, upon which the others
        are told to end, and killed half a minute later. Raises TimeoutError, when all are killed.
        """
        try:
            _wait_until(lambda: self.poll() is not None, timeout)
            assert self.returncode is not None
            if self.returncode:
                self._end()
            return self.returncode
        except TimeoutError:
            raise TimeoutError(_told(self.args, timeout, *self.ranks[0].written())) from None
        finally:
            self.kill()

    def _end(self) -> None:
        """One after another, as the launcher does."""
        time.sleep(GRACE_SECONDS)
        for rank in self.ranks:
            rank.terminate()
            with suppress(TimeoutError):
                rank.wait(END_SECONDS)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self.ranks[0].written()

    def kill(self) -> None:
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()


Process = subprocess.CompletedProcess[str]


def run(
    arguments: Sequence[object],
    *,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    stderr: int | None = None,
    nested: bool = False,
) -> Process:
    """As subprocess.run(["python", *arguments], capture_output=True, text=True). A process that
    takes longer is killed, and TimeoutError shows what it wrote.
    """
    process = Forked(arguments, cwd=cwd, env=env, stderr=stderr, nested=nested)
    try:
        written = process.communicate(timeout)
    finally:
        if process.poll() is None:
            process.kill()
    return Process(process.args, process.wait(), *written)


def run_ranks(
    arguments: Sequence[object],
    num_ranks: int,
    *,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> Process:
    """The same for ranks: their output together, and the status that the launcher would have."""
    ranks = Ranks(arguments, num_ranks, cwd=cwd, env=env)
    status = ranks.wait(timeout)
    return Process(ranks.args, status, *ranks.ranks[0].written())


def with_launcher(script: Path, *arguments: object) -> list[object]:
    """Arguments of a nested process whose launcher is forked as well: it runs deepspeed's launcher
    by a command that kd makes at import, in the server.
    """
    code = "import runpy, sys, kd.cluster.local; kd.cluster.local.LAUNCHER[0] = sys.executable;"
    code += "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return ["-c", code, script, *arguments]


def _ask(connection: socket.socket, request: Request) -> None:
    message = json.dumps(request[:-1]).encode()
    assert len(message) < MAX_REQUEST_BYTES, "does not fit into one message"
    socket.send_fds(connection, [message], request.files)


def _open(file: IO[Any] | int | None) -> IO[Any]:
    if file is None:
        return tempfile.TemporaryFile()
    if file == subprocess.DEVNULL:
        return open(os.devnull, "wb")
    assert not isinstance(file, int)
    return file


def _read(file: IO[Any]) -> str:
    """From its beginning, and without moving the place where processes write; "" if unreadable."""
    if not file.seekable() or "+" not in file.mode:
        return ""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


def _told(arguments: list[str], timeout: float | None, output: str, errors: str) -> str:
    command = " ".join(arguments)
    return f"{command}: still running after {timeout} s\n{output[-4000:]}\n{errors[-8000:]}"


def _wait_until(condition: Any, timeout: float | None) -> None:
    deadline = None if timeout is None else time.monotonic() + timeout
    while not condition():
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.01)


class Server:
    """The client's side of a server; it starts importing at once, and ends with this process."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked")
        self._path = Path(self._folder.name) / "socket"
        self.log = Path(self._folder.name) / "log"
        self.front = Path(self._folder.name) / "python"
        command = shlex.join([sys.executable, __file__, "--front", str(self._path)])
        self.front.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        self.front.chmod(0o755)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for pytest
            )
        atexit.register(self.close)

    def connect(self) -> socket.socket:
        """A connection, which the server takes once it has imported everything."""
        _wait_until(lambda: self._path.exists() or self._process.poll() is not None, 30)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(self._path))
        return connection

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(10)
        self._folder.cleanup()


_servers: dict[frozenset[tuple[str, str]], Server] = {}


def server_of(environment: dict[str, str]) -> Server:
    """The server of processes with these variables; started when there is none yet."""
    own = {
        name: value
        for name, value in environment.items()
        if name.startswith(IMPORT_VARIABLES) and name != "PYTHONPATH"
    }
    key = frozenset(own.items())
    if key not in _servers:
        _servers[key] = Server({"PATH": os.environ.get("PATH", ""), **own})
    return _servers[key]


# Below: the server.


def serve(path: str) -> Request:
    """Import everything, then fork a child for each request. It returns in the children alone."""
    import gc
    import selectors

    selector = selectors.DefaultSelector()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".new")
    listener.listen(100)
    os.rename(path + ".new", path)
    import_everything()
    gc.freeze()  # children need not look at what they inherit
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor that tells of their end
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                request = _request_on(connection)
                pid = os.fork()
                if pid == 0:
                    # By the objects: one that is collected later would close the number again,
                    # and with it what the child has opened there.
                    for descriptor, (_, other) in children.items():
                        os.close(descriptor)
                        other.close()
                    for own in (connection, listener, selector):
                        own.close()
                    return request
                for number in request.files:
                    os.close(number)
                ended = os.pidfd_open(pid)
                selector.register(ended, selectors.EVENT_READ)
                children[ended] = pid, connection
                _send(connection, pid)
            elif key.fd in children:
                pid, connection = children.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                _send(connection, os.waitpid(pid, 0)[1])
                connection.close()
            else:  # stdin: whoever started this has gone
                for pid, _ in children.values():
                    with suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                os._exit(0)


def import_everything() -> None:
    """All of kd, and what it imports only when it is used. It starts no thread."""
    import importlib
    import pkgutil

    import kd

    for module in pkgutil.walk_packages(kd.__path__, "kd."):
        if not module.name.startswith("kd.demo."):  # some need what the demo alone installs
            importlib.import_module(module.name)
    zero, late = (
        "deepspeed.runtime.zero",
        ["datasets", "matplotlib.pyplot", "torch.utils.tensorboard"],
    )
    late += [
        "deepspeed.ops.op_builder.all_ops",
        "deepspeed.runtime.superoffload.superoffload_stage3",
    ]
    # Half of what an engine takes to begin is this one's import of torch._inductor.
    late += [f"{zero}.muon.muon_optimizer", f"{zero}.stage3", f"{zero}.stage_1_and_2"]
    for name in [*late, "deepspeed.runtime.bf16_optimizer"]:
        importlib.import_module(name)
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        MixtralForCausalLM,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
    )

    assert threading.active_count() == 1, threading.enumerate()


def _request_on(connection: socket.socket) -> Request:
    message, files, _, _ = socket.recv_fds(connection, MAX_REQUEST_BYTES, 3)
    return Request(*json.loads(message), files)


def _send(connection: socket.socket, number: int) -> None:
    with suppress(OSError):  # nobody wants to know any more
        connection.send(str(number).encode())


def become(request: Request) -> None:
    """Be the process that was asked for, up to the end of its script."""
    import runpy

    import numpy as np

    os.setsid()
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.cwd)
    os.environ.clear()
    os.environ.update(request.env)
    np.random.seed()  # Python's own generator and torch's are those of a new process already
    _measure_coverage()
    if request.front:
        sys.executable = request.front
    first, *arguments = request.arguments
    if first == "-u":  # a line at a time, by the same objects: handlers of logging hold them
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        first, *arguments = arguments
    path = [entry for entry in request.env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = [os.path.abspath(entry) for entry in path]
    if first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, "")
        import types

        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), module.__dict__)
    elif first == "-m":
        sys.argv = arguments
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        assert not first.startswith("-"), f"{first}: an option of python that is not known here"
        sys.argv = [first, *arguments]
        sys.path.insert(0, os.path.dirname(os.path.realpath(first)))
        runpy.run_path(first, run_name="__main__")


def _measure_coverage() -> None:
    """Where coverage measures subprocesses, as its own start-up hook; kd.cli ends by os._exit."""
    if not any(name.startswith("COVERAGE_PROCESS_") for name in os.environ):
        return
    import coverage

    measured = coverage.process_startup(force=True)
    assert measured is not None
    leave = os._exit

    def save_and_leave(status: int) -> None:
        measured.stop()
        measured.save()
        leave(status)

    os._exit = save_and_leave  # type: ignore[assignment]


def front(path: str, arguments: list[str]) -> None:
    """Stand for a process of the server: with its files, the signals it gets, and its status."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(path)
        own = str(Path(path).with_name("python"))
        _ask(connection, Request(arguments, os.getcwd(), dict(os.environ), own, [0, 1, 2]))
        pid = int(connection.recv(100))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda number, _: os.kill(pid, number))
        status = os.waitstatus_to_exitcode(int(connection.recv(100)))
    if status < 0:
        with suppress(OSError):  # KILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


if __name__ == "__main__" and sys.argv[1] == "--front":
    front(sys.argv[2], sys.argv[3:])
elif __name__ == "__main__":
    del sys.path[0]  # tests/, which a script elsewhere does not see
    become(serve(sys.argv[1]))
