"""The callback inside a real `Trainer`."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_ext.metrics.editing import EditingCallback, KnowledgeEditingEvaluator


def make_trainer(model, word_tok, records, folder, epochs=4, lr=3e-3) -> Trainer:
    rows = []
    for record in records:
        ids = word_tok(f"{record.prompt} {record.target_new}")["input_ids"] + [word_tok.eos_token_id]
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)})
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=1,
        learning_rate=lr,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(model, arguments, train_dataset=Dataset.from_list(rows))


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "editing/reliability/generate_exact" in entry]


def test_logs_at_train_end_and_every_n_epochs(world_model, word_tok, records, tmp_path):
    trainer = make_trainer(world_model, word_tok, records, tmp_path)
    evaluator = KnowledgeEditingEvaluator(world_model, word_tok, records, max_new_tokens=6)
    callback = EditingCallback(evaluator, trainer, every_n_epochs=2)
    trainer.add_callback(callback)
    trainer.train()
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [8, 16]
    assert entries[-1]["editing/reliability/generate_exact"] > 0
    assert entries[-1]["editing/locality/generate_exact"] == callback.report.metrics["locality/generate_exact"]
    assert "editing/drift/locality_kl" in entries[-1]


def test_steps_and_adapters(world_model, word_tok, records, tmp_path):
    model = get_peft_model(world_model, LoraConfig(r=4, target_modules=["down_proj"]))
    trainer = make_trainer(model, word_tok, records, tmp_path, epochs=1, lr=2e-2)
    callback = EditingCallback(
        KnowledgeEditingEvaluator(model, word_tok, records, max_new_tokens=6), trainer, every_n_steps=3
    )
    trainer.add_callback(callback)
    trainer.train()
    assert [entry["step"] for entry in logged(trainer)] == [3, 4]
    assert callback.report.metrics == callback.evaluator.evaluate().metrics


def test_refuses_a_resumed_model_without_reference(world_model, word_tok, records, tmp_path):
    trainer = make_trainer(world_model, word_tok, records, tmp_path)
    evaluator = KnowledgeEditingEvaluator(world_model, word_tok, records, max_new_tokens=6)
    callback = EditingCallback(evaluator, trainer)
    trainer.state.global_step = 5
    with pytest.raises(ValueError, match="resumes at step 5"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control)
    with pytest.raises(ValueError, match="every_n_steps=0"):
        EditingCallback(evaluator, trainer, every_n_steps=0)
