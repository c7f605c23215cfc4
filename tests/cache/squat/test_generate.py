"""`generate` with a SQuat cache against `generate` with transformers' own, over models and ways of decoding."""

import warnings

import pytest
import torch

from hf_ext.cache.squat import SQuatCache, squat_attention
from tests.cache.squat import models
from tests.cache.squat.decoding import EIGHT, MODES, NEW, WHOLE, agreement, expected, generate, model_named, prompt

# transformers: "assisted generation is not supported with stateful models", as linear attention makes Qwen3-Next one.
REFUSED = {("qwen3_next", "prompt_lookup"), ("qwen3_next", "assistant")}
PAIRS = [(name, mode) for name in models.MODELS for mode in MODES if (name, mode) not in REFUSED]
# Nothing of DeepSeek-V3 is packed. bfloat16 rounds activations more coarsely than 8 bits round the cache, which beams
# and draws tell apart; a few modes show that the dtypes fit together.
PACKED_PAIRS = [
    (name, mode)
    for name, mode in PAIRS
    if name != "deepseek_v3" and (name != "llama_bf16" or mode in {"greedy", "padded", "prompt_lookup", "chat"})
]


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_without_packing_the_tokens_are_the_same(name, mode):
    model = model_named(name)
    with squat_attention(model):
        tokens, caches = MODES[mode](model, lambda: SQuatCache(model.config, **WHOLE))
    assert not any(layer.has_packed for cache in caches for layer in cache.packed_layers)
    assert torch.equal(tokens, expected(name, mode))


@pytest.mark.parametrize(("name", "mode"), PACKED_PAIRS)
def test_with_eight_bits_the_tokens_agree(name, mode):
    model = model_named(name)
    with squat_attention(model):
        tokens, caches = MODES[mode](model, lambda: SQuatCache(model.config, **EIGHT))
    assert all(cache.packed_layers for cache in caches)
    assert all(layer.has_packed for cache in caches for layer in cache.packed_layers)
    assert agreement(tokens, expected(name, mode)) >= 0.99


def test_two_bits_change_tokens():
    """Else these models could not tell a right cache from a wrong one."""
    model = model_named("llama")
    with squat_attention(model):
        tokens, _ = MODES["greedy"](model, lambda: SQuatCache(model.config, **{**EIGHT, "bits": 2}))
    assert agreement(tokens, expected("llama", "greedy")) < 0.9


# Bloom computes its attention itself. DeepSeek-V3 expands what it caches before it attends, and none of it is packed.
@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in {"bloom", "deepseek_v3"}])
def test_decoding_never_dequantises_the_cache(name):
    model = model_named(name)
    with squat_attention(model):
        _, [cache] = MODES["greedy"](model, lambda: SQuatCache(model.config, **EIGHT))
    assert all(layer.has_packed for layer in cache.packed_layers)
    assert [layer.materializations for layer in cache.packed_layers] == [0] * len(cache.packed_layers)


def test_bloom_dequantises_the_cache_at_every_step():
    model = model_named("bloom")
    _, [cache] = MODES["greedy"](model, lambda: SQuatCache(model.config, **EIGHT))
    assert all(layer.materializations >= NEW - 1 for layer in cache.packed_layers)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_next"])
def test_ordinary_attention_warns_once_and_is_right(name):
    model = model_named(name)
    cache = SQuatCache(model.config, **EIGHT)
    with pytest.warns(UserWarning, match=r'set_attn_implementation\("squat"\)') as caught:
        tokens, _ = MODES["greedy"](model, lambda: cache)
    assert len([warning for warning in caught if "SQuatCache" in str(warning.message)]) == 1
    assert all(layer.has_packed and layer.materializations for layer in cache.packed_layers)
    assert agreement(tokens, expected(name, "greedy")) >= 0.99


def test_packed_attention_does_not_warn():
    model = model_named("llama")
    with squat_attention(model), warnings.catch_warnings():
        warnings.simplefilter("error")
        MODES["greedy"](model, lambda: SQuatCache(model.config, **EIGHT))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize(
    "options", [{}, dict(cache_implementation="static"), dict(use_cache=False)], ids=["dynamic", "static", "none"]
)
def test_packed_attention_serves_other_caches(name, options):
    model = model_named(name)
    with squat_attention(model):
        assert torch.equal(generate(model, None, prompt(56), **options), expected(name, "greedy"))


@pytest.mark.parametrize("implementation", ["static", "quantized", "dynamic"])
def test_a_cache_and_the_name_of_another_are_refused(implementation):
    model = model_named("llama")
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        generate(model, SQuatCache(model.config, **EIGHT), prompt(20), cache_implementation=implementation)
