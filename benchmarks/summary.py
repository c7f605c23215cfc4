"""What every method costs, small: each cost benchmark at a size that takes a minute or less, in a process of its own, and one table of all of them.

The scripts themselves measure more, and larger work; their tables are on the methods' pages. Everything runs on one thread, with freed memory kept.

    python -m benchmarks.summary
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import markdown, write
from benchmarks.cost import Line, keep_freed_memory

NAME = "summary"
# Module and method, in the order of the table.
SCRIPTS = {
    "roselora_cost": "RoseLoRA",
    "neat_cost": "NEAT",
    "baft_cost": "BaFT",
    "lorvp_cost": "LoR-VP",
    "tfb_cost": "TFB",
    "overtone_cost": "OVERTONE",
    "unlearning.cost": "FLAT",
    "continual.cost": "Adaptive SVD",
    "dice_cost": "DICE",
    "kv_cache.decode": "SQuat",
    "kv_cache.memory": "SQuat",
}


def measured(script: str) -> list[Line]:
    """What `script` finds at its small size, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "lines.json"
        subprocess.run([sys.executable, "-m", "benchmarks.summary", "--one", script, str(found)], check=True)
        return [Line(**line) for line in json.loads(found.read_text())]


def measure_here(script: str, found: Path) -> None:
    """The same in this process, into the file `found`."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    module = importlib.import_module(f"benchmarks.{script}")
    found.write_text(json.dumps([asdict(line) for line in module.lines(module.measure(module.SMALL), module.SMALL)]))


def amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2g} {unit}"


def share(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def cells(method: str, line: Line) -> list[str]:
    return [
        f"{method}: {line.what}; peer: {line.against}",
        amount(line.ours, line.unit),
        amount(line.peer, line.unit),
        share(line.ratio),
        f"{share(line.low)} to {share(line.high)}" if line.low < line.high else "",
        "" if line.bar is None else f"{line.bar:g}",
    ]


def table(results: Iterable[tuple[str, Line]]) -> str:
    """The table of methods and lines."""
    head = ["what is measured", "ours", "peer", "ratio", "spread", "bar"]
    return markdown(head, [cells(method, line) for method, line in results])


def report(found: dict[str, list[Line]]) -> dict[str, Any]:
    """What is stored of the lines that each script found."""
    lines = [(SCRIPTS[script], line) for script, lines in found.items() for line in lines]
    above = [f"{method}, {line.what}" for method, line in lines if line.bar and round(line.ratio, 2) > line.bar]
    exceptions = f"; not kept by: {'; '.join(above)}" if above else ""
    note = (
        "Ratio: the median of ours / peer over pairs of runs in turn, spread: the smallest and the largest; memory is measured once. "
        f"Bar: where the peer does the same work, ours is to take no more{exceptions}. Small sizes, one thread; `python -m benchmarks.summary` repeats it."
    )
    shown = table(lines)
    results = {script: [asdict(line) for line in lines] for script, lines in found.items()}
    return {"command": "python -m benchmarks.summary", "results": results, "table": f"{shown}\n\n{note}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("SCRIPT", "FILE"), help="measure only this one, in this process")
    options = parser.parse_args()
    if options.one:
        measure_here(options.one[0], Path(options.one[1]))
        return
    found = {}
    for script in SCRIPTS:
        started = time.perf_counter()
        print(f"== {script}", flush=True)
        found[script] = measured(script)
        print(f"== {script}: {time.perf_counter() - started:.0f} s", flush=True)
    write(NAME, report(found))


if __name__ == "__main__":
    main()
