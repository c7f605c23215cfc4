"""Two real processes: the same run as one process with the double batch, and one decision about saturation."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.overtone.helpers import column, make_trainer, weights

# One start of the interpreters for all runs: importing the libraries takes longer than the training.
WORKER = """
import json, sys
from pathlib import Path
import tests.conftest  # offline settings
from tests.trainers.overtone.helpers import column, make_trainer, weights

folder, runs, results = Path(sys.argv[1]), json.loads(sys.argv[2]), []
for overrides in runs:
    trainer = make_trainer(folder, overrides=overrides)
    before = weights(trainer.model)
    trainer.train()
    result = {key: column(trainer, key) for key in ("loss", "overtone/active_fraction", "overtone/kl", "overtone/nll")}
    after = weights(trainer.model)
    result["moved"] = max(float((after[name] - before[name]).abs().max()) for name in after)
    result["norm"] = sum(float(value.double().norm()) for value in after.values())
    result |= {"steps": trainer.state.global_step, "processes": trainer.accelerator.num_processes}
    results.append(result)
if trainer.is_world_process_zero():
    (folder / "results.json").write_text(json.dumps(results))
# A rank that exits while the other still talks to it makes gloo abort the other.
trainer.accelerator.wait_for_everyone()
trainer.accelerator.end_training()
"""


def run_two_processes(folder: Path, runs: list[dict]) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = Path(__file__).parents[3]
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
            "PYTHONPATH": str(root),
        }
        command = [sys.executable, "-c", WORKER, str(folder), json.dumps(runs)]
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


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch_and_stop_together(tmp_path):
    # Plain gradient descent: Adam would hide a wrong factor in front of the gradient.
    shared = {"optim": "sgd", "learning_rate": 0.5, "clip_epsilon": 0.5}
    saturated = {"clip_epsilon": 1e9, "require_top1": False, "max_steps": 20, "weight_decay": 0.5}
    half = {"per_device_train_batch_size": 2}
    pair, idle = run_two_processes(tmp_path, [shared | half, saturated | half])

    single = make_trainer(tmp_path, overrides=shared | {"per_device_train_batch_size": 4})
    single.train()
    assert pair["processes"] == 2 and pair["steps"] == 4
    for key in ("loss", "overtone/active_fraction", "overtone/kl", "overtone/nll"):
        assert pair[key] == pytest.approx(column(single, key), rel=1e-4), key
    norm = sum(float(value.double().norm()) for value in weights(single.model).values())
    assert pair["norm"] == pytest.approx(norm, rel=1e-6)

    assert idle["steps"] == 2 and idle["moved"] == 0.0
