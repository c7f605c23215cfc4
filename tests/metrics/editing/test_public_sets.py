"""Public edit sets: they load, and an unedited model keeps all of them; also on the embedded real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ext.metrics.editing import KnowledgeEditingEvaluator, load_edits
from tests.conftest import make_tiny_llama
from tests.metrics.editing.conftest import bpe_tokenizer

DATA = Path(__file__).parents[2] / "data/editing"
DEMO = Path(__file__).parents[3] / "hf_ext/demo"
SIZES = {"counterfact": 40, "qaedit": 40, "wikibio": 25, "zsre_sample": 14}


@pytest.mark.parametrize("name", SIZES)
def test_unedited_model_keeps_public_sets(name):
    records = load_edits(DATA / f"{name}.jsonl")
    assert len(records) == SIZES[name] and load_edits([record.to_dict() for record in records]) == records
    texts = [text for record in records for text in (record.prompt, record.target_new)]
    tokenizer = bpe_tokenizer(texts, kind="byte_level", vocab_size=2000, bos=True)
    model = make_tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    evaluator = KnowledgeEditingEvaluator(
        model, tokenizer, records[:12], max_new_tokens=64, batch_size=32, drift_texts=[records[0].prompt]
    )
    metrics = evaluator.evaluate(evaluator.predict()).metrics
    assert metrics["drift/text_kl"] == 0
    for protocol in ("teacher_forced_token", "generate_exact"):
        assert metrics[f"reliability/{protocol}"] == metrics[f"before/reliability/{protocol}"]
        assert metrics.get(f"locality/{protocol}", 1.0) == 1.0
        assert (f"locality/{protocol}" in metrics) == (name != "wikibio")


def test_demo_edits_are_complete():
    records = load_edits(DEMO / "edits.jsonl")
    assert len(records) == 10 and len({record.relation for record in records}) == 10
    for record in records:
        assert record.ground_truth and len(record.rephrase) == 2 and len(record.locality["neighborhood"]) >= 3
    sentences = (DEMO / "drift.txt").read_text(encoding="utf-8").splitlines()
    assert len(sentences) == 24 and all(sentence.endswith(".") for sentence in sentences)


@pytest.mark.real_model
def test_real_model_knows_the_old_answers(real_model, real_tokenizer):
    records = load_edits(DEMO / "edits.jsonl")[:3] + load_edits(DATA / "counterfact.jsonl")[:3]
    evaluator = KnowledgeEditingEvaluator(
        real_model,
        real_tokenizer,
        records,
        protocols=("teacher_forced_token", "generate_contains"),
        max_new_tokens=4,
        batch_size=16,
        drift_texts=["The train left the station a few minutes late."],
    )
    before = evaluator.predict()
    report = evaluator.evaluate(before)
    assert report.metrics["locality/teacher_forced_token"] == report.metrics["locality/generate_contains"] == 1.0
    assert report.metrics["drift/text_kl"] == report.metrics["drift/locality_kl"] == 0.0
    assert report.metrics["reliability/generate_contains"] < 0.5
    for record, row in zip(records[:3], report.records, strict=False):
        assert record.ground_truth in row["texts"][0]["prediction"]
    # 8 tokens a text and one per locality prompt, 2 bytes for each of 262,144 entries.
    assert all(table.shape[1] == real_model.config.vocab_size for table in before.drift.log_probs.values())
