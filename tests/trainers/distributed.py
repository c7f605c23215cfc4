"""Two real processes, connected by gloo, that call one function of a test for one run after another."""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState


def run_two_processes(work: Callable[[Path, dict], Any], folder: Path, runs: list[dict]) -> list[Any]:
    """What `work(folder, run)` returned in the first process for each run: data that JSON can hold.

    One start of the interpreters for all runs: importing the libraries takes longer than the training.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", __name__, work.__module__, work.__name__, str(folder), json.dumps(runs)]
    workers = []
    for rank in range(2):
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": str(rank),  # sets in another order in each: nothing may depend on it
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        workers.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(outputs)[-4000:]
    return json.loads((folder / "results.json").read_text())


def main(module: str, name: str, folder: str, runs: str) -> None:
    work = getattr(importlib.import_module(module), name)
    gc.freeze()
    results = [work(Path(folder), run) for run in json.loads(runs)]
    state = PartialState()
    if state.is_main_process:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    # A rank that exits while the other still talks to it makes gloo abort the other.
    state.wait_for_everyone()
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
