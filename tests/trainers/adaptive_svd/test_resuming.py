"""What a run writes, and that it goes on where it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.conftest import make_tiny_llama
from tests.trainers.adaptive_svd.helpers import OPTIONS, make_task, make_tasks, make_trainer, trained


def test_checkpoints_are_plain_and_reload_bit_for_bit(tmp_path):
    model = make_tiny_llama()
    names = set(model.state_dict())
    trainer = trained(tmp_path, model=model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "_task_01_t1")
    assert set(again.state_dict()) == names
    assert all(value.equal(trainer.model.state_dict()[name]) for name, value in again.state_dict().items())
    ids = torch.tensor([[5, 6, 7]])
    assert again(ids).logits.equal(trainer.model.eval()(ids).logits)
    checkpoints = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/checkpoint-*"))
    assert checkpoints == [f"_task_0{t}_t{t}/checkpoint-{n}" for t in range(2) for n in (2, 4, 6)]


@pytest.mark.parametrize("last", ["_task_00_t0/checkpoint-4", "_task_01_t1/checkpoint-2", "_task_01_t1/checkpoint-4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_gives_the_same_run(tmp_path, last, dtype):
    """From a folder as it is when the process dies after this checkpoint."""
    options = {"weight_decay": 0.1, "rank_rule": "energy"}
    whole = trained(tmp_path, model=make_tiny_llama().to(dtype), **options)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    rows = whole.matrix.scores
    number, step = int(last[6]), int(last[-1])
    cut_back(tmp_path, number, step)
    trainer = make_trainer(tmp_path, model=make_tiny_llama().to(dtype), **options)
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.matrix.scores == rows


def cut_back(folder: Path, number: int, step: int) -> None:
    """Remove everything that was written after a checkpoint."""
    for path in folder.glob("_task_*"):
        task = int(path.name[6:8])
        for checkpoint in path.glob("checkpoint-*"):
            if task > number or (task == number and int(checkpoint.name[11:]) > step):
                shutil.rmtree(checkpoint)
        if task > number:
            shutil.rmtree(path)
        elif task == number:
            (path / "model.safetensors").unlink()
    state = json.loads((folder / "_continual_state.json").read_text())
    (folder / "_continual_state.json").write_text(json.dumps(state | {"rows": state["rows"][:number]}))


def test_resuming_between_tasks(tmp_path):
    whole = trained(tmp_path)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    shutil.rmtree(tmp_path / "_task_01_t1")
    state = json.loads((tmp_path / "_continual_state.json").read_text())
    (tmp_path / "_continual_state.json").write_text(json.dumps(state | {"rows": state["rows"][:1]}))
    trainer = make_trainer(tmp_path, model=make_tiny_llama(seed=1))
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())


def test_eight_bit_moments_resume_to_the_same_weights(tmp_path):
    ranks = {"rank_rule": "uniform", "target_retention": 0.5, "first_task_retention": 0.5}
    options = {"optim": "adamw_bnb_8bit", "weight_decay": 0.1, **ranks}

    def model():
        return make_tiny_llama(hidden_size=64, intermediate_size=160)

    whole = trained(tmp_path, model=model(), **options)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    cut_back(tmp_path, 1, 2)
    trainer = make_trainer(tmp_path, model=model(), **options)
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())
    states = trainer._subspace_optimizer().state
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    assert states[weight]["state1"].dtype == torch.uint8 and "exp_avg" in states[trainer.model.lm_head.weight]


KILLED = """
import sys
from tests.trainers.adaptive_svd.helpers import make_trainer
trainer = make_trainer(sys.argv[1], max_steps=60, save_steps=5)
trainer.train(resume_from_checkpoint=sys.argv[2] == "resume")
"""


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_weights(tmp_path):
    def run(folder: Path, mode: str) -> subprocess.Popen:
        root = str(Path(__file__).parents[3])
        environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(folder), mode], env=environment, stdout=subprocess.DEVNULL, cwd=root
        )

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, "new").wait(timeout=300) == 0
    process = run(killed, "new")
    deadline = time.monotonic() + 300
    while not list(killed.glob("_task_01_t1/checkpoint-2*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "_task_01_t1/checkpoint-60").exists()
    assert run(killed, "resume").wait(timeout=300) == 0
    pair = [AutoModelForCausalLM.from_pretrained(folder / "_task_01_t1").state_dict() for folder in (whole, killed)]
    assert all(value.equal(pair[1][name]) for name, value in pair[0].items())
    states = [json.loads((folder / "_continual_state.json").read_text()) for folder in (whole, killed)]
    assert states[0] == states[1]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    trained(tmp_path)
    cut_back(tmp_path, 1, 4)
    (tmp_path / "_task_01_t1/checkpoint-4/trainer_state.json").unlink()
    assert make_trainer(tmp_path)._last_checkpoint(1).endswith("checkpoint-2")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tasks": list(reversed(make_tasks()))}, "its tasks are"),
        ({"tasks": [make_task("t0", 0), make_task("t1", 2)]}, "its data are"),
        ({"seed": 7}, "its seed are"),
        ({"projection": "joint"}, "its projection are"),
        ({"target_modules": ["up_proj"]}, "its layers are"),
        (
            {"tasks": [replace(make_tasks()[0], options=OPTIONS[:0:-1] + OPTIONS[:1]), make_tasks()[1]]},
            "its options are",
        ),
        ({"tasks": [replace(make_tasks()[0], eval=make_tasks()[1].eval), make_tasks()[1]]}, "its data are"),
    ],
)
def test_a_run_of_other_tasks_does_not_go_on(tmp_path, change, named):
    trained(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=named):
        make_trainer(tmp_path, max_steps=2, **change).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"is of an earlier run: pass resume_from_checkpoint=True"):
        make_trainer(tmp_path, max_steps=2).train()
    with pytest.raises(ValueError, match="no run to go on with"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="a sequence goes on from its folder"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "_task_00_t0/checkpoint-2"))


def test_one_subspace_per_task_is_needed(tmp_path):
    trained(tmp_path)
    cut_back(tmp_path, 1, 2)
    (tmp_path / "_task_01_t1/subspace.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without which the task cannot go on"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_died_after_the_last_checkpoint_of_a_task(tmp_path):
    """With a number of steps that is no multiple of an epoch, where Trainer takes one step more."""
    options = {"max_steps": 5, "save_steps": 5, "lr_scheduler_type": "constant"}
    whole = trained(tmp_path, **options)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    cut_back(tmp_path, 1, 5)
    trainer = make_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=True)
    assert all(value.equal(expected[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.state.global_step == 5 and trainer.matrix.scores == whole.matrix.scores


def test_a_finished_run_tells_the_same(tmp_path):
    whole = trained(tmp_path, rank_rule="uniform")
    again = make_trainer(tmp_path, rank_rule="uniform")
    again.train(resume_from_checkpoint=True)
    assert again.ranks == whole.ranks and sum(again.ranks.values()) and again.report == whole.report


def test_a_half_trained_model_does_not_start_again(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Stop)
    with pytest.raises(ValueError, match="half trained: make the trainer anew"):
        trainer.train(resume_from_checkpoint=True)
    again = make_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    expected = trained(tmp_path / "whole").model.state_dict()
    assert all(value.equal(expected[name]) for name, value in again.model.state_dict().items())
