"""The effect RoseRAG promises, small: right answers among more misleading facts (benchmarks/rag/facts.py has it in full)."""

import pytest

from benchmarks.rag import facts
from hf_ext.trainers.roserag import RoseRAGDatasetBuilder, Sampling, TransformersBackend


@pytest.mark.slow
def test_more_misleading_facts_are_survived(monkeypatch):
    monkeypatch.setattr(facts, "BASE_ROWS", 16_000)
    monkeypatch.setattr(facts, "TEST_QUESTIONS", 256)
    base = facts.base_model(0)
    assert facts.accuracy(base, 4, 0) > 90
    builder = RoseRAGDatasetBuilder(
        TransformersBackend(base, facts.tokenizer(), batch_size=128),
        prompts=facts.PROMPTS,
        n_hinted=0,
        n_unhinted=8,
        sampling=Sampling(max_new_tokens=12),
        batch_size=64,
    )
    pairs = builder.build(facts.questions(600, facts.TRAIN_FACTS, 3000))
    trained = facts.train(base, facts.pairs_by("hardest", pairs, 0), {}, 1e-3, 0)
    assert facts.accuracy(trained, 16, 0) >= facts.accuracy(base, 16, 0) + 8
    assert facts.accuracy(trained, 4, 0) > 90
