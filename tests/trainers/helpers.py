"""What the tests of all trainers use: a word-level tokenizer, small models, quiet CPU runs, and what is compared of them."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.conftest import make_tiny_llama

# Shape of a model of any family over the vocabulary of `make_tokenizer`.
SMALL = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
# Families that treat the output of their last layer in different ways.
FAMILIES = {
    "llama": make_tiny_llama,
    "tied": lambda: make_tiny_llama(tie_word_embeddings=True),
    "cohere_scale": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
    "granite_scaling": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0)),
    "gemma2_softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)),
    "mixtral_experts": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)),
}
CPU_RUN = dict(
    use_cpu=True,
    bf16=False,
    activation_checkpointing=False,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    logging_steps=1,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """99 tokens: pad, bos, eos, unk and w0 ... w94."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i + 4 for i in range(95)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def lora(**overrides) -> LoraConfig:
    settings = dict(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True, task_type="CAUSAL_LM")
    return LoraConfig(**{**settings, **overrides})


def quantised_llama(folder, bits: int) -> PreTrainedModel:
    """`make_tiny_llama` in 4 or 8 bits."""
    make_tiny_llama().save_pretrained(folder)
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantisation, dtype=torch.float32, device_map={"": "cpu"}
    )


def column(trainer, name: str) -> list[float]:
    """The logged values of one metric over the steps of the run."""
    return [float(row[name]) for row in trainer.state.log_history if name in row]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def allocated_peak(function) -> int:
    """Largest number of bytes that torch's CPU allocator held above the start while `function` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        function()
    events = [event for event in recording.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def assert_needs_torch_alone(module: str) -> None:
    """Import it in a fresh interpreter, and look for what its users need not install."""
    code = (
        f"import sys, {module}; "
        "assert not {'trl', 'datasets', 'transformers', 'peft', 'accelerate', 'scipy'} & set(sys.modules)"
    )
    environment = {**os.environ, "HF_EXT_AUTO_REGISTER": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
