"""Layers that wait in CPU memory until an accelerator needs them."""

import pytest
import torch

from hf_ext.cache.squat import SQuatCache, squat_attention
from tests.cache.squat import models
from tests.cache.squat.decoding import EIGHT, MODES, generate, model_named, prompt


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_offloading_needs_an_accelerator():
    with pytest.raises(ValueError, match=r"offloading=True.*leave offloading out"):
        SQuatCache(model_named("llama").config, offloading=True)


def tensors(thing) -> list[torch.Tensor]:
    """All tensors in an object's attributes, at any depth."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    parts = thing if isinstance(thing, tuple) else vars(thing).values() if hasattr(thing, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_offload_and_prefetch_move_everything():
    model, mask = model_named("llama"), torch.ones(2, 56, dtype=torch.long)
    mask[0, :45] = 0  # padding among the tokens that wait, which the layer keeps marks of
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        generate(model, cache, prompt(56, batch=2), mask, tokens=1)
    layer = cache.packed_layers[0]
    before = [tensor.clone() for tensor in tensors(layer)]
    assert len(before) >= 2 * 5 + 1 + 3  # keys and values, marks of padding, the subspace
    layer.offload()
    layer.prefetch()
    assert all(map(torch.equal, tensors(layer), before))
    layer.device = torch.device("meta")
    layer.prefetch()
    assert len(tensors(layer)) == len(before)
    assert all(tensor.is_meta for tensor in tensors(layer))


class Stream:
    """An accelerator's stream, where there is none."""

    def wait_stream(self, other): ...
    def __enter__(self): ...
    def __exit__(self, *_): ...


@pytest.mark.parametrize(
    ("name", "order", "log"),
    [
        (
            "llama",
            [0, 1, 0],
            ["fetch 1", "update 0", "offload 0", "fetch 0", "update 1", "offload 1", "fetch 1", "update 0"],
        ),
        # Layer 1 slides, and others read what layer 2 holds: both stay.
        (
            "gemma3n",
            [0, 1, 2, 0],
            ["fetch 2", "update 0", "offload 0", "fetch 2", "update 1", "fetch 0", "update 2", "fetch 2", "update 0"],
        ),
    ],
)
def test_a_layer_is_offloaded_at_the_next_update(monkeypatch, name, order, log):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Stream", Stream)
    cache = SQuatCache(model_named(name).config, offloading=True)
    done = []
    for index, layer in enumerate(cache.layers):
        monkeypatch.setattr(layer, "offload", lambda index=index: done.append(f"offload {index}"))
        monkeypatch.setattr(layer, "prefetch", lambda index=index: done.append(f"fetch {index}"))
        monkeypatch.setattr(layer, "update", lambda *_, index=index: done.append(f"update {index}"))
    elsewhere = torch.empty(1, 2, 1, 16, device="meta")
    for index in order:
        cache.update(elsewhere, elsewhere, index)
    assert done == log


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", ["llama", "gemma3n"])
@pytest.mark.parametrize("mode", ["greedy", "beams", "padded"])
def test_offloading_changes_no_token(name, mode):
    model = models.build(name).to(torch.accelerator.current_accelerator())
    with squat_attention(model):
        right, _ = MODES[mode](model, lambda: SQuatCache(model.config, **EIGHT))
        tokens, [cache] = MODES[mode](model, lambda: SQuatCache(model.config, **EIGHT, offloading=True))
    assert cache.packed_layers[0].tokens[0].recent.device.type == "cpu"
    assert torch.equal(tokens, right)
