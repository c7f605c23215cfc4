"""The LoRA layers of a model that get noise, and the draws of it."""

from __future__ import annotations

import hashlib
import re
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_ext.tuners.tfb.reference import noise_map

# Of PEFT's layers, those whose forward pass hands over to `lora_variant`.
_SAMPLED = {"Linear", "Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear"}


def noisy_layers(model: nn.Module, adapter_name: str, targets: str = "all") -> dict[str, LoraLayer]:
    """Layers of an adapter by name, in the order of the model.

    Args:
        targets: "all", "last", the layer that is registered last, or a regular expression for the whole name of a layer.

    Raises:
        ValueError: the model has no such adapter or layer, or one whose noise would be something else.
    """
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in {**module.lora_A, **module.lora_embedding_A}
    }
    if not layers:
        raise ValueError(
            f"adapter_name={adapter_name!r}: the model has no LoRA layer of that name; give a model with a LoRA adapter."
        )
    if targets == "last":
        name = next(reversed(layers))
        layers = {name: layers[name]}
    elif targets != "all":
        chosen = {name: layer for name, layer in layers.items() if re.fullmatch(targets, name)}
        if not chosen:
            raise ValueError(
                f"targets={targets!r}: it matches none of the {len(layers)} LoRA layers, such as {next(iter(layers))!r}."
            )
        layers = chosen
    for name, layer in layers.items():
        _check_layer(name, layer, adapter_name)
    return layers


def _check_layer(name: str, layer: LoraLayer, adapter_name: str) -> None:
    """
    Raises:
        ValueError: the layer is not one whose inner activations could get noise.
    """
    kind = type(layer).__name__
    remedy = "leave it out with targets, a regular expression for the names of the layers that are to get noise"
    if layer.merged:
        raise ValueError(f"{name!r} is merged, so that noise has nowhere to go; call unmerge_adapter() first.")
    if ".experts." in name:
        raise ValueError(
            f"{name!r} is a layer of an expert, where tokens of different samples are mixed: {remedy}, or use n_samples=1."
        )
    known = any(base.__name__ in _SAMPLED and base.__module__.startswith("peft.") for base in type(layer).__mro__)
    linear = adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], nn.Linear)
    if not (known and linear):
        raise ValueError(
            f"{name!r} is a LoRA layer of type {kind}: noise is for linear layers, quantised or not; {remedy}."
        )
    if adapter_name in layer.lora_variant:
        raise ValueError(
            f"{name!r} is LoRA of another kind ({type(layer.lora_variant[adapter_name]).__name__}): noise is for plain LoRA; {remedy}."
        )


def layer_seed(name: str, seed: int, sample: int = 0) -> int:
    """A seed for what one layer draws in one sample: the same on every machine, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}/{sample}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


class Draws:
    """The samples of one layer: `A + sigma V diag(1 / d) E_k` for each sample k.

    Attributes:
        map_RR: `V diag(1 / d)`, float32.
    """

    def __init__(self, name: str, layer: LoraLayer, adapter_name: str, rtol: float) -> None:
        self.name = name
        self.a_RM, self.b_NR = (
            cast(Tensor, factors[adapter_name].weight).detach() for factors in (layer.lora_A, layer.lora_B)
        )
        self.map_RR = noise_map(self.b_NR, rtol).float()

    def directions(self, seed: int, samples: range) -> Tensor:
        """`V diag(1 / d) E_k`, `(K, R, M)` in float32."""
        # Drawn on the CPU, whose numbers are the same everywhere.
        generators = [torch.Generator().manual_seed(layer_seed(self.name, seed, k)) for k in samples]
        normals = torch.stack([torch.randn(self.a_RM.shape, generator=generator) for generator in generators])
        return self.map_RR @ normals.to(self.map_RR.device)

    def factors(self, sigma: float, directions_KRM: Tensor) -> Tensor:
        """A of each sample, `(K, R, M)` in float32, or wider if the adapter is."""
        return torch.add(
            self.a_RM.to(torch.promote_types(self.a_RM.dtype, torch.float32)), directions_KRM, alpha=sigma
        )


def adapter_of(model: Any, adapter_name: str | None) -> str:
    """The adapter that is meant: the active one unless another is named.

    Raises:
        ValueError: it is no `PeftModel`, no adapter is active, or several are.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"model of type {type(model).__name__}: give a PeftModel, as get_peft_model makes it.")
    if adapter_name is not None:
        return adapter_name
    active = [model.active_adapter] if isinstance(model.active_adapter, str) else list(model.active_adapter)
    if len(active) != 1:
        raise ValueError(f"adapter_name: {active} are active; say which of them.")
    return active[0]
