"""A small RoseLoRA model and a training loop for it."""

import pytest
import torch
from peft import get_peft_model

from hf_ext import RoseLoraConfig
from tests.conftest import make_tiny_llama


def rose_config(**overrides) -> RoseLoraConfig:
    settings = dict(
        r=4,
        lora_alpha=8,
        sparsity=0.9,
        t_init=2,
        t_final=6,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    return RoseLoraConfig(**{**settings, **overrides})


def make_model(seed: int = 0, config=None, **overrides):
    model = make_tiny_llama(seed)
    return get_peft_model(model, config or rose_config(**overrides))


def batch(seed: int = 0, rows: int = 4) -> dict:
    ids = torch.randint(3, 99, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def train(model, steps: int = 8, lr: float = 1e-2, first: int = 0, optimizer=None, after_step=None):
    """Plain loop with AdamW; one batch per step, chosen by the step's number."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(first, first + steps):
        model(**batch(step)).loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step(step + 1)
        optimizer.zero_grad()
    return optimizer


def adapter_weights(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Copies of the adapter's factors by name."""
    return {
        name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name and f".{adapter}" in name
    }


@pytest.fixture
def rose_model():
    return make_model()
