"""NEAT's relations to the types that PEFT ships: export to LoRA and to PEANUT, and our layers under an adapter of type PEANUT."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.peanut import Linear as PeanutLinear
from peft.tuners.peanut import PeanutConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_ext.tuners.neat.config import NeatConfig
from hf_ext.tuners.neat.layer import NeatLayer

# What the configurations of all three types say alike.
_SHARED = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)


def save_as_lora(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter as stock LoRA with the same outputs, for readers that do not have this package.

    The network is evaluated on the weights of this model: the result no longer depends on them, and cannot be trained as NEAT.

    Raises:
        ValueError: the model has no NEAT adapter of that name.
    """
    config, layers = _neat_config(model, adapter_name), dict(_layers(model, adapter_name))
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.r,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.rank_pattern),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        **_shared(config),
    )

    def tensors(layer: NeatLayer) -> dict[str, Tensor]:
        down_RM, up_NR = layer.thin_factors(adapter_name)
        up_NR = layer.scaling[adapter_name] * up_NR
        if layer.kernel:
            down_RM = down_RM.reshape(len(down_RM), -1, *layer.kernel)
            up_NR = up_NR.view(*up_NR.shape, *[1] * len(layer.kernel))
        return {"lora_A.weight": down_RM, "lora_B.weight": up_NR}

    _save(model, adapter_name, layers, lora, tensors, Path(folder))


def save_as_peanut(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter as PEFT's type PEANUT with the same outputs; it can be trained on there.

    Raises:
        ValueError: the model has no NEAT adapter of that name, or it uses what PEANUT does not have.
    """
    config, layers = _neat_config(model, adapter_name), dict(_layers(model, adapter_name))
    for name, layer in layers.items():
        if layer.side[adapter_name] != "output" or not isinstance(layer.get_base_layer(), nn.Linear):
            raise ValueError(
                f"{name}: PEANUT is NEAT with side='output' on nn.Linear, and this is side={layer.side[adapter_name]!r} on "
                f"{type(layer.get_base_layer()).__name__}: use save_as_lora."
            )
    if config.act_fn not in ACT2FN or config.rank_pattern:
        raise ValueError(
            f"act_fn={config.act_fn!r}, rank_pattern={config.rank_pattern!r}: PEANUT has one r and the activations of transformers: "
            "use save_as_lora."
        )
    peanut = PeanutConfig(
        r=config.r, depth=config.depth, act_fn=config.act_fn, scaling=config.scaling, **_shared(config)
    )

    def tensors(layer: NeatLayer) -> dict[str, Tensor]:
        kept = {
            name.replace(f".{adapter_name}.", "."): value
            for name, value in layer.state_dict().items()
            if f".{adapter_name}." in name and not name.startswith("base_layer.")
        }
        # What PEANUT does not have goes into the last layer, which is linear.
        factor = layer.scaling[adapter_name] / config.scaling if config.scaling else 1.0
        if adapter_name in layer.peanut_gain:
            factor = factor * layer.peanut_gain[adapter_name]
        return {**kept, "peanut_B.weight": kept["peanut_B.weight"] * factor}

    _save(model, adapter_name, layers, peanut, tensors, Path(folder))


def accelerate_peanut(model: nn.Module) -> int:
    """Put our layers in the place of those of PEFT's type PEANUT: same parameters, same outputs, without forming the update.

    The type, the checkpoints and what an optimizer holds stay as they are. Call it again after adding an adapter to further layers.

    Args:
        model: a `PeftModel`, or a model that PEANUT was injected into.

    Returns:
        The number of layers.

    Raises:
        ValueError: a layer is merged.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module) is PeanutLinear]
    for name, layer in found:
        if layer.merged:
            raise ValueError(f"{name}: {layer.merged_adapters} are merged; call unmerge_adapter() first.")
    for _, layer in found:
        NeatLayer.take_over(layer)
    return len(found)


def _layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, NeatLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, NeatLayer) and adapter_name in module.peanut_A:
            yield name, module


def _neat_config(model: PeftModel, adapter_name: str) -> NeatConfig:
    config = model.peft_config.get(adapter_name)
    if not isinstance(config, NeatConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is not a NEAT adapter; the model has {sorted(model.peft_config)}."
        )
    return config


def _shared(config: PeftConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SHARED}


@torch.no_grad()
def _save(
    model: PeftModel,
    adapter_name: str,
    layers: dict[str, NeatLayer],
    config: PeftConfig,
    tensors: Callable[[NeatLayer], dict[str, Tensor]],
    folder: Path,
) -> None:
    """Write the adapter with what `tensors` gives for each layer in the place of its own parameters."""
    own = tuple(f"{name}.peanut_" for name in layers)
    state = {
        k: v for k, v in get_peft_model_state_dict(model, adapter_name=adapter_name).items() if not k.startswith(own)
    }
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value.contiguous() for key, value in tensors(layer).items()}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{SAFETENSORS_WEIGHTS_NAME}"
    save_file(state, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / SAFETENSORS_WEIGHTS_NAME)
    config.save_pretrained(str(folder))
