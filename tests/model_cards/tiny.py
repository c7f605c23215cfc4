"""Tiny models and a tokenizer without a download."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_tiny_llama

BASE = "user/tiny-base"
# What only an author can say of a model, and what `validate` finds missing without it.
WORDS = {
    "intended_use": "Tests of model cards.",
    "out_of_scope": "Everything else.",
    "factors": "Length of the text.",
    "ethics": "No personal data.",
    "caveats": "Knows nothing.",
}
# The rest that fills a section.
MEASURED = {"datasets": "user/facts@1", "metrics": {"accuracy": 0.75}, "evaluated_on": "user/probe@abc"}
AUTHOR = {"section-intended-use", "out-of-scope", "section-factors", "section-ethical-considerations"}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Single letters as words; fits the vocabulary of `tests.conftest.make_tiny_llama`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def lora_model(seed: int = 0, **fields) -> PeftModel:
    """A stock LoRA adapter with random factors on the tiny Llama."""
    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    base = make_tiny_llama()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**{**settings, **fields})).eval()


def roselora_model(**fields) -> PeftModel:
    """A RoseLoRA adapter with random factors on the tiny Llama."""
    from hf_ext import RoseLoraConfig

    settings = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_lora_weights": False, "total_step": 10}
    return get_peft_model(make_tiny_llama(), RoseLoraConfig(**{**settings, **fields})).eval()
