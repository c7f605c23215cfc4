"""Cost and loss of a compressed cache: the recorded figures of the authors' code, and counts of bytes."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from hf_ext.cache.squat import SQuatCacheConfig, SQuatLayer
from hf_ext.metrics.compression import (
    LogitComparison,
    attention_output_error,
    bits_per_element,
    cache_bytes,
    score_error,
)
from tests.kernels.recorded import FOLDER, MANIFEST


@pytest.mark.parametrize("file", ["gqa_d64", "mha_d32"])
@pytest.mark.parametrize("name", ["c0", "c1"])
def test_recorded_errors(file, name):
    tensors, config = load_file(FOLDER / f"{file}.safetensors"), MANIFEST[file]["configs"][name]
    keys, values = tensors["k"], tensors["v"]
    group, bits = config["G"], config["bits"]
    codes, scale, low = (tensors[f"v_G{group}_b{bits}.{part}"] for part in ("codes", "scale", "min"))
    rough_values = codes * scale.repeat_interleave(group, -1) + low.repeat_interleave(group, -1)
    for when, query, causal in (("prompt", tensors["q"], True), ("future", tensors["q_future"], False)):
        for kind, suffix in (("squat", ""), ("plain", "_plain")):
            rough_keys = tensors[f"{name}.k_deq{suffix}"]
            recorded = config["metrics"][when]
            assert score_error(query, keys, rough_keys, causal) == pytest.approx(
                recorded[kind]["score_rmse"], rel=0.02
            )
            ours = attention_output_error(query, keys, values, rough_keys, rough_values, causal)
            assert ours == pytest.approx(recorded[kind]["out_rel"], rel=0.02)
            ours = attention_output_error(query, keys, values, rough_keys, values, causal)
            assert ours == pytest.approx(recorded[f"{kind}_k_only"]["out_rel"], rel=0.02)


def test_bytes_are_those_of_the_storages():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8), 0)
    assert cache_bytes(cache) == 2 * 160 * 4
    assert bits_per_element(cache, 320) == 32
    cache.layers[0].keys = cache.layers[0].keys[:, :, :1]
    assert cache_bytes(cache) == 2 * 160 * 4, "a view keeps all of it"
    with pytest.raises(ValueError, match="elements=0"):
        bits_per_element(cache, 0)


def test_bytes_are_found_wherever_they_are_kept():
    class Slots:
        __slots__ = ("tensor",)

    cache, tensor, slots = DynamicCache(), torch.zeros(10), Slots()
    slots.tensor = torch.zeros(20)
    cache.kept = [
        {"a": (tensor, slots)},
        SimpleNamespace(again=tensor, of=(Slots, score_error), cache=cache),
        {"b": tensor[:2]},
    ]
    assert cache_bytes(cache) == 30 * 4


def test_bytes_of_a_packed_layer_are_what_it_says():
    layer = SQuatLayer(SQuatCacheConfig(bits=2))
    layer.update(*(torch.randn(1, 2, 500, 64) for _ in range(2)))
    layer.observe(torch.randn(1, 4, 500, 64), None)
    layer.pack()
    cache = DynamicCache()
    cache.layers.append(layer)
    assert cache_bytes(cache) == layer.nbytes


def test_logits_are_compared():
    torch.manual_seed(0)
    reference, labels = torch.randn(2, 30, 11), torch.randint(0, 11, (2, 30))
    same = LogitComparison()
    same.update(reference[:, :10], reference[:, :10], labels[:, :10])
    same.update(reference[:, 10:], reference[:, 10:], labels[:, 10:])
    result = same.result()
    expected = torch.nn.functional.cross_entropy(reference.flatten(0, 1), labels.flatten()).exp()
    assert result["perplexity"] == pytest.approx(expected.item(), rel=1e-5) == result["reference_perplexity"]
    assert result["token_agreement"] == 1 and result["kl_divergence"] == 0 and result["tokens"] == 60
    other = LogitComparison()
    noisy = reference + torch.randn_like(reference)
    other.update(noisy, reference, labels)
    assert other.result()["token_agreement"] == (noisy.argmax(-1) == reference.argmax(-1)).float().mean()
    expected = (
        torch.nn.functional.kl_div(noisy.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="sum")
        / 60
    )
    assert other.result()["kl_divergence"] == pytest.approx(expected.item(), rel=1e-4)
    with pytest.raises(ValueError, match=r"logits \(2, 30, 11\).*labels \(2, 29\)"):
        other.update(noisy, reference, labels[:, 1:])
    with pytest.raises(ValueError, match="No predictions"):
        LogitComparison().result()
