"""Tiny models with random weights: one for each way in which transformers' models use their cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

VOCABULARY = 96
TOKENS = dict(bos_token_id=1, eos_token_id=None, pad_token_id=0)
# Wide weights and a head of its own give distinct logits, so that small errors change no token.
WIDE = dict(initializer_range=0.2, tie_word_embeddings=False)
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    **TOKENS,
    **WIDE,
)
HYBRID = dict(
    num_hidden_layers=3, sliding_window=24, layer_types=["sliding_attention", "full_attention", "full_attention"]
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
SHARING = dict(
    num_hidden_layers=5,
    sliding_window=24,
    layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    num_kv_shared_layers=2,
)


def _model(family: str, settings: dict, name: str = "", config: str = "") -> Callable[[], nn.Module]:
    """What makes `<family>ForCausalLM` from `<family>Config`, or from the classes named."""
    model_class = getattr(transformers, name or f"{family}ForCausalLM")
    config_class = getattr(transformers, config or f"{family}Config")
    return lambda: model_class(config_class(**settings))


def _llama() -> Callable[[], nn.Module]:
    return _model("Llama", COMMON)


def _lora() -> nn.Module:
    return get_peft_model(_llama()(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama(),
    "llama_bf16": lambda: _llama()().bfloat16(),
    "llama_lora": _lora,
    "mistral": _model("Mistral", {**COMMON, "sliding_window": None}),
    "qwen3": _model("Qwen3", COMMON),
    "gemma2": _model("Gemma2", {**COMMON, **HYBRID, "query_pre_attn_scalar": 16}),  # soft cap
    "gemma3": _model("Gemma3", {**COMMON, **HYBRID, "query_pre_attn_scalar": 16}, config="Gemma3TextConfig"),
    "gemma3n": _model(  # layers that read the keys and values of others
        "Gemma3n",
        {
            **COMMON,
            **SHARING,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 5,
        },
        config="Gemma3nTextConfig",
    ),
    "gemma4": _model(  # and that look at the last tokens of a prompt alone
        "Gemma4",
        {
            **COMMON,
            **SHARING,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
        config="Gemma4TextConfig",
    ),
    "gpt_oss": _model(  # attention sinks
        "GptOss",
        {
            **COMMON,
            **HYBRID,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen3_next": _model(
        "Qwen3Next",
        {
            **COMMON,
            **EXPERTS,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "gpt2": _model(
        "GPT2",
        dict(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, **TOKENS, **WIDE),
        "GPT2LMHeadModel",
    ),
    "bloom": _model("Bloom", dict(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, **TOKENS, **WIDE)),
    "deepseek_v3": _model(  # multi-head latent attention
        "DeepseekV3",
        {
            **COMMON,
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
}
# Of each model: factor of its embeddings, and seed. Attention keeps a share of the logits that matters, and the best
# two logits are never close, so that rounding to 8 bits changes no token and rounding to 2 bits changes many.
CHOICES = {
    "llama": (32.0, 0),
    "llama_bf16": (16.0, 13),
    "llama_lora": (32.0, 3),
    "mistral": (32.0, 1),
    "qwen3": (32.0, 0),
    "gemma2": (2.0, 1),
    "gemma3": (2.0, 0),
    "gemma3n": (2.0, 1),
    "gemma4": (6.0, 1),
    "gpt_oss": (32.0, 0),
    "qwen3_next": (4.0, 0),
    "gpt2": (32.0, 1),
    "bloom": (16.0, 0),
    "deepseek_v3": (8.0, 0),
}


def build(name: str) -> nn.Module:
    """A model of `MODELS` with its weights, in eval mode."""
    scale, seed = CHOICES[name]
    torch.manual_seed(seed)
    model = MODELS[name]().eval()
    first = model.transformer.word_embeddings_layernorm if name == "bloom" else model.get_input_embeddings()
    first.weight.data *= scale
    return model


def sparse() -> nn.Module:
    """A DeepSeek-V3.2, which attends to a few keys of its choice."""
    torch.manual_seed(0)
    latents = dict(kv_lora_rank=32, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    choice = dict(index_topk=16, index_n_heads=4, index_head_dim=32)
    dense = dict(first_k_dense_replace=2, num_key_value_heads=4)
    return _model("DeepseekV32", {**COMMON, **EXPERTS, **latents, **choice, **dense})().eval()


def assistant() -> nn.Module:
    """A model that guesses for another one, badly."""
    torch.manual_seed(99)
    return _model("Llama", {**COMMON, "num_hidden_layers": 1})().eval()
