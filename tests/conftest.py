"""Shared fixtures: no network, fixed seeds, tiny models built from configs, and the embedded real model."""

from __future__ import annotations

import gc
import os

# Before any Hugging Face import: constants are read at import time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CI", "1")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


@pytest.fixture(autouse=True, scope="session")
def _imported_modules_are_not_collected():
    """A run of a trainer ends in a full garbage collection, which takes longer than the training if it visits them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make_tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A randomly initialised Llama (hidden 64, 2 layers, vocabulary 99) in float32, seeded."""
    torch.manual_seed(seed)
    settings = dict(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    return make_tiny_llama()


@pytest.fixture(scope="session")
def real_model_path() -> str:
    """Folder of the embedded Gemma 3 270M; converted once per machine."""
    from hf_ext.demo.model import embedded_model

    return str(embedded_model())


@pytest.fixture
def real_model(real_model_path):
    return AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def real_tokenizer(real_model_path):
    return AutoTokenizer.from_pretrained(real_model_path)
