"""What every command in launch/ shares: recipe arguments, and errors printed once, in one block."""

import argparse
import atexit
import contextlib
import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from kd.constants import EXIT_INTERRUPTED, EXIT_NO_READER, EXIT_USER_ERROR
from kd.errors import Interrupted, LostPeer, UserError

WAIT_SECONDS = 3


def recipe_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--recipe", required=True, help="a name from recipes/, or the path of a .toml file"
    )
    overrides_argument(parser)
    return parser


def overrides_argument(parser: argparse.ArgumentParser) -> None:
    """Add --set, for load_recipe(name, arguments.overrides)."""
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the recipe; may be repeated",
    )


def generation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of kd.generation.backends.choose_backend."""
    parser.add_argument(
        "--backend",
        choices=["auto", "transformers", "vllm"],
        default="auto",
        help="auto: vLLM where it is installed and sees a GPU, else transformers",
    )
    parser.add_argument(
        "--server", metavar="URL", help="a vLLM server that has loaded the model: http://HOST:8000"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="GPUs over which vLLM divides the model",
    )


def axis_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the axes of a study, for kd.study.cells.parse_axes."""
    axes = parser.add_argument_group(
        "axes of a study", "one axis varies at a time; the others keep the recipe's values"
    )
    axes.add_argument(
        "--keep", metavar="F,F", help="values of truncation.keep_fraction: 0.25,0.5,0.75,1.0"
    )
    axes.add_argument(
        "--sections", metavar="A+B,C", help="values of data.loss_sections: prompt+cot+answer,cot"
    )
    axes.add_argument(
        "--windows", metavar="W,W", help="values of truncation.window: head,middle,tail"
    )
    axes.add_argument(
        "--rollout-tokens",
        metavar="N,N",
        help="values of rollout.max_new_tokens, for a recipe with [rollout]: 16,32,64",
    )
    axes.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="train with N seeds, from the recipe's run.seed upwards",
    )
    axes.add_argument(
        "--cross",
        action="store_true",
        help="train every combination, instead of varying one axis at a time",
    )
    return parser


class CacheRequest(NamedTuple):
    """The arguments of launch/cache.py that say what to store."""

    kind: str
    dtype: str = "bf16"
    num_tokens: int | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """As launch/cache.py takes them."""
        tokens = () if self.num_tokens is None else ("--num-tokens", str(self.num_tokens))
        return ("--kind", self.kind, "--dtype", self.dtype, *tokens)


def run(main: Callable[[], None]) -> None:
    """Call main(), and end the process as main ended: an error is one block on stderr, and a status
    from kd.constants.

    Most UserErrors are the same on every rank, so rank 0 prints them and exits at once, and the
    launcher ends the others. A rank that is still alive after three seconds has an error of its
    own and prints that. So does a rank that lost a peer, by then after the peer's own message. It
    is no error when the reader of the output stops reading, as `head` does.
    """
    try:
        main()
        if problem := _problem_of_output():
            _leave_without_output(problem, is_done=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            _leave_as_rank()
    except Interrupted:
        _leave(EXIT_INTERRUPTED)
    except UserError as error:
        rank = _rank()
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the launcher ends this rank
            time.sleep(WAIT_SECONDS)
        where = f" on rank {rank}" if rank else ""
        _leave(EXIT_USER_ERROR, f"error{where}: {error}\n")
    except LostPeer as error:
        time.sleep(WAIT_SECONDS)
        _leave(1, f"rank {_rank()} on {socket.gethostname()}: {error}\n")
    except Exception as error:
        # Writing one more line shows whether the output, or another file or socket, is broken.
        is_of_output = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ENOSPC)
        if is_of_output and (problem := _problem_of_output(last_words="\n")):
            _leave_without_output(problem, is_done=False)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        _leave(
            1,
            f"rank {os.environ['RANK']} on {socket.gethostname()} "
            f"failed:\n{traceback.format_exc()}",
        )


def _rank() -> int:
    """Also before find_ranks(), under srun. 0 where none is said."""
    text = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return int(text) if text.isdecimal() else 0


def _problem_of_output(last_words: str = "") -> OSError | None:
    """Why what was printed cannot be written, as when its reader has gone or a disk is full."""
    try:
        if sys.stdout is not None:  # a process may be started without one
            sys.stdout.write(last_words)
            sys.stdout.flush()
    except OSError as error:
        return error
    return None


def _leave_without_output(problem: OSError, *, is_done: bool) -> NoReturn:
    if not isinstance(problem, BrokenPipeError):
        _leave(1, f"error: cannot write the output: {problem.strerror}\n")
    _leave(0 if is_done else EXIT_NO_READER)


def _leave_as_rank() -> NoReturn:
    """After Python's exit handlers, W&B's among them, and before torch's destructors: those of a
    process group whose other ranks have gone abort at times, and a finished run would seem failed.
    """
    atexit._run_exitfuncs()
    _leave(0)


def _leave(status: int, message: str = "") -> NoReturn:
    """Not sys.exit: other ranks may be waiting in a collective, and destructors would join them."""
    with contextlib.suppress(OSError):  # whoever read it may have gone, and ssh with it
        if message and sys.stderr is not None:
            sys.stderr.write(f"\n{message}\n")  # one write: lines of several ranks do not mix
        for stream in (sys.stderr, sys.stdout):
            if stream is not None:
                stream.flush()
    os._exit(status)
