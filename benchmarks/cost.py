"""Time and memory of two pieces of work in turn, and their ratio."""

from __future__ import annotations

import ctypes
import platform
import statistics
import time
from collections.abc import Callable
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


def table(rows: list[dict[str, Any]], peer: str) -> str:
    """What the docs show."""
    cells = []
    for row in rows:
        seconds, peak = row["seconds"], row["peak_mib"]
        cells.append(
            [
                row["name"],
                f"{seconds['ours']:.2f} / {seconds['peer']:.2f}",
                f"{row['time_ratio']:.2f} [{row['time_ratio_min']:.2f}, {row['time_ratio_max']:.2f}]",
                f"{peak['ours']:.0f} / {peak['peer']:.0f}",
                f"{row['memory_ratio']:.2f}",
            ]
        )
    return markdown(
        ["work", f"CPU seconds, ours / {peer}", "ratio [min, max]", f"peak MiB, ours / {peer}", "ratio"], cells
    )
