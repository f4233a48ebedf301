"""One check and its line."""

from typing import Literal, NamedTuple


class Check(NamedTuple):
    """What was looked at, how it is, and figures, or what to do about it."""

    name: str
    status: Literal["ok", "FAIL", "skipped"]
    text: str

    def __str__(self) -> str:
        text = "; ".join(line.strip() for line in self.text.splitlines())
        return f"{self.status:<8}{self.name:<20}  {text}"


def ok(name: str, text: str) -> Check:
    return Check(name, "ok", text)


def fail(name: str, text: str) -> Check:
    return Check(name, "FAIL", text)


def skipped(name: str, text: str) -> Check:
    return Check(name, "skipped", text)


def size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.1 else f"{gib * 1024:.2f} MiB"
