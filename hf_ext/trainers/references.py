"""The reference that `DPOTrainer` compares with: none, or a copy of the adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig


class NoReference(nn.Module):
    """Handed to `DPOTrainer` so that it neither loads a reference model nor adds an adapter to a wrapped model."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PreTrainedConfig()
        # DeepSpeed and FSDP do not accept a module without parameters.
        self.unused = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("this loss has no reference model")


@torch.no_grad()
def complete_reference_adapter(model: PeftModel) -> None:
    """Copy the adapter "default" to "ref", every parameter of it.

    `DPOTrainer` makes that copy of an adapter that it is given, but passes over parameters whose name ends with the adapter's, as those of
    embeddings, IA3 or FourierFT: it would compare with a random adapter.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if "default" in parts:
            twin = parameters.get(".".join("ref" if part == "default" else part for part in parts))
            if twin is not None:
                twin.copy_(parameter)
