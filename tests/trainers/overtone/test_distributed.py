"""Two real processes: the same run as one process with the double batch, and one decision about saturation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.distributed import run_two_processes
from tests.trainers.helpers import column, largest_difference, weights
from tests.trainers.overtone.helpers import make_trainer

KEYS = ("loss", "overtone/active_fraction", "overtone/kl", "overtone/nll")


def outcome(folder: Path, overrides: dict) -> dict:
    trainer = make_trainer(folder, overrides=overrides)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    result = {key: column(trainer, key) for key in KEYS}
    result["moved"] = largest_difference(after, before)
    result["norm"] = sum(float(value.double().norm()) for value in after.values())
    return result | {"steps": trainer.state.global_step, "processes": trainer.accelerator.num_processes}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch_and_stop_together(tmp_path):
    # Plain gradient descent: Adam would hide a wrong factor in front of the gradient.
    shared = {"optim": "sgd", "learning_rate": 0.5, "clip_epsilon": 0.5}
    saturated = {"clip_epsilon": 1e9, "require_top1": False, "max_steps": 20, "weight_decay": 0.5}
    half = {"per_device_train_batch_size": 2}
    pair, idle = run_two_processes(outcome, tmp_path, [shared | half, saturated | half])

    single = outcome(tmp_path, shared | {"per_device_train_batch_size": 4})
    assert pair["processes"] == 2 and pair["steps"] == 4
    for key in KEYS:
        assert pair[key] == pytest.approx(single[key], rel=1e-4), key
    assert pair["norm"] == pytest.approx(single["norm"], rel=1e-6)

    assert idle["steps"] == 2 and idle["moved"] == 0.0
