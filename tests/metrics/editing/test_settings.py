"""Single, batch and sequential editing with a real editor: a few steps of gradient descent."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_ext.metrics.editing import KnowledgeEditingEvaluator, run_editing
from hf_ext.metrics.editing.restore import ParameterSnapshot
from tests.metrics.editing.conftest import train

PROTOCOLS = ("teacher_forced_token", "generate_exact")
TEXTS = ["Ada lives in Lomak", "Cy likes milk"]


@pytest.fixture
def evaluator(world_model, word_tok, records):
    return KnowledgeEditingEvaluator(world_model, word_tok, records, max_new_tokens=6, drift_texts=TEXTS)


@pytest.fixture
def editor(word_tok):
    def edit(model, records, steps=15, lr=3e-3):
        train(model, word_tok, [(record.prompt, record.target_new) for record in records], steps, lr)

    return edit


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, expected) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_single_edits_and_restores_exactly(evaluator, editor):
    untouched = state(evaluator.model)
    seen = []
    report = run_editing(evaluator, lambda model, records: (seen.append(records), editor(model, records)), "single")
    assert [len(records) for records in seen] == [1] * 4
    assert_same(evaluator.model, untouched)
    assert not evaluator.model.training
    assert all(parameter.grad is None for parameter in evaluator.model.parameters())
    assert report.settings["setting"] == "single"
    assert report.metrics["reliability/generate_exact"] == 1.0
    assert report.metrics["before/reliability/generate_exact"] == 0.0
    assert report.metrics["drift/text_kl"] > 0
    assert {m.n for m in report.measurements if m.section == "drift"} == {4}
    # The same edit alone gives the same row: nothing leaked from one edit into the next.
    alone = KnowledgeEditingEvaluator(
        evaluator.model, evaluator._runner.tokenizer, evaluator.records[3:], max_new_tokens=6, drift_texts=TEXTS
    )
    (row,) = run_editing(alone, editor, "single").records
    assert row["scores"] == report.records[3]["scores"]
    assert row["drift"] == pytest.approx(report.records[3]["drift"], rel=1e-3)


def test_training_on_and_on_shows_as_drift(evaluator, editor):
    short, long = (
        run_editing(evaluator, lambda m, r, steps=steps: editor(m, r, steps=steps), "single").metrics
        for steps in (10, 60)
    )
    assert short["reliability/generate_exact"] == long["reliability/generate_exact"] == 1.0
    assert long["drift/text_kl"] > 1.5 * short["drift/text_kl"]


def test_single_restores_an_adapter_only(world_model, word_tok, records, editor):
    model = get_peft_model(world_model, LoraConfig(r=4, target_modules=["down_proj"]))
    untouched = state(model)
    evaluator = KnowledgeEditingEvaluator(model, word_tok, records, max_new_tokens=6)
    snapshot = ParameterSnapshot(model)
    assert all("lora_" in name or "inv_freq" in name for name in snapshot._copies)
    report = run_editing(evaluator, lambda m, r: editor(m, r, lr=2e-2), "single")
    assert (
        report.metrics["reliability/teacher_forced_token"] > report.metrics["before/reliability/teacher_forced_token"]
    )
    assert_same(model, untouched)


def test_batch(evaluator, editor):
    calls = []
    report = run_editing(evaluator, lambda m, r: (calls.append(len(r)), editor(m, r, steps=40)), "batch")
    assert calls == [4]
    assert report.metrics["reliability/generate_exact"] == 1.0
    assert report.drift["text_kl"]["values"]


def test_sequential_shows_forgetting(evaluator, editor):
    order = []
    report = run_editing(
        evaluator,
        lambda m, r: (order.extend(x.id for x in r), editor(m, r, steps=25)),
        "sequential",
        order_seed=1,
        eval_every=2,
    )
    assert sorted(order) == sorted(r.id for r in evaluator.records) and order != [r.id for r in evaluator.records]
    for protocol in PROTOCOLS:
        immediate = report.metrics[f"immediate/reliability/{protocol}"]
        final = report.metrics[f"reliability/{protocol}"]
        assert report.metrics[f"forgetting/reliability/{protocol}"] == pytest.approx(immediate - final)
    assert report.metrics["immediate/reliability/generate_exact"] == 1.0
    last = order[-1]
    assert report.values("final", "generate_exact", "reliability")[last] == 1.0
    assert [point["edits"] for point in report.curve] == [2, 4]
    assert report.curve[-1]["reliability/generate_exact"] == report.metrics["reliability/generate_exact"]
    assert "forgetting/reliability" in report.table()


def test_mini_batch_sequential(evaluator, editor):
    sizes = []
    report = run_editing(
        evaluator, lambda m, r: (sizes.append(len(r)), editor(m, r)), "sequential", chunk_size=3, eval_every=2
    )
    assert sizes == [3, 1]
    assert [point["edits"] for point in report.curve] == [3, 4]
    assert report.settings["chunk_size"] == 3


def test_reference_is_predicted_once_from_the_untouched_model(evaluator, editor, monkeypatch):
    calls = []
    predict = KnowledgeEditingEvaluator.predict
    monkeypatch.setattr(
        KnowledgeEditingEvaluator, "predict", lambda self, *a, **k: (calls.append(1), predict(self, *a, **k))[1]
    )
    for setting in ("single", "batch"):
        run_editing(evaluator, editor, setting)
    assert len(calls) == 2


def test_editor_that_fails_leaves_the_model_untouched(evaluator, editor):
    untouched = state(evaluator.model)

    def breaking(model, records):
        editor(model, records)
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        run_editing(evaluator, breaking, "single")
    assert_same(evaluator.model, untouched)


def test_frozen_model_is_copied_whole(evaluator):
    evaluator.model.requires_grad_(False)
    untouched = state(evaluator.model)

    def closed_form(model, records):
        model.model.layers[0].mlp.down_proj.weight.data.add_(0.01)

    run_editing(evaluator, closed_form, "single")
    assert_same(evaluator.model, untouched)


def test_edit_that_cannot_be_undone_is_found_out(evaluator, editor):
    evaluator.model.requires_grad_(False)
    evaluator.model.model.norm.requires_grad_(True)

    def elsewhere(model, records):
        model.model.layers[0].mlp.down_proj.weight.data.add_(0.01)

    with pytest.raises(ValueError, match=r"changed 'model.layers.0.mlp.down_proj.weight'"):
        run_editing(evaluator, elsewhere, "single")

    def adding(model, records):
        model.extra = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="added or removed parameters"):
        run_editing(evaluator, adding, "single")


def test_own_restore(evaluator, editor):
    untouched = state(evaluator.model)
    calls = []
    run_editing(
        evaluator, editor, "single", restore=lambda: (calls.append(1), evaluator.model.load_state_dict(untouched))
    )
    assert len(calls) == 4
    assert_same(evaluator.model, untouched)


@pytest.mark.parametrize(
    ("setting", "options", "message"),
    [
        ("lifelong", {}, "setting='lifelong'"),
        ("batch", {"chunk_size": 2}, "chunk_size"),
        ("single", {"eval_every": 2}, "eval_every"),
        ("sequential", {"chunk_size": 0}, "chunk_size=0"),
        ("sequential", {"restore": print}, "restore"),
    ],
)
def test_refuses_options_without_a_meaning(evaluator, editor, setting, options, message):
    with pytest.raises(ValueError, match=message):
        run_editing(evaluator, editor, setting, **options)
