"""Through the Trainer: horizon, logs, checkpoints, and resuming to equal numbers."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_ext import RoseLoraCallback
from hf_ext.tuners.roselora import RoseLoraState, density_report, pruning
from hf_ext.tuners.roselora.state import STATE_FILE
from tests.conftest import make_tiny_llama
from tests.tuners.roselora.conftest import adapter_weights, make_model, train

STEPS = 10


def dataset() -> Dataset:
    ids = torch.randint(3, 99, (40, 12), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def run(folder, model=None, resume=None, callbacks=None, **arguments):
    settings = dict(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
    )
    model = model or make_model(t_init=0.2, t_final=0.6)
    callbacks = [RoseLoraCallback()] if callbacks is None else callbacks
    trainer = Trainer(
        model, TrainingArguments(**{**settings, **arguments}), train_dataset=dataset(), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return folder, run(folder)


def test_fractions_refer_to_the_trainers_steps(full_run):
    _, trainer = full_run
    schedule = pruning.schedules(trainer.model)["default"]
    assert (schedule.limits, schedule.step) == ((2, 6), STEPS)
    assert density_report(trainer.model).layers[0].kept_a == 7 / 64


def test_density_is_in_the_log_history(full_run):
    folder, trainer = full_run
    logged = [entry["roselora/density"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == sorted(logged, reverse=True)
    assert logged[0] == 1.0 and logged[-1] == pytest.approx(0.1)
    stored = json.loads((folder / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert stored["log_history"][-1]["roselora/density"] == pytest.approx(0.1)
    assert trainer.state.log_history[-1]["roselora/delta_density"] == density_report(trainer.model).density


@pytest.mark.parametrize("step", range(1, STEPS))
def test_resuming_equals_the_uninterrupted_run(full_run, tmp_path, step):
    folder, whole = full_run
    resumed = run(
        tmp_path,
        resume=str(folder / f"checkpoint-{step}"),
        callbacks=[RoseLoraCallback(resume_from_checkpoint=folder / f"checkpoint-{step}")],
        save_strategy="no",
    )
    ours, theirs = adapter_weights(resumed.model), adapter_weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_inside_the_output_folder_needs_no_hint(full_run):
    folder, whole = full_run
    resumed = run(folder, resume=str(folder / "checkpoint-4"))
    ours, theirs = adapter_weights(resumed.model), adapter_weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_without_state_is_refused(tmp_path):
    run(tmp_path, callbacks=[], model=make_model(), max_steps=2)
    with pytest.raises(FileNotFoundError, match=rf"{STATE_FILE} is missing.*resume"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-2"))


def test_damaged_or_foreign_state_is_refused(full_run, tmp_path):
    folder, _ = full_run
    data = (folder / "checkpoint-4" / STATE_FILE).read_bytes()
    (tmp_path / STATE_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        RoseLoraState(make_model()).load(tmp_path)
    with pytest.raises(ValueError, match=r"shape \[4, 64\].*\[2, 64\]"):
        RoseLoraState(make_model(r=2)).load(folder / "checkpoint-4")
    with pytest.raises(ValueError, match=r"adapters \['default'\]"):
        RoseLoraState(get_peft_model(make_tiny_llama(), LoraConfig(target_modules=["q_proj"]))).load(
            folder / "checkpoint-4"
        )


def test_state_of_a_custom_loop(tmp_path):
    """Any loop: save next to the optimizer, load into a new process' model."""
    whole = make_model()
    train(whole, steps=8)
    half = make_model()
    optimizer = train(half, steps=3)
    RoseLoraState(half).save(tmp_path)
    half.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / STATE_FILE)
    assert {t.dtype for t in tensors.values()} == {torch.float32}

    fresh = make_model()
    for name, weight in adapter_weights(half).items():
        fresh.get_parameter(name).data.copy_(weight)
    RoseLoraState(fresh).load(tmp_path)
    again = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=1e-2)
    again.load_state_dict(optimizer.state_dict())
    train(fresh, steps=5, first=3, optimizer=again)
    ours, theirs = adapter_weights(fresh), adapter_weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_gradient_accumulation_counts_optimizer_steps(tmp_path):
    trainer = run(tmp_path, gradient_accumulation_steps=3, max_steps=4, save_strategy="no")
    assert pruning.schedules(trainer.model)["default"].step == 4


def test_each_training_runs_the_schedule_anew(tmp_path):
    model = make_model(t_init=2, t_final=6)
    for _ in range(2):
        run(tmp_path, model=model, save_strategy="no")
        assert pruning.schedules(model)["default"].step == STEPS


def test_training_that_ends_too_early_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"t_final is step 50, but training ends at step 10"):
        run(tmp_path, model=make_model(t_init=2, t_final=50), save_strategy="no")


def test_callback_without_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no RoseLoRA adapter"):
        run(tmp_path, model=get_peft_model(make_tiny_llama(), LoraConfig(target_modules=["q_proj"])))


def test_parameters_that_the_optimizer_does_not_hold_are_reported(tmp_path):
    """What a run under an engine with flattened parameters looks like from here."""
    model = make_model()
    extra = torch.nn.Parameter(torch.zeros(1))
    settings = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    optimizers = (torch.optim.SGD([extra], lr=0.1), None)
    trainer = Trainer(model, settings, train_dataset=dataset(), callbacks=[RoseLoraCallback()], optimizers=optimizers)
    with pytest.raises(RuntimeError, match=r"no adapter parameter took part in this step of SGD"):
        trainer.train()
