"""Which layers of a model are protected, and what passes them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ext.trainers.adaptive_svd.importance import LayerStatistics

Layer = nn.Linear | Conv1D


def find_targets(model: PreTrainedModel, wanted: Sequence[str] | str | None) -> dict[str, Layer]:
    """Linear layers by name.

    Args:
        model: the language model.
        wanted: ends of their names, a regular expression for whole names, or None for all in the transformer blocks.

    Raises:
        ValueError: nothing fits, or something that fits is no linear layer, shares its weight with another module, or is
            quantised.
    """
    if wanted is None:
        decoder = model.get_decoder()
        inside = {id(module) for module in decoder.modules()}
        chosen = {n: m for n, m in model.named_modules() if id(m) in inside and isinstance(m, Layer)}
        stacked = [name for name, parameter in decoder.named_parameters() if parameter.ndim > 2]
        if stacked:
            raise ValueError(
                f"the weight {stacked[0]} {tuple(decoder.get_parameter(stacked[0]).shape)} is no matrix, as those of stacked "
                "experts, and would be trained without protection: name the layers to protect in target_modules."
            )
    elif isinstance(wanted, str):
        chosen = {name: module for name, module in model.named_modules() if re.fullmatch(wanted, name)}
    else:
        chosen = {
            name: module
            for name, module in model.named_modules()
            if any(name == end or name.endswith(f".{end}") for end in wanted)
        }
        missing = [end for end in wanted if not any(name == end or name.endswith(f".{end}") for name in chosen)]
        if missing:
            raise ValueError(f"target_modules: no module is called {missing[0]!r}; known are {_known(model)}.")
    if not chosen:
        raise ValueError(f"target_modules={wanted!r} fits no module; linear layers are called {_known(model)}.")
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for name, module in chosen.items():
        _check(name, module, users)
    return {name: module for name, module in chosen.items() if isinstance(module, Layer)}


def _check(name: str, module: nn.Module, users: Mapping[int, int]) -> None:
    if not isinstance(module, Layer):
        raise ValueError(f"target_modules: {name} is a {type(module).__name__}; name linear layers alone.")
    if not module.weight.is_floating_point() or type(module) not in (nn.Linear, Conv1D):
        raise ValueError(
            f"target_modules: {name} is a {type(module).__name__} with a weight in {module.weight.dtype}. The weights "
            "themselves are trained, which quantised or wrapped ones cannot be: load the model in float32 or bfloat16."
        )
    if users[id(module.weight)] > 1:
        raise ValueError(f"target_modules: the weight of {name} is tied to another module: leave it out.")


def _known(model: nn.Module) -> str:
    ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Layer)})
    return ", ".join(ends) or "nothing (it has no linear layer)"


def short_outputs(layer: Layer) -> bool:
    """Whether the short side of the layer's `Subspace` is that of its outputs; a `Conv1D` stores inputs x outputs."""
    rows, columns = layer.weight.shape
    return (rows <= columns) == isinstance(layer, nn.Linear)


@contextlib.contextmanager
def observed(
    layers: Mapping[str, Layer], mask: Sequence[Tensor], moment: bool
) -> Iterator[dict[str, LayerStatistics]]:
    """Statistics of what passes the layers meanwhile.

    Args:
        layers: by name.
        mask: its last entry says which tokens `(B, S)` of the present forward count.
        moment: also measure second moments.
    """
    found = {name: LayerStatistics(short_outputs(layer), moment) for name, layer in layers.items()}

    def watch(name: str) -> Any:
        def hook(layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> None:
            kept = mask[-1].bool()
            without_bias = output if layer.bias is None else output - layer.bias
            found[name].update(args[0][kept], without_bias[kept])

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
