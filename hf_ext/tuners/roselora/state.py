"""RoseLoRA's training state: what a resumed run needs to continue with equal numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_ext.tuners.roselora import pruning

STATE_FILE = "roselora_state.safetensors"
# A safetensors file without a tensor loses its metadata.
_NOTHING = "_"


class RoseLoraState:
    """Importance averages, frozen masks and step counters of all RoseLoRA adapters of a model.

    Has `state_dict`/`load_state_dict`, so `accelerator.register_for_checkpointing(RoseLoraState(model))` saves it with
    the rest; `save`/`load` use one safetensors file. Under FSDP2 every rank must call `state_dict`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """`{"steps": {adapter: step}, "tensors": {key: Tensor}}`, on the CPU."""
        schedules = pruning.schedules(self.model)
        tensors = {
            key: pruning.whole(value, parameter).cpu()
            for key, state, name, parameter in self._entries()
            if (value := getattr(state, name)) is not None
        }
        return {"steps": {adapter: schedule.step for adapter, schedule in schedules.items()}, "tensors": tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: it belongs to other adapters, or to layers of other shapes.
        """
        schedules, steps, tensors = pruning.schedules(self.model), state["steps"], dict(state["tensors"])
        if set(steps) != set(schedules):
            raise ValueError(
                f"the RoseLoRA state is of adapters {sorted(steps)}, the model has {sorted(schedules)}; "
                "load the checkpoint that belongs to this model."
            )
        for key, line, name, parameter in self._entries():
            value = tensors.pop(key, None)
            if value is not None and value.shape != parameter.shape:
                raise ValueError(
                    f"the RoseLoRA state of {key} has shape {list(value.shape)}, the adapter {list(parameter.shape)}; "
                    "load the checkpoint that belongs to this model."
                )
            setattr(line, name, None if value is None else pruning.shard(value.to(parameter.device), parameter))
        if tensors:
            raise ValueError(
                f"the RoseLoRA state holds {next(iter(tensors))}, which this model has not; load the checkpoint that belongs to it."
            )
        for adapter, schedule in schedules.items():
            schedule.restart(steps[adapter])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `roselora_state.safetensors` into `folder`, whole or not at all."""
        write_state(self.state_dict(), folder)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: `folder` has no such file.
            ValueError: the file is damaged or belongs to another model.
        """
        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing, and without it a resumed run would choose other entries; resume from a checkpoint "
                "that RoseLoraCallback wrote, or start anew."
            )
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                steps = json.loads(file.metadata()["steps"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged ({error}); resume from another checkpoint.") from error
        tensors.pop(_NOTHING, None)
        self.load_state_dict({"steps": steps, "tensors": tensors})

    def _entries(self) -> list[tuple[str, pruning.LineState, str, nn.Parameter]]:
        """Every slot for a tensor: its key, its owner, the attribute's name and the parameter it belongs to."""
        entries = []
        for module_name, module in self.model.named_modules():
            pruner = vars(module).get(pruning.ATTRIBUTE)
            for adapter, state in pruner.adapters.items() if pruner else ():
                for factor, (parameter, _) in pruner.factors(adapter).items():
                    for name in ("importance", "mask"):
                        key = f"{module_name}.{adapter}.{factor}.{name}"
                        entries.append((key, state.lines[factor], name, parameter))
        return entries


def write_state(state: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write a `state_dict` as one safetensors file, through a temporary name."""
    target = Path(folder) / STATE_FILE
    scratch = target.with_suffix(".tmp")
    tensors: dict[str, Tensor] = {key: value.contiguous() for key, value in state["tensors"].items()}
    save_file(tensors or {_NOTHING: torch.empty(0)}, scratch, metadata={"steps": json.dumps(state["steps"])})
    os.replace(scratch, target)
