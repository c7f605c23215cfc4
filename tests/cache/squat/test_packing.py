"""What a cache packs of a model: which layers, which codes, and that neither changes afterwards."""

import hashlib

import pytest
import torch
from transformers import Gemma3nTextConfig, Gemma4TextConfig
from transformers.cache_utils import DynamicLayer

from hf_ext.cache.squat import SQuatCache, SQuatLayer, squat_attention
from tests.cache.squat import models
from tests.cache.squat.decoding import EIGHT, generate, model_named, prompt


@pytest.mark.parametrize("squat_lambda", [0.01, "auto"])
@pytest.mark.parametrize("padding", [16, 32, 96])
def test_padding_of_whole_groups_changes_no_code(squat_lambda, padding):
    model, row = model_named("llama"), prompt(64, seed=2)
    ids = torch.cat([prompt(padding + 64), torch.cat([torch.zeros(1, padding, dtype=torch.long), row], -1)])
    mask = (torch.arange(padding + 64) >= torch.tensor([[0], [padding]])).long()
    settings = dict(bits=2, group_size=16, residual_length=16, sink_tokens=0, squat_lambda=squat_lambda)
    batch, alone = SQuatCache(model.config, **settings), SQuatCache(model.config, **settings)
    with squat_attention(model):
        generate(model, batch, ids, mask, tokens=1)
        generate(model, alone, row, tokens=1)
    for layer, single in zip(batch.packed_layers, alone.packed_layers, strict=True):
        for tokens, right in zip(layer.tokens, single.tokens, strict=True):
            assert right.packed.codes.shape[-2] == 48
            assert torch.equal(tokens.packed.codes[1:, :, padding:], right.packed.codes)


def group_hashes(layer: SQuatLayer) -> list[str]:
    """One for every 16 packed tokens, of keys and values together."""
    hashes = []
    for start in range(0, layer.tokens[0].packed.codes.shape[-2], 16):
        digest = hashlib.sha256()
        for tokens in layer.tokens:
            for part in tokens.packed:
                every = tokens.packed.codes.shape[-2] // part.shape[-2]  # tokens that share an entry
                digest.update(part[..., start // every : (start + 16) // every, :].contiguous().numpy().tobytes())
        hashes.append(digest.hexdigest())
    return hashes


@torch.no_grad()
def test_what_is_packed_never_changes():
    model = model_named("llama")
    cache = SQuatCache(model.config, **{**EIGHT, "bits": 2})
    with squat_attention(model):
        token = model(prompt(56), past_key_values=cache).logits[:, -1:].argmax(-1)
        seen = [group_hashes(layer) for layer in cache.packed_layers]
        for _ in range(200):
            token = model(token, past_key_values=cache).logits.argmax(-1)
            now = [group_hashes(layer) for layer in cache.packed_layers]
            assert all(new[: len(old)] == old for new, old in zip(now, seen, strict=True))
            seen = now
    assert [len(hashes) for hashes in seen] == [(256 - 1 - 4 - 16) // 16] * 2


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss"])
def test_windows_do_not_keep_the_prompt_alive(name):
    model = model_named(name)
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model), torch.no_grad():
        model(prompt(56), past_key_values=cache)
    windows = [layer for layer in cache.layers if layer.is_sliding]
    assert windows
    for layer in windows:
        assert layer.keys.shape[-2] < 56 and layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


@torch.no_grad()
def test_a_cache_iterates_over_whole_keys_and_values():
    model = model_named("gemma3")
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        model(prompt(56), past_key_values=cache)
    found = list(cache)
    assert [None if window is None else window.item() for *_, window in found] == [24, None, None]
    for (keys, values, _), layer in zip(found, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)
        assert type(keys) is torch.Tensor and keys.shape[-2] == (23 if layer.is_sliding else 56)


def test_latents_are_not_packed():
    config = model_named("deepseek_v3").config
    with pytest.warns(UserWarning, match="Nothing of a 'deepseek_v3' model is packed"):
        cache = SQuatCache(config)
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2


@pytest.mark.parametrize("family", [Gemma3nTextConfig, Gemma4TextConfig])
def test_shared_layers_are_known(family):
    """Of the layers with full attention 0, 2 and 4, the last reads what layer 2 has cached."""
    cache = SQuatCache(family(**models.SHARING))
    assert {index: layer.shared for index, layer in enumerate(cache.layers) if isinstance(layer, SQuatLayer)} == {
        0: False,
        2: True,
    }
    assert not any(
        layer.shared for layer in SQuatCache(family(**{**models.SHARING, "num_kv_shared_layers": 0})).packed_layers
    )
