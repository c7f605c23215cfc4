"""What every benchmark shares: where results go, and what machine they were measured on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "trl")


def machine() -> dict[str, Any]:
    """Processor, cores and library versions, for the results file."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def write(name: str, result: dict[str, Any]) -> None:
    """Write `results/<name>.json`, through a temporary name; `result["table"]` is what the docs show."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    scratch = target.with_suffix(".tmp")
    scratch.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n")
    scratch.replace(target)


def stored_runs(name: str) -> list[dict[str, Any]]:
    """The finished runs in `results/<name>.json`, with which a script goes on after it was stopped."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def add_stored(name: str, runs: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> None:
    """Add to `runs` those that another process has finished meanwhile; sorted by `key`."""
    known = [key(run) for run in runs]
    runs.extend(run for run in stored_runs(name) if key(run) not in known)
    runs.sort(key=lambda run: json.dumps(key(run)))


def seeds_to_run(seeds: Sequence[int]) -> list[int]:
    """The seeds on the command line, or else these."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    return parser.parse_args().seeds


def run_seeds(
    name: str,
    seeds: Sequence[int],
    measure: Callable[[int], list[dict[str, Any]]],
    table: Callable[[list[dict[str, Any]]], str],
    key: Callable[[dict[str, Any]], Any],
) -> None:
    """The main of a script that measures seed by seed: those on the command line, or all, that are not stored yet; then the table."""
    warnings.filterwarnings("ignore")
    runs = stored_runs(name)
    for seed in seeds_to_run(seeds):
        if seed not in {run["seed"] for run in runs}:
            runs += measure(seed)
            add_stored(name, runs, key)
            write(name, {"command": f"python -m benchmarks.{name}", "runs": runs, "table": table(runs)})
    print(table(runs))


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several values, standard deviation, as percentages with one digit; `sign="+"` tells gains."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines)
