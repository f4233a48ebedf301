"""What the host and the device do in a training step, by torch.profiler: how long the device is
busy, how often the host waits for it, and where the host's time goes.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

# An event of a Chrome trace: "name", "cat", "ts" and "dur" in microseconds, "tid".
Event = dict[str, Any]

STEP, END = "the measured step", "the measured step's end"
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
ON_HOST = {"cpu_op", "python_function", "cuda_runtime", "cuda_driver", "user_annotation"}
# Calls that return when the device is done. A tensor that is read by the host (item, tolist, cpu)
# makes the second one; on a CPU nothing is waited for, and reads of scalars are counted instead.
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")
SCALAR_READS = "aten::_local_scalar_dense"
NUM_FUNCTIONS = 10


def profile_step(
    step: Callable[[], Any], short_step: Callable[[], Any], device: torch.device
) -> dict[str, Any]:
    """A step under the profiler, and a short one whose Python functions are followed too, which
    slows the host: it gives the ranking of host functions alone.

    short_step: of one micro-batch; a whole step as shipped makes 1.5 million events.
    """
    facts = step_facts(traced(step, device, with_python=False), device.type)
    functions = host_functions(traced(short_step, device, with_python=True))
    return facts | {"host_functions": functions}


def traced(step: Callable[[], Any], device: torch.device, *, with_python: bool) -> list[Event]:
    """The events of a step that begins and ends with an idle device."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with profile(activities=activities, with_stack=with_python) as profiler:
        with record_function(STEP):
            step()
        with record_function(END):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]


def step_facts(events: list[Event], device_type: str) -> dict[str, Any]:
    """Of a trace without Python's functions. The step's wall time ends when the device has ended;
    busy is when at least one kernel, copy or fill runs.
    """
    step, end = (_annotation(events, name) for name in (STEP, END))
    start_us, stop_us = step["ts"], end["ts"] + end["dur"]
    busy_us = union([_interval(e) for e in events if e.get("cat") in ON_DEVICE], start_us, stop_us)
    within = [event for event in events if _begins_in(event, step)]
    waits = [event for event in within if event["name"] in WAITS]
    scalar_reads = sum(event["name"] == SCALAR_READS for event in within)
    has_device = device_type == "cuda"
    return {
        "step_ms": (stop_us - start_us) / 1000,
        "device_busy_share": busy_us / (stop_us - start_us) if has_device else None,
        "num_kernels": sum(event.get("cat") == "kernel" for event in events),
        "num_host_waits": len(waits) if has_device else scalar_reads,
        "host_wait_ms": sum(event["dur"] for event in waits) / 1000 if has_device else None,
        "num_waits_by_call": {name: sum(e["name"] == name for e in waits) for name in WAITS},
        "num_scalar_reads": scalar_reads,
    }


def host_functions(events: list[Event]) -> list[dict[str, Any]]:
    """Those of the most time of their own, without that of what they call: operators, calls of
    CUDA, and Python's functions, over all threads.
    """
    step = _annotation(events, STEP)
    by_thread = defaultdict(list)
    for event in events:
        if event.get("cat") in ON_HOST and _begins_in(event, step):
            by_thread[event["tid"]].append(event)
    self_us: defaultdict[str, float] = defaultdict(float)
    num_calls: defaultdict[str, int] = defaultdict(int)
    for thread in by_thread.values():
        callers: list[Event] = []
        for event in sorted(thread, key=lambda e: (e["ts"], -e["dur"])):
            while callers and callers[-1]["ts"] + callers[-1]["dur"] <= event["ts"]:
                callers.pop()
            if callers:
                self_us[callers[-1]["name"]] -= event["dur"]
            self_us[event["name"]] += event["dur"]
            num_calls[event["name"]] += 1
            callers.append(event)
    longest = sorted(self_us, key=lambda name: -self_us[name])[:NUM_FUNCTIONS]
    return [
        {
            "name": re.sub(" object at 0x[0-9a-f]+", "", name),
            "self_ms": self_us[name] / 1000,
            "num_calls": num_calls[name],
        }
        for name in longest
    ]


def union(intervals: Iterable[tuple[float, float]], start: float, stop: float) -> float:
    """Length of what the intervals cover between start and stop."""
    covered, reached = 0.0, start
    for begin, end in sorted(intervals):
        begin, end = max(begin, reached), min(end, stop)
        if end > begin:
            covered += end - begin
            reached = end
    return covered


def profile_line(facts: dict[str, Any]) -> str:
    """The profile in one line of Markdown."""
    share, wait_ms = facts["device_busy_share"], facts["host_wait_ms"]
    busy = "no device" if share is None else f"device busy {share:.3f} of {facts['step_ms']:.1f} ms"
    waited = "" if wait_ms is None else f" ({wait_ms:.1f} ms)"
    longest = (f"`{f['name']}` {f['self_ms']:.1f}" for f in facts["host_functions"][:3])
    waits = f"{facts['num_host_waits']} host waits{waited}"
    return f"{busy}; {waits}; most ms of the host's own: {', '.join(longest)}"


def _annotation(events: list[Event], name: str) -> Event:
    return next(e for e in events if e["name"] == name and e.get("cat") == "user_annotation")


def _interval(event: Event) -> tuple[float, float]:
    return event["ts"], event["ts"] + event["dur"]


def _begins_in(event: Event, span: Event) -> bool:
    """The span itself does not count."""
    return event is not span and span["ts"] <= event["ts"] < span["ts"] + span["dur"]
