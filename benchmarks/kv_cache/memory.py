"""How far the memory of a process grows while it decodes: SQuatCache against DynamicCache and QuantizedCache.

Sixteen attention layers (8 key-value heads, 4 query heads each, 128 channels) without a model around them, each cache in a process of its own. The cache is filled
with random tokens, and the peak of the resident memory during the following steps is compared with what the process held before there was a cache.

    python -m benchmarks.kv_cache.memory [--contexts 8192 ...]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import markdown, write
from benchmarks.cost import Line
from benchmarks.kv_cache.decode import FULL_PRECISION, QUANTO, caches, filled, step
from hf_ext.cache.squat import SQuatCache
from hf_ext.metrics.compression import cache_bytes

NAME, LAYERS = "kv_cache_memory", 16
STEPS = 70  # enough for every layer to pack a group
SLOW = 5  # steps of the other caches, each of which does the same
# Ours and a peer, for the summary; the other packed cache does the same work.
PAIRS = {("SQuatCache, 2 bits", FULL_PRECISION): None, ("SQuatCache, 4 bits", QUANTO): 1.0}


class Size(NamedTuple):
    """How much is measured: tokens in a cache, and all caches or those of `PAIRS`."""

    contexts: tuple[int, ...]
    every: bool


FULL, SMALL = Size((8192,), True), Size((4096,), False)


def resident(kind: str) -> int:
    """Bytes of resident memory: `VmRSS` now, `VmHWM` at most since `settled`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def settled() -> int:
    """Resident memory after everything free has gone back to the system; the peak starts anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def decode(cache: Any, dtype: torch.dtype) -> int:
    """Decode a while; the most bytes that the cache had."""
    most = 0
    for _ in range(STEPS if isinstance(cache, SQuatCache) else SLOW):
        step(cache, dtype, 1)
        most = max(most, cache_bytes(cache))
    return most


def growth(name: str, context: int) -> dict[str, int]:
    """Bytes of the cache called `name`, and by how many the process grew to fill it and to decode with it. Linux only."""
    dtype, make = caches(LAYERS)[name]
    decode(filled(make, dtype, 1, 256), dtype)  # so that libraries and threads are there
    before = settled()
    cache = filled(make, dtype, 1, context)
    prefill = resident("VmHWM") - before
    settled()
    most = decode(cache, dtype)
    return {"cache": most, "prefill": prefill, "decode": resident("VmHWM") - before}


def apart(name: str, context: int) -> dict[str, int]:
    """`growth` in a process of its own, whose allocator does not keep what is freed."""
    command = [sys.executable, "-m", "benchmarks.kv_cache.memory", "--one", name, "--contexts", str(context)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: Size) -> list[dict[str, Any]]:
    chosen = {name for pair in PAIRS for name in pair}
    results = []
    for context in size.contexts:
        for name in caches():
            # hqq packs as quanto does, and takes minutes to fill.
            if "hqq" not in name and (size.every or name in chosen):
                results.append({"context": context, "name": name, **apart(name, context)})
                print(results[-1], flush=True)
    return results


def table(results: list[dict[str, Any]]) -> str:
    head = [
        "cache",
        "context",
        "cache, MiB",
        "growth while decoding, MiB",
        "growth / cache",
        "growth while filling, MiB",
    ]
    rows = [
        [
            row["name"],
            f"{row['context']:,}",
            f"{row['cache'] / 2**20:.1f}",
            f"{row['decode'] / 2**20:.1f}",
            f"{row['decode'] / row['cache']:.2f}",
            f"{row['prefill'] / 2**20:.1f}",
        ]
        for row in results
    ]
    return markdown(head, rows)


def lines(results: list[dict[str, Any]], size: Size) -> list[Line]:
    """Those of `PAIRS` that were measured, once each."""
    grown = {(row["context"], row["name"]): row["decode"] / 2**20 for row in results}
    found = []
    for context in dict.fromkeys(row["context"] for row in results):
        for (ours, peer), bar in PAIRS.items():
            if (context, ours) in grown and (context, peer) in grown:
                left, right = grown[context, ours], grown[context, peer]
                what = f"growth of a process that decodes after {context:,} tokens, {LAYERS} layers, {ours}"
                found.append(Line(what, peer, left, right, "MiB", *[left / right] * 3, bar))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=FULL.contexts)
    parser.add_argument("--one", help="measure only this cache, in this process, and print JSON")
    options = parser.parse_args()
    if options.one:
        torch.set_grad_enabled(False)
        print(json.dumps(growth(options.one, options.contexts[0])))
        return
    results = measure(Size(options.contexts, True))
    note = (
        f"{LAYERS} layers of 8 key-value heads with 128 channels in float32, batch 1, {STEPS} steps ({SLOW} of the other caches), resident memory of the process. "
        "`python -m benchmarks.kv_cache.memory` repeats it."
    )
    command = "python -m benchmarks.kv_cache.memory"
    write(NAME, {"command": command, "results": results, "table": f"{table(results)}\n\n{note}"})


if __name__ == "__main__":
    main()
