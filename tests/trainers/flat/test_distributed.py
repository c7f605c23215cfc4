"""Two real processes give the run of one process with the double batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainers.distributed import run_two_processes
from tests.trainers.flat.helpers import make_forget, make_retain, trained
from tests.trainers.helpers import column, weights

KEYS = ("loss", "loss/forget", "loss/retain", "probability/forget", "forget/top1")


def outcome(folder: Path, overrides: dict) -> dict:
    overrides = dict(overrides)
    data = make_forget(overrides.pop("rows", 8))
    trainer = trained(folder, data=data, overrides=overrides, retain_dataset=make_retain())
    result = {key: column(trainer, key) for key in KEYS}
    result["weights"] = {name: value.flatten().tolist() for name, value in weights(trainer.model).items()}
    if "ref_forget_logps" in trainer.train_dataset.column_names:
        result["references"] = list(trainer.train_dataset["ref_forget_logps"])
    return result | {"processes": trainer.accelerator.num_processes}


@pytest.mark.slow
def test_two_processes_equal_one_with_the_double_batch(tmp_path):
    # Plain gradient descent: Adam would hide a wrong factor in front of the gradient.
    shared = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "retain_coef": 1.0}
    shared |= {"max_steps": 2}
    runs = [{"loss_type": name, **shared} for name in ("satimp", "undial", "ceu", "rmu")]
    runs += [{"loss_type": name, **shared} for name in ("gradient_ascent", "npo", "simnpo", "wga")]
    # Two micro-batches in the first step and one in the second. Rows that do not fill all processes would be repeated.
    runs += [{"loss_type": "wga", "gradient_accumulation_steps": 2, "rows": 12, **shared}]
    runs += [{"loss_type": "flat", "retain_loss": "kl", "templates_per_example": 3, **shared}]
    runs += [{"loss_type": "idk_dpo", "activation_checkpointing": True, "precompute_ref_batch_size": 3, **shared}]
    pairs = run_two_processes(outcome, tmp_path, [run | {"per_device_train_batch_size": 2} for run in runs])
    for run, pair in zip(runs, pairs, strict=True):
        single = outcome(tmp_path, run)
        assert pair["processes"] == 2 and pair.keys() == single.keys()
        for key in KEYS:
            assert pair[key] == pytest.approx(single[key], rel=1e-5, abs=1e-6), (run, key)
        assert pair["weights"].keys() == single["weights"].keys()
        for name, values in pair["weights"].items():
            assert values == pytest.approx(single["weights"][name], rel=1e-6, abs=1e-6), (run, name)
        if "references" in pair:
            assert pair["references"] == pytest.approx(single["references"], rel=1e-5)
