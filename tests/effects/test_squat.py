"""The effect SQuat promises, small: at two bits the prompt's queries make the rounding cheaper (benchmarks/kv_cache/quality.py has it in full)."""

import pytest
import torch

from benchmarks.kv_cache import quality
from hf_ext.metrics.compression import LogitComparison


@pytest.mark.real_model
@pytest.mark.slow
def test_predictions_stay_nearer_than_with_plain_rounding(real_model, real_tokenizer, monkeypatch):
    monkeypatch.setattr(quality, "PROMPT", 512)
    monkeypatch.setattr(quality, "CONTINUATION", 129)
    real_model.set_attn_implementation("squat")
    divergence = {}
    with torch.no_grad():
        ids = quality.windows(real_tokenizer, 1)
        recorded = quality.prefill(real_model, ids[:, :512])
        full = quality.continuation(real_model, quality.replay(real_model, recorded, dict(residual_length=4096)), ids)
        for kind in ("plain", "guarded"):
            cache = quality.replay(real_model, recorded, quality.SETTINGS[f"2bit-{kind}"])
            comparison = LogitComparison()
            comparison.update(quality.continuation(real_model, cache, ids), full, ids[:, 513:])
            divergence[kind] = comparison.result()["kl_divergence"]
            assert not any(layer.materializations for layer in cache.packed_layers)
    assert divergence["guarded"] < 0.8 * divergence["plain"], divergence
