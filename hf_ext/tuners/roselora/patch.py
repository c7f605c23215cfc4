"""A sparse update as what it is: a list of changed entries that can be applied to a checkpoint and taken back."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "hf_ext sparse patch 1"


@dataclass
class PatchEntry:
    """Changed entries of one weight.

    Attributes:
        shape: of the weight.
        index: [n] int64 positions in the flattened weight, ascending.
        delta: [n] what is added, in the dtype of the adapter's update.
        base: [n] the entries before the change, in the weight's dtype; None if the adapter sat on a quantised weight.
    """

    shape: tuple[int, ...]
    index: Tensor
    delta: Tensor
    base: Tensor | None


@dataclass
class SparsePatch:
    """The update of a RoseLoRA adapter as changed entries, by parameter name of the plain base model.

    Example:
        ```python
        patch = SparsePatch.from_model(peft_model)
        patch.save("edit.safetensors")
        SparsePatch.load("edit.safetensors").apply(plain_model)   # equals merging the adapter, bit for bit
        ```

    Patches of different edits may be applied one after another; take them back in the opposite order where they overlap.
    """

    entries: dict[str, PatchEntry]
    _replaced: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    @torch.no_grad()
    def from_model(cls, model: nn.Module, adapter_name: str = "default") -> SparsePatch:
        """Read the patch off an unmerged adapter, one weight at a time.

        Raises:
            ValueError: no layer holds the adapter, or the adapter is merged.
        """
        entries = {}
        for name, layer in model.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            if adapter_name not in layer.lora_A and adapter_name not in layer.lora_embedding_A:
                continue
            if layer.merged:
                raise ValueError(f"{name}: the adapter is merged; call unmerge_adapter() first.")
            weight_name = _weight_name(name, layer)
            entries[weight_name] = _entry(layer, adapter_name)
        if not entries:
            raise ValueError(f"adapter_name={adapter_name!r}: no LoRA layer of this model holds it.")
        return cls(entries)

    @property
    def changed(self) -> int:
        """Number of changed entries."""
        return sum(len(entry.index) for entry in self.entries.values())

    @torch.no_grad()
    def apply(self, model: nn.Module, strict: bool = True) -> None:
        """Add the patch to the weights of a plain model, in place.

        Args:
            strict: insist that the entries to change are those the patch was made from.

        Raises:
            ValueError: the model lacks a weight or has one of another shape or, if strict, of other values; nothing is
                changed then.
        """
        targets = self._targets(model)
        if strict:
            for name, entry in self.entries.items():
                here = targets[name].view(-1)[entry.index.to(targets[name].device)]
                if entry.base is None:
                    raise ValueError(
                        f"{name}: the patch comes from a quantised base and cannot tell whether this is its model; pass "
                        "strict=False to apply it all the same."
                    )
                if not torch.equal(here, entry.base.to(here)):
                    raise ValueError(
                        f"{name} differs from the base this patch was made for (another model, or patched already); "
                        "use the right checkpoint, or strict=False to add the patch to what is there."
                    )
        for name, entry in self.entries.items():
            flat = targets[name].view(-1)
            index = entry.index.to(flat.device)
            self._replaced[name] = flat[index]
            # In the wider dtype, as PEFT merges: a bf16 weight is rounded once.
            flat[index] = (flat[index] + entry.delta.to(flat.device)).to(flat.dtype)

    @torch.no_grad()
    def revert(self, model: nn.Module) -> None:
        """Put the entries back as they were before the patch, exactly.

        After `apply` on this object these are the values it replaced; otherwise the recorded values of the base.

        Raises:
            ValueError: nothing is known of the former values, or the model does not have these weights.
        """
        targets = self._targets(model)
        for name, entry in self.entries.items():
            before = self._replaced.get(name, entry.base)
            if before is None:
                raise ValueError(
                    f"{name}: the patch records no base values; revert it in the process that applied it."
                )
            flat = targets[name].view(-1)
            flat[entry.index.to(flat.device)] = before.to(flat)
        self._replaced.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors: dict[str, Tensor] = {}
        for name, entry in self.entries.items():
            small = entry.index.max() < 2**31 if len(entry.index) else True
            tensors[f"{name}:index"] = entry.index.to(torch.int32 if small else torch.int64)
            tensors[f"{name}:delta"] = entry.delta
            if entry.base is not None:
                tensors[f"{name}:base"] = entry.base
        shapes = json.dumps({name: entry.shape for name, entry in self.entries.items()})
        scratch = Path(f"{os.fspath(path)}.tmp")
        save_file(tensors, scratch, metadata={"format": FORMAT, "shapes": shapes})
        os.replace(scratch, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparsePatch:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no patch, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ValueError(
                        f"{os.fspath(path)} is not a sparse patch: give a file that SparsePatch.save wrote."
                    )
                shapes = json.loads(file.metadata()["shapes"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)} is damaged ({error}): write it again.") from error
        return cls(
            {
                name: PatchEntry(
                    tuple(shape),
                    tensors[f"{name}:index"].long(),
                    tensors[f"{name}:delta"],
                    tensors.get(f"{name}:base"),
                )
                for name, shape in shapes.items()
            }
        )

    def _targets(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, entry in self.entries.items():
            if name not in parameters:
                raise ValueError(f"{name}: the model has no such weight; apply the patch to the plain base model.")
            if tuple(parameters[name].shape) != entry.shape:
                raise ValueError(f"{name} has shape {tuple(parameters[name].shape)}, the patch is for {entry.shape}.")
        return {name: parameters[name].data for name in self.entries}


def _weight_name(module_name: str, layer: LoraLayer) -> str:
    plain = module_name.removeprefix("base_model.model.").replace(".base_layer", "")
    return f"{plain}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else f"{plain}.weight"


def _entry(layer: Any, adapter_name: str) -> PatchEntry:
    delta = layer.get_delta_weight(adapter_name).contiguous()
    index = delta.view(-1).nonzero().squeeze(1)
    weight = layer.get_param() if isinstance(layer, ParamWrapper) else layer.get_base_layer().weight
    plain = weight.shape == delta.shape and weight.is_floating_point()
    return PatchEntry(
        shape=tuple(delta.shape),
        index=index.cpu(),
        delta=delta.view(-1)[index].cpu(),
        base=weight.detach().reshape(-1)[index].cpu() if plain else None,
    )
