"""transformers, peft and TRL against the loopback Hub. Run by `test_hub.py` in a child process."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import tiny_tokenizer

TOKENS = torch.arange(3, 11)[None]


@pytest.fixture(scope="module")
def base():
    """A tiny base model that lives on the Hub."""
    model = make_tiny_llama()
    model.push_to_hub("user/tiny-base")
    tiny_tokenizer().push_to_hub("user/tiny-base")
    return "user/tiny-base"


def adapted(base):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    return model.eval()


def test_transformers_round_trip(hub, base):
    loaded = AutoModelForCausalLM.from_pretrained(base)
    torch.testing.assert_close(loaded(TOKENS).logits, make_tiny_llama()(TOKENS).logits)


def test_peft_round_trip_and_revision(hub, base):
    model = adapted(base)
    model.push_to_hub("user/tiny-lora")
    HfApi().create_tag("user/tiny-lora", tag="v1")
    expected = model(TOKENS).logits
    for loaded in (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "user/tiny-lora"),
        AutoPeftModelForCausalLM.from_pretrained("user/tiny-lora", revision="v1"),
        AutoModelForCausalLM.from_pretrained("user/tiny-lora"),
    ):
        torch.testing.assert_close(loaded.eval()(TOKENS).logits, expected)


def test_trainer_push(hub, base, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, report_to=[], hub_model_id="user/trained", use_cpu=True
    )
    rows = [{"input_ids": TOKENS[0], "labels": TOKENS[0]}] * 2
    trainer = Trainer(adapted(base), arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in hub.repos["models", "user/trained"].files()


def test_trl_push(hub, base, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}] * 2)
    arguments = SFTConfig(
        str(tmp_path / "run"), max_steps=1, report_to=[], hub_model_id="user/sft", use_cpu=True, bf16=False
    )
    trainer = SFTTrainer(base, arguments, train_dataset=rows, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.train()
    trainer.push_to_hub()
    assert "adapter_model.safetensors" in hub.repos["models", "user/sft"].files()
    AutoPeftModelForCausalLM.from_pretrained("user/sft")
