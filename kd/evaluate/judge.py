"""Mathematical equality of two answers, judged by `kd.evaluate.answers` and, where form does not
tell, by math-verify, in a process of its own.

Simplifying an expression may take hours or gigabytes, and math-verify's alarm cannot interrupt a
computation inside one bytecode (9**9**9). The process is ended after JUDGE_TIMEOUT_S, the answer
counts as wrong, and the next one gets a new process.

    with MathJudge() as judge: judge(expected="1/2", answer=r"\\boxed{0.5}")
"""

import importlib.util
import json
import os
import resource
import select
import subprocess
import sys
from types import TracebackType

from kd.errors import UserError
from kd.evaluate.answers import close_values, equal_answers
from kd.recipe import ROOT

START_TIMEOUT_S = 120.0
JUDGE_TIMEOUT_S = 10.0
MEMORY_BYTES = 4 * 2**30


class MathJudge:
    """Calls are answered one at a time; num_timeouts counts the answers on which the process was
    ended or died.
    """

    def __init__(self, timeout_s: float = JUDGE_TIMEOUT_S) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError(
                'evaluation.judge = "math" needs math-verify: install the extra "eval" (pip '
                'install -e ".[eval]"), or set evaluation.judge = "exact"'
            )
        self.timeout_s = timeout_s
        self.num_timeouts = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "MathJudge":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        stack: TracebackType | None,
    ) -> None:
        self._stop()

    def __call__(self, expected: str, answer: str) -> bool:
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps([expected, answer]).encode() + b"\n")
        verdict = _read_line(process, self.timeout_s)
        if verdict is None:
            self.num_timeouts += 1
            self._stop()
        return verdict == b"true"

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kd.evaluate.judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        if _read_line(self._process, START_TIMEOUT_S) != b"ready":
            raise UserError(
                "evaluation.judge: math-verify does not start; run `python -m kd.evaluate.judge` "
                "to see why"
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
    """The next line of the process, or None when it is silent for too long or has ended. Each line
    is one write.
    """
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], timeout_s)[0]:
        return None
    return process.stdout.readline().strip() or None


def answer_requests() -> None:
    """The process: a JSON line [expected, answer] in, `true` or `false` out."""
    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # Imports its parser on first use, which is not the answers' time
    verify(parse("1"), parse(r"\boxed{\frac12}"))
    print("ready", flush=True)
    for line in sys.stdin:
        expected, answer = json.loads(line)
        print(json.dumps(equal_answers(expected, answer, _equal_expressions)), flush=True)


def _equal_expressions(gold: str, answer: str) -> bool:
    """math-verify's verdict; values are compared relatively, where it rounds to six places."""
    from math_verify import parse, verify
    from sympy import Expr

    golds, answers = (parse(text, parsing_timeout=0) for text in (gold, answer))
    if not verify(golds, answers, timeout_seconds=0):
        return False
    values = [
        float(side[0].evalf())
        for side in (golds, answers)
        if side and isinstance(side[0], Expr) and side[0].is_number and side[0].is_extended_real
    ]
    is_small = len(values) == 2 and max(map(abs, values)) < 1e-3
    return close_values(*values) if is_small else True


if __name__ == "__main__":
    answer_requests()
