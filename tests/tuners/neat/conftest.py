"""One adapted layer, and a model with some."""

import torch
from peft import get_peft_model
from torch import nn

from hf_ext import NeatConfig
from hf_ext.tuners.neat import NeatLayer
from tests.conftest import make_tiny_llama


def neat_config(**overrides) -> NeatConfig:
    settings = dict(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_weights=False, normalize=False
    )
    return NeatConfig(**{**settings, **overrides})


def make_layer(base: nn.Module | None = None, **overrides) -> NeatLayer:
    """A layer with an adapter that is no identity."""
    config = NeatConfig(**{"r": 4, "init_weights": False, "normalize": False, **overrides})
    return NeatLayer(nn.Linear(12, 20) if base is None else base, "default", config, config.r)


def make_model(seed: int = 0, **overrides):
    base = make_tiny_llama(seed)
    return get_peft_model(base, neat_config(**overrides))


def factors(layer: NeatLayer, adapter: str = "default") -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The parameters of an adapter as the reference takes them."""
    return dict(
        first_RD=layer.peanut_A[adapter].weight,
        last_DR=layer.peanut_B[adapter].weight,
        encoders=[hidden.weight for hidden in layer.peanut_encoders[adapter]],
        decoders=[hidden.weight for hidden in layer.peanut_decoders[adapter]],
    )
