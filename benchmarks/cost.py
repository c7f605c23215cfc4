"""Time and memory of two pieces of work in turn, and their ratio."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import markdown


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, as long runs on a CPU are set up.

    Otherwise glibc returns large tensors to the system and gets them back page by page, which takes longer than what is computed with
    them, and how often depends on where in the heap a side happens to lie.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD at its maximum, M_TRIM_THRESHOLD, M_TOP_PAD.
        if not all(mallopt(option, value) for option, value in ((-3, 2**25), (-1, 2**31 - 1), (-2, 2**28))):
            raise OSError("malloc refused its settings.")


def allocated_peak(function: Callable[[], Any]) -> float:
    """MiB that torch's CPU allocator holds at most above the start while `function` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        function()
    held = peak = 0
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def compare(ours: Callable[[], Any], peer: Callable[[], Any], repeats: int = 7) -> dict[str, Any]:
    """Seconds and MiB of both sides, and the ratio ours / peer within each interleaved pair."""
    sides = {"ours": ours, "peer": peer}
    for function in sides.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        # The order alternates, so that neither side always runs on the caches the other left behind.
        for name in sorted(sides, reverse=bool(repeat % 2)):
            start = time.process_time()
            sides[name]()
            seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["peer"], strict=True)]
    memory = {name: allocated_peak(function) for name, function in sides.items()}
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "time_ratio": statistics.median(ratios),
        "time_ratio_min": min(ratios),
        "time_ratio_max": max(ratios),
        "peak_mib": memory,
        "memory_ratio": memory["ours"] / memory["peer"],
    }


def show(name: str, row: dict[str, Any]) -> None:
    time_s, peak = row["seconds"], row["peak_mib"]
    print(
        f"{name:42s} time {time_s['ours']:7.3f} / {time_s['peer']:7.3f} s = {row['time_ratio']:.2f} "
        f"[{row['time_ratio_min']:.2f}, {row['time_ratio_max']:.2f}]   "
        f"memory {peak['ours']:7.1f} / {peak['peer']:7.1f} MiB = {row['memory_ratio']:.2f}",
        flush=True,
    )


def both(pair: dict[str, float], spec: str, scale: float = 1.0) -> str:
    """A cell with both sides: `ours / peer`."""
    return f"{scale * pair['ours']:{spec}} / {scale * pair['peer']:{spec}}"


def with_range(ratio: float, low: float, high: float, spec: str) -> str:
    """A cell with a ratio and the range that it was found in: `ratio [low, high]`."""
    return f"{ratio:{spec}} [{low:{spec}}, {high:{spec}}]"


def time_ratio(row: dict[str, Any], spec: str) -> str:
    return with_range(row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"], spec)


def table(rows: list[dict[str, Any]], peer: str) -> str:
    """What the docs show of rows with one peer."""
    cells = [
        [
            row["name"],
            both(row["seconds"], ".2f"),
            time_ratio(row, ".2f"),
            both(row["peak_mib"], ".0f"),
            f"{row['memory_ratio']:.2f}",
        ]
        for row in rows
    ]
    return markdown(
        ["work", f"CPU seconds, ours / {peer}", "ratio [min, max]", f"peak MiB, ours / {peer}", "ratio"], cells
    )


def table_of_peers(rows: list[dict[str, Any]], unit: str) -> str:
    """What the docs show of rows with a peer each; `unit` is `"ms"` or `"seconds"`."""
    scale, spec, digits = {"ms": (1000.0, ".0f", ".3f"), "seconds": (1.0, ".2f", ".2f")}[unit]
    cells = [
        [
            row["name"],
            row["peer"],
            both(row["seconds"], spec, scale),
            time_ratio(row, digits),
            both(row["peak_mib"], ".0f"),
        ]
        for row in rows
    ]
    head = ["work", "peer", f"CPU {unit}, ours / peer", "ratio [min, max]", "MiB at most, ours / peer"]
    return markdown(head, cells)


@dataclass(frozen=True)
class Line:
    """One comparison in the summary of all costs (`benchmarks/summary.py`).

    Attributes:
        what: the work and its size.
        against: what it is compared with.
        ours: our median, in `unit`.
        peer: the peer's.
        unit: of both.
        ratio: median of ours / peer within pairs.
        low: the smallest of these ratios.
        high: the largest.
        bar: what the ratio is not to exceed, where the peer does the same work; None where it does other work.
    """

    what: str
    against: str
    ours: float
    peer: float
    unit: str
    ratio: float
    low: float
    high: float
    bar: float | None = None


def time_line(row: dict[str, Any], against: str, bar: float | None = None) -> Line:
    """The times of a row of `compare`."""
    milliseconds = {side: 1000 * value for side, value in row["seconds"].items()}
    ratios = row["time_ratio"], row["time_ratio_min"], row["time_ratio_max"]
    return Line(row["name"], against, milliseconds["ours"], milliseconds["peer"], "CPU ms", *ratios, bar)


def memory_line(row: dict[str, Any], against: str, bar: float | None = None) -> Line:
    """The peaks of a row of `compare`, which are measured once."""
    ratio = row["memory_ratio"]
    return Line(
        row["name"], against, *(row["peak_mib"][side] for side in ("ours", "peer")), "MiB", ratio, ratio, ratio, bar
    )
