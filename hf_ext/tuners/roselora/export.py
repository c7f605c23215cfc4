"""RoseLoRA's tensors are LoRA's: leaving as a stock LoRA adapter takes no conversion, only another label."""

from __future__ import annotations

import os
from typing import cast

from peft import PeftConfig, PeftModel
from torch import nn

from hf_ext.tuners.roselora.config import RoseLoraConfig
from hf_ext.tuners.roselora.pruning import detach


def relabel_as_lora(model: nn.Module, adapter_name: str = "default") -> None:
    """Make the adapter a stock LoRA adapter in place: same tensors, same outputs, no further pruning.

    Works for a `PeftModel` and for a transformers or diffusers model with injected adapters; afterwards
    `save_pretrained`, `save_lora_adapter` and `push_to_hub` write what any PEFT, vLLM or diffusers loads.

    Raises:
        ValueError: the model has no RoseLoRA adapter of that name.
    """
    _configs(model)[adapter_name] = _rose_config(model, adapter_name).to_lora_config()
    detach(model, adapter_name)


def save_as_lora(model: PeftModel, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter as stock LoRA, for readers that do not have this package; the model stays as it is.

    Raises:
        ValueError: the model has no RoseLoRA adapter of that name.
    """
    config = _rose_config(model, adapter_name)
    configs = _configs(model)
    configs[adapter_name] = config.to_lora_config()
    try:
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    finally:
        configs[adapter_name] = config


def _configs(model: nn.Module) -> dict[str, PeftConfig]:
    # A PeftModel, and any model that adapters were injected into, keeps its configurations in this attribute.
    return cast(dict[str, PeftConfig], model.peft_config)


def _rose_config(model: nn.Module, adapter_name: str) -> RoseLoraConfig:
    config = _configs(model).get(adapter_name)
    if not isinstance(config, RoseLoraConfig):
        raise ValueError(
            f"adapter_name={adapter_name!r} is not a RoseLoRA adapter; the model has {sorted(_configs(model))}."
        )
    return config
