"""Two real processes give the run of one process with the double batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainers.flat.helpers import make_retain, make_trainer
from tests.trainers.overtone.helpers import column, weights

KEYS = ("loss", "loss/forget", "loss/retain", "probability/forget", "forget/top1")

# One start of the interpreters for all runs: importing the libraries takes longer than the training.
WORKER = """
import json, sys
from pathlib import Path
import tests.conftest  # offline settings
from tests.trainers.flat.helpers import make_retain, make_trainer
from tests.trainers.flat.test_distributed import KEYS
from tests.trainers.overtone.helpers import column, weights

folder, runs, results = Path(sys.argv[1]), json.loads(sys.argv[2]), []
for overrides in runs:
    trainer = make_trainer(folder, overrides=overrides, retain_dataset=make_retain())
    trainer.train()
    result = {key: column(trainer, key) for key in KEYS}
    result["weights"] = {name: value.double().norm().item() for name, value in weights(trainer.model).items()}
    if "ref_forget_logps" in trainer.train_dataset.column_names:
        result["references"] = list(trainer.train_dataset["ref_forget_logps"])
    results.append(result | {"processes": trainer.accelerator.num_processes})
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
            "PYTHONPATH": str(Path(__file__).parents[3]),
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
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    # Plain gradient descent: Adam would hide a wrong factor in front of the gradient.
    shared = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "retain_coef": 1.0}
    shared |= {"max_steps": 2}
    runs = [{"loss_type": name, **shared} for name in ("satimp", "undial", "ceu", "rmu")]
    runs += [{"loss_type": "flat", "retain_loss": "kl", "templates_per_example": 3, **shared}]
    runs += [{"loss_type": "idk_dpo", "activation_checkpointing": True, "precompute_ref_batch_size": 3, **shared}]
    pairs = run_two_processes(tmp_path, [run | {"per_device_train_batch_size": 2} for run in runs])
    for run, pair in zip(runs, pairs, strict=True):
        single = make_trainer(tmp_path, overrides=run, retain_dataset=make_retain())
        single.train()
        assert pair["processes"] == 2
        for key in KEYS:
            assert pair[key] == pytest.approx(column(single, key), rel=1e-5, abs=1e-6), (run, key)
        norms = {name: value.double().norm().item() for name, value in weights(single.model).items()}
        assert pair["weights"] == pytest.approx(norms, rel=1e-6), run
        if "references" in pair:
            assert pair["references"] == pytest.approx(single.train_dataset["ref_forget_logps"], rel=1e-5)
