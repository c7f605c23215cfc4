"""Advice on a sweep: real runs fill the ledger, like is compared with like, and the advice says how far it was right."""

from __future__ import annotations

import json
import random

import pytest
from datasets import Dataset
from transformers import TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from hf_ext.trainers.sft_recipe import SweepAdvisor
from hf_ext.trainers.sft_recipe.advisor import read_ledger
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import CPU_RUN, make_tokenizer

ROWS = Dataset.from_list([{"prompt": f"w{i} ", "completion": f"w{i % 7 + 40} w{i % 5 + 60}"} for i in range(16)])
LIKE = {"model": "llama", "batch": 4}


def run(folder, name, advisor=None, **settings):
    advisor = advisor or SweepAdvisor(folder / "sweep.jsonl", name, window=3)
    settings = {**CPU_RUN, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 6, **settings}
    trainer = SFTTrainer(
        make_tiny_llama(),
        SFTConfig(str(folder / name), **settings),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=make_tokenizer(),
        callbacks=[advisor],
    )
    return trainer, advisor


def finished(folder, *runs):
    """A ledger of runs with given (grad norm, loss, final metric)."""
    lines = []
    for name, norm, loss, final in runs:
        lines.append({"run": name, "like": LIKE, "early": {"grad_norm": norm, "loss": loss}})
        lines.append({"run": name, "final": final, "metric": "eval_loss", "step": 9})
        lines.append({"run": name, "finished": True})
    (folder / "sweep.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "sweep.jsonl"


def advice_of(ledger, norm, loss, **options):
    advisor = SweepAdvisor(ledger, "new", window=1, **options)
    advisor._like = LIKE
    state = TrainerState(is_world_process_zero=True)
    advisor.on_log(None, state, TrainerControl(), logs={"loss": str(loss), "grad_norm": str(norm)})
    return advisor.advice


def test_a_sweep_of_real_runs(tmp_path):
    for name, rate in (("slow", 1e-4), ("middle", 1e-3), ("fast", 1e-2)):
        trainer, advisor = run(tmp_path, name, learning_rate=rate)
        trainer.train()
    runs = read_ledger(tmp_path / "sweep.jsonl")
    assert list(runs) == ["slow", "middle", "fast"] and all(facts["finished"] for facts in runs.values())
    assert len({json.dumps(facts["like"]) for facts in runs.values()}) == 1
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry][:3]
    assert runs["fast"]["early"]["grad_norm"] == pytest.approx(sum(logged) / 3, rel=1e-3)
    assert runs["fast"]["final"] == pytest.approx(
        trainer.state.log_history[-2].get("eval_loss", runs["fast"]["final"])
    )
    assert "place" in advisor.advice and "2 finished runs are too few" in advisor.advice


def test_ranks_and_reliability(tmp_path):
    ledger = finished(tmp_path, ("a", 1.0, 2.0, 0.1), ("b", 2.0, 1.9, 0.2), ("c", 3.0, 1.8, 0.3), ("d", 4.0, 1.7, 0.4))
    advice = advice_of(ledger, 2.5, 1.75)
    assert "early grad_norm 2.5: place 3 of 5" in advice and "early loss 1.75: place 4 of 5" in advice
    assert advice.count("in 6 of 6 pairs of finished runs this order agreed with eval_loss, so far it holds here") == 2


def test_it_says_when_the_study_does_not_hold(tmp_path):
    ledger = finished(tmp_path, ("a", 1.0, 2.0, 0.4), ("b", 2.0, 1.9, 0.1), ("c", 3.0, 1.8, 0.3), ("d", 4.0, 2.7, 0.5))
    assert "in 4 of 6 pairs of finished runs this order agreed with eval_loss, so it tells little here" in advice_of(
        ledger, 2.5, 1.75
    )
    ledger = finished(tmp_path, *[(str(i), 4.0 - i, float(i), 0.1 * i) for i in range(4)])
    assert advice_of(ledger, 2.5, 1.75).count("in 0 of 6 pairs") == 2
    assert advice_of(ledger, 2.5, 1.75).count("so here it is the other way round") == 2
    better = advice_of(
        finished(tmp_path, *[(str(i), i, 3 - i, 0.1 * i) for i in range(4)]), 1, 1, greater_is_better=True
    )
    assert better.count("in 0 of 6 pairs") == 2


def test_chance_is_not_taken_for_a_law(tmp_path):
    """Of orders that have nothing to do with each other, few seem to hold, however many runs there are."""
    draw = random.Random(0)
    for count in (4, 12):
        verdicts = []
        for _ in range(60):
            rows = [(str(i), draw.random(), draw.random(), draw.random()) for i in range(count)]
            verdicts.append(advice_of(finished(tmp_path, *rows), 0.5, 0.5).count("tells little"))
        assert sum(verdicts) >= 0.85 * 2 * len(verdicts)


def test_only_like_runs_are_compared(tmp_path):
    ledger = finished(tmp_path, ("a", 1.0, 2.0, 0.1))
    with ledger.open("a") as file:
        file.write(
            json.dumps({"run": "b", "like": {**LIKE, "batch": 8}, "early": {"grad_norm": 0.1, "loss": 9}}) + "\n"
        )
    assert "place 2 of 2" in advice_of(ledger, 2.5, 1.75)


def test_nothing_is_stopped_and_odd_numbers_are_passed_over(tmp_path):
    advisor = SweepAdvisor(tmp_path / "sweep.jsonl", "odd", window=2)
    advisor._like, control = LIKE, TrainerControl()
    state = TrainerState(is_world_process_zero=True)
    for logs in (
        {"loss": "nan", "grad_norm": 1.0},
        {"eval_loss": 3.0},
        {"loss": 2.0},
        {"loss": 4.0, "grad_norm": None},
    ):
        advisor.on_log(None, state, control, logs=logs)
    assert not control.should_training_stop
    assert read_ledger(tmp_path / "sweep.jsonl")["odd"]["early"] == {"loss": 3.0}
    assert "early loss 3: place 1 of 1" in advisor.advice and "grad_norm" not in advisor.advice


def test_a_resumed_run_keeps_its_window(tmp_path):
    trainer, _ = run(tmp_path, "a", max_steps=2, save_strategy="steps", save_steps=2, eval_strategy="no")
    trainer.train()
    assert not (tmp_path / "sweep.jsonl").exists() or "early" not in read_ledger(tmp_path / "sweep.jsonl")["a"]
    trainer, _ = run(tmp_path, "a", max_steps=4, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SweepAdvisor))
    assert callback.advice is not None and len(callback._seen["loss"]) == 3


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="window=0"):
        SweepAdvisor(tmp_path / "sweep.jsonl", "a", window=0)
    trainer, _ = run(tmp_path, "a", logging_steps=5)
    with pytest.raises(ValueError, match="logging_steps=5 is above window=3"):
        trainer.train()
    (tmp_path / "broken.jsonl").write_text('{"run": "a"}\n[1]\n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 2 is no record of a run"):
        read_ledger(tmp_path / "broken.jsonl")
