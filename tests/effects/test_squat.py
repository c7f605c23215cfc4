"""The effect SQuat promises, small: at two bits the prompt's queries make the rounding cheaper, and clipping does so again (benchmarks/kv_cache/quality.py has it in full)."""

import pytest
import torch

from benchmarks.kv_cache import quality


@pytest.mark.real_model
@pytest.mark.slow
def test_predictions_stay_nearer_than_with_plain_rounding(real_model, real_tokenizer, monkeypatch):
    monkeypatch.setattr(quality, "PROMPT", 512)
    monkeypatch.setattr(quality, "CONTINUATION", 128)
    real_model.set_attn_implementation("squat")
    with torch.no_grad():
        ids = quality.windows(real_tokenizer, 1)
        recorded = quality.prefill(real_model, ids[:, :512])
        caches = {
            kind: quality.replay(real_model, recorded, quality.SETTINGS[f"{kind}, 2 bits"])
            for kind in ("KIVI", "SQuat, guarded", "default")
        }
        compared = quality.compare(real_model, recorded, caches, ids)
    assert not any(layer.materializations for cache in caches.values() for layer in cache.packed_layers)
    divergence = {kind: quality.pooled(one).result()["kl_divergence"] for kind, one in compared.items()}
    assert divergence["SQuat, guarded"] < 0.8 * divergence["KIVI"], divergence
    assert divergence["default"] < 0.8 * divergence["SQuat, guarded"], divergence
