"""The callback inside a real `Trainer`."""

from __future__ import annotations

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_ext.metrics.unlearning import UnlearningEvalCallback, evaluate_unlearning
from tests.conftest import make_tiny_llama
from tests.metrics.unlearning.conftest import few

OPTIONS = {"attacks": {"relearning": {"steps": (1,)}}, "max_new_tokens": 24, "batch_size": 32}


def make_trainer(tokenizer, rows, folder, **arguments) -> Trainer:
    data = []
    for row in rows:
        ids = tokenizer(f"{row['prompt']} {row['answer']}")["input_ids"]
        data.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=4,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        **arguments,
    )
    return Trainer(
        make_tiny_llama(vocab_size=len(tokenizer)),
        settings,
        train_dataset=Dataset.from_list(data),
        eval_dataset={"one": Dataset.from_list(data[:1]), "two": Dataset.from_list(data[1:2])},
        processing_class=tokenizer,
    )


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "unlearning/forget_Q_A_Prob" in entry]


def test_whenever_the_trainer_evaluates(island_tok, splits, tmp_path):
    trainer = make_trainer(island_tok, splits["forget"][:4], tmp_path, eval_strategy="steps", eval_steps=2)
    callback = UnlearningEvalCallback(trainer, few(splits), **OPTIONS)
    trainer.add_callback(callback)
    trainer.train()
    entries = logged(trainer)
    # Once for both evaluation sets.
    assert [entry["step"] for entry in entries] == [2, 4]
    report = evaluate_unlearning(trainer.model, island_tok, few(splits), **OPTIONS)
    assert callback.report.metrics == pytest.approx(report.metrics, rel=1e-6)
    found = {name.removeprefix("unlearning/"): value for name, value in entries[-1].items() if "unlearning/" in name}
    assert found == callback.report.metrics and "relearning" in found


def test_every_n_steps_changes_no_training(island_tok, splits, tmp_path):
    losses = []
    for watched in (True, False):
        trainer = make_trainer(island_tok, splits["forget"][:4], tmp_path, eval_strategy="no")
        if watched:
            trainer.add_callback(UnlearningEvalCallback(trainer, few(splits), every_n_steps=3, **OPTIONS))
        losses.append(trainer.train().training_loss)
        assert [entry["step"] for entry in logged(trainer)] == ([3] if watched else [])
    assert losses[0] == losses[1]


def test_the_main_process_only(island_tok, splits, tmp_path):
    trainer = make_trainer(island_tok, splits["forget"][:4], tmp_path)
    callback = UnlearningEvalCallback(trainer, few(splits), **OPTIONS)
    trainer.state.is_world_process_zero = False
    callback.on_evaluate(trainer.args, trainer.state, trainer.control)
    assert callback.report is None and not logged(trainer)


def test_refusals(island_tok, splits, tmp_path):
    trainer = make_trainer(island_tok, splits["forget"][:4], tmp_path)
    with pytest.raises(ValueError, match="every_n_steps=0: give at least 1"):
        UnlearningEvalCallback(trainer, splits, every_n_steps=0)
    trainer.processing_class = None
    with pytest.raises(ValueError, match="processing_class is NoneType; pass a tokenizer"):
        UnlearningEvalCallback(trainer, splits)
    UnlearningEvalCallback(trainer, splits, tokenizer=island_tok)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="a part of the weights only"):
        UnlearningEvalCallback(trainer, splits)
