"""The registered attention: masks, padding, dtypes and gradients of its forward passes, and the models it is set in."""

import copy
import warnings

import pytest
import torch
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_ext.cache.squat import SQuatCache, squat_attention
from tests.cache.squat import models
from tests.cache.squat.decoding import EIGHT, logits_of, model_named, prompt, steps_after


@torch.no_grad()
def test_keys_that_some_query_reads_are_no_padding():
    """Doge lets each head read a few keys of its own choice, so that most keys are hidden from the last query."""
    torch.manual_seed(0)
    config = DogeConfig(**{**models.COMMON, "num_key_value_heads": 2}, keep_window_size=24)
    model, steps = DogeForCausalLM(config).eval(), steps_after(prompt(60), 20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This model computes with its keys")
        right = logits_of(model, DynamicCache(config=config), steps)
        with squat_attention(model):
            ours = logits_of(model, SQuatCache(config, **EIGHT), steps)
    assert (ours - right)[:, 60:].abs().max() < 0.1 * right.std()


@torch.no_grad()
def test_two_documents_that_do_not_see_each_other():
    model, tokens = model_named("llama"), 80
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask[40:, :40] = False
    caches = DynamicCache(config=model.config), SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        for cache in caches:
            model(prompt(tokens), attention_mask=mask[None, None], past_key_values=cache)
        right, ours = (model(prompt(1, seed=9), past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(ours, right, atol=0.02, rtol=0.02)


@torch.no_grad()
@pytest.mark.parametrize("padding", [12, 30])
def test_padding_in_a_later_turn_and_its_removal(padding):
    model, turn = model_named("llama"), padding + 4
    steps = [prompt(60, 2), prompt(turn, 2, seed=5)]
    mask = torch.ones(2, 200, dtype=torch.long)
    mask[0, 60 : 60 + padding] = 0
    caches = DynamicCache(config=model.config), SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        right, ours = (logits_of(model, cache, steps, mask) for cache in caches)
        torch.testing.assert_close(ours[1], right[1], atol=0.02, rtol=0.02)
        for layer in caches[1].packed_layers:
            assert layer.real is not None and not layer.real.all()
        for cache in caches:
            cache.crop(-turn - 18)
        left = caches[0].get_seq_length()
        more = torch.ones(2, left + 40, dtype=torch.long)
        later = []
        for cache in caches:
            rows = [
                model(prompt(1, 2, seed=30 + step), attention_mask=more[:, : left + 1 + step], past_key_values=cache)
                for step in range(40)
            ]
            later.append(torch.cat([row.logits for row in rows], 1))
    torch.testing.assert_close(later[1], later[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast_leaves_the_cache_alone(dtype):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**models.COMMON, "max_position_embeddings": 4096})).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(4)  # queries as large as real ones
    steps = steps_after(prompt(1200), 2)
    cache = SQuatCache(model.config, bits=8)
    with squat_attention(model), torch.autocast("cpu", dtype):
        right, ours = (logits_of(model, each, steps) for each in (DynamicCache(config=model.config), cache))
    assert (ours - right).abs().max() < 0.2 * right.std()
    assert all(layer.subspace.directions.isfinite().all() for layer in cache.packed_layers)


def test_gradients_reach_the_weights_through_whole_tokens():
    model = model_named("llama")
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model), pytest.warns(UserWarning, match="every step dequantises all tokens"):
        model(prompt(56), past_key_values=cache)
        assert not any(
            tensor.requires_grad for layer in cache.packed_layers for tensor in layer.subspace.tensors().values()
        )
        for _ in range(2):
            output = model(prompt(1), past_key_values=cache)
    output.logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_many_drafts_are_read_packed_and_leave_no_trace():
    model = model_named("llama")
    cache = SQuatCache(model.config, **{**EIGHT, "residual_length": 32})
    with squat_attention(model):
        model(prompt(80), past_key_values=cache)
        before = copy.deepcopy(cache)
        ours = model(prompt(30, seed=3), past_key_values=cache).logits
        assert not any(layer.materializations for layer in cache.packed_layers)
        cache.crop(-30)
        one = logits_of(model, before, prompt(30, seed=3).split(1, 1))
    torch.testing.assert_close(ours, one, atol=0.02, rtol=0.02)
    for ours, own in zip(cache.packed_layers, before.packed_layers, strict=True):
        assert torch.equal(ours.subspace.directions, own.subspace.directions)


@torch.no_grad()
def test_a_model_that_reads_its_keys_itself_is_told():
    model = model_named("llama")
    cache = SQuatCache(model.config, **EIGHT)
    with squat_attention(model):
        model(prompt(56), past_key_values=cache)
        with pytest.warns(UserWarning, match="every step dequantises all tokens") as caught:
            for _ in range(3):
                model(prompt(1), past_key_values=cache, output_attentions=True)
    assert len([warning for warning in caught if "dequantises" in str(warning.message)]) == 1


@torch.no_grad()
def test_a_prompt_with_nan_is_no_crash():
    model = model_named("llama")
    embeddings = model.get_input_embeddings()(prompt(56))
    embeddings[:, 20] = float("nan")
    with squat_attention(model):
        assert model(inputs_embeds=embeddings, past_key_values=SQuatCache(model.config, **EIGHT)).logits.isnan().any()


@torch.no_grad()
def test_sparse_attention_keeps_its_choice_of_keys():
    model = models.sparse()
    right = model(prompt(56)).logits
    with squat_attention(model):
        torch.testing.assert_close(model(prompt(56)).logits, right)


def test_unknown_block_attention_is_refused():
    query = torch.randn(1, 4, 1, 16)
    with pytest.raises(ValueError, match='"squat" does not know the blocks that a Linear attends to: use "sdpa"'):
        ALL_ATTENTION_FUNCTIONS["squat"](
            torch.nn.Linear(1, 1), query, query, query, None, block_indices=torch.zeros(1)
        )


def llava() -> LlavaForConditionalGeneration:
    vision = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(
        vision_config={**vision, "image_size": 8, "patch_size": 4}, text_config=LlamaConfig(**models.COMMON)
    )
    return LlavaForConditionalGeneration(config)


def implementations(model) -> list[str]:
    config = model.config
    return [part._attn_implementation for part in (config, config.text_config, config.vision_config)]


def test_the_context_restores_every_part():
    model = llava()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    with squat_attention(model):
        assert implementations(model) == ["squat"] * 3
    assert implementations(model) == ["sdpa", "eager", "sdpa"]
    with pytest.raises(KeyError), squat_attention(model):
        raise KeyError
    assert implementations(model) == ["sdpa", "eager", "sdpa"]


def test_the_context_restores_a_part_without_a_model_of_its_own():
    model = llava()
    model.model.vision_tower = None
    with squat_attention(model):
        assert implementations(model)[1] == "squat"
    assert implementations(model) == ["sdpa"] * 3


def test_contexts_nest():
    model = models.build("llama")
    with squat_attention(model), squat_attention(model):
        pass
    assert model.config._attn_implementation == "sdpa"
