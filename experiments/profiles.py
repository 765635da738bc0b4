"""Where the time of a computation goes: matrix products, moving numbers about, the rest; of ours, from XLA's trace."""

import gzip
import heapq
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

PRODUCTS, ATTENTION, COPIES, OTHER, WAITING = KINDS = "matrix products", "attention", "copies", "other", "waiting"
MULTIPLIES = re.compile(r"dot|ynn|gemm|gemv|cublas|cutlass|nvjet|triton|mm$|mv$")  # XLA's, its libraries', torch's
ATTENDS = re.compile(r"scaled_dot_product|flash|fmha")
# An operation whose name has no other words moves numbers and computes none, as copy_bitcast_fusion.
MOVES = set("copy transpose bitcast slice dynamic-slice dynamic-update-slice concatenate broadcast pad reshape".split())
MOVES |= set("wrapped fusion loop input tuple cat fill zero clone contiguous select memcpy32 memcpyd2d gather".split())

END = "end: "
AROUND = re.compile(r"while|call|conditional|ThunkExecutor")  # other operations, which are in the trace as well


def kind(name: str) -> str:
    """What an operation does, by the name that XLA or torch gives it."""
    name = name.lower().removeprefix("aten::").strip("_")
    if ATTENDS.search(name):
        return ATTENTION
    if MULTIPLIES.search(re.sub(r"[.\d]+$", "", name)):
        return PRODUCTS
    return COPIES if set(filter(None, re.split(r"[_.\d]+", name))) <= MOVES else OTHER


def traced(function: Callable[[], Any]) -> dict[str, float]:
    """Runs a function, and says how many seconds of it went to each of `KINDS` on a device; all must be compiled."""
    import jax  # here, since the side that has torch needs the rest alone

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what it watches
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds = time.perf_counter() - start
        (file,) = Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return by_kind(operations(events), seconds)


def operations(events: Iterable[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """When each operation began and ended, in seconds, and its name, from a trace: a GPU's if it has one."""
    events = list(events)
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    devices = {pid for pid, name in names.items() if name.startswith("/device:GPU:0")}
    starts: dict[str, list[float]] = {}
    found = []
    for event in sorted((e for e in events if e.get("ph") == "X"), key=lambda e: e["ts"]):
        name, own = event["name"], event["pid"] in devices if devices else "device_ordinal" in event.get("args", {})
        if AROUND.match(name):
            continue
        stop = (event["ts"] + event["dur"]) / 1e6
        if own and devices:
            found.append((event["ts"] / 1e6, stop, name))
        elif own:  # on a CPU the event may be over when others have only been told to compute
            starts.setdefault(name, []).append(event["ts"] / 1e6)
        elif name.startswith(END) and starts.get(name.removeprefix(END)):
            found.append((starts[name.removeprefix(END)].pop(0), stop, name.removeprefix(END)))
    return found


def by_kind(spans: list[tuple[float, float, str]], seconds: float) -> dict[str, float]:
    """Seconds by kind, of so many in all; what runs beside a product of matrices is hidden by it, and costs nothing.

    Other operations that run at the same time share it evenly.
    """
    total = dict.fromkeys(KINDS, 0.0)
    running: list[tuple[float, str]] = []  # when it ends, its kind; soonest first

    def until(end: float, now: float) -> None:
        while running and now < end:
            stop = min(end, running[0][0])
            kinds = [own for _, own in running]
            kinds = [PRODUCTS] if PRODUCTS in kinds else kinds
            for own in kinds:
                total[own] += (stop - now) / len(kinds)
            now = stop
            while running and running[0][0] <= now:
                heapq.heappop(running)

    before = 0.0
    for start, stop, name in sorted(spans):
        until(start, before)
        heapq.heappush(running, (stop, kind(name)))
        before = start
    until(float("inf"), before)
    total[WAITING] = max(0.0, seconds - sum(total.values()))
    return total
