"""An adapter for each row of a batch: what `PeftModel` is called with as `adapter_names` reaches the layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn


@contextmanager
def adapter_for_each_row(
    tuner: BaseTuner, names: list[str] | None, layers: type | tuple[type, ...] = ()
) -> Iterator[None]:
    """Call the layers of these types, and modules that are trained whole, with `adapter_names`: an adapter, or "__base__", for each row. None: nothing is done.

    Raises:
        ValueError: no name, one that the model does not have, or the model is in training mode.
    """
    if names is None:
        yield
        return
    if not names:
        raise ValueError("adapter_names=[]: give one for each row, or None.")
    if tuner.training:
        raise ValueError("adapter_names: they are for inference; call model.eval() first.")
    if unknown := sorted(set(names) - set(tuner.peft_config) - {"__base__"}):
        raise ValueError(f"adapter_names: there is no adapter {unknown}; the model has {sorted(tuner.peft_config)}.")

    def add_names(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    def add_owners(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # PEFT asks for one name per row, and beams of a row stand side by side.
        each = len(args[0]) // len(names)
        return args, {**kwargs, "adapter_names": [name for name in names for _ in range(each)] if each else names}

    hooks = []
    for module in tuner.modules():
        if isinstance(module, layers):
            hooks.append(module.register_forward_pre_hook(add_names, with_kwargs=True))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            hooks.append(module.register_forward_pre_hook(add_owners, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def owners_of(rows: int, names: list[str], layer: BaseTunerLayer) -> list[str]:
    """The adapter of each row of a batch in this layer; beams and samples of an input stand side by side.

    Raises:
        ValueError: the rows are no multiple of the names, or adapters are merged.
    """
    if layer.merged:
        raise ValueError("adapter_names: adapters are merged; call unmerge_adapter() first.")
    if rows % len(names):
        raise ValueError(f"adapter_names: {len(names)} names for {rows} rows; give one for each.")
    return [name for name in names for _ in range(rows // len(names))]
