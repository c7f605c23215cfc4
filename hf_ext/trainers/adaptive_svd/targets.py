"""Which layers of a model are protected, and what passes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_ext._modes import evaluating
from hf_ext.trainers.adaptive_svd.importance import LayerStatistics

Layer = nn.Linear | Conv1D


def find_targets(model: PreTrainedModel, wanted: Sequence[str] | str | None) -> dict[str, Layer]:
    """Linear layers by name.

    Args:
        model: the language model.
        wanted: ends of their names, a regular expression for whole names, or None for all in the transformer blocks.

    Raises:
        ValueError: nothing fits, or something that fits is no linear layer, is quantised or frozen, shares its weight with
            another module, or is the output layer.
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
        if module is model.get_output_embeddings():
            raise ValueError(
                f"target_modules: {name} is the output layer, whose weight TRL reads without calling it: leave it out. It is "
                "trained as everything else that is not targeted."
            )
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
    if not module.weight.requires_grad:
        raise ValueError(
            f"target_modules: {name} is frozen, so it has nothing to protect: leave it out, or let it train."
        )


def _known(model: nn.Module) -> str:
    ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Layer)})
    return ", ".join(ends) or "nothing (it has no linear layer)"


def short_outputs(layer: Layer) -> bool:
    """Whether the short side of the layer's `Subspace` is that of its outputs; a `Conv1D` stores inputs x outputs."""
    rows, columns = layer.weight.shape
    return (rows <= columns) == isinstance(layer, nn.Linear)


@torch.no_grad()
def observe(
    backbone: nn.Module,
    layers: Mapping[str, Layer],
    batches: Iterable[Mapping[str, Tensor]],
    bases: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerStatistics]:
    """Statistics of what passes the layers, in evaluation mode.

    Args:
        backbone: is called with `input_ids` and `attention_mask` `(B, S)` of each batch.
        layers: by name.
        batches: tokens; those outside the attention mask do not count.
        bases: singular vectors of the short side of each layer, to measure energies as well.

    Raises:
        ValueError: nothing passes one of the layers.
    """
    found = {n: LayerStatistics(short_outputs(layer), bases[n] if bases else None) for n, layer in layers.items()}
    mask = torch.empty(0)

    def watch(name: str) -> Any:
        def hook(layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> None:
            without_bias = output if layer.bias is None else output - layer.bias
            # Layers that some tokens are routed to see them without their places.
            kept = mask if args[0].shape[:-1] == mask.shape else ...
            found[name].update(args[0][kept].flatten(0, -2), without_bias[kept].flatten(0, -2))

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with evaluating(backbone):
            for batch in batches:
                mask = batch["attention_mask"].bool()
                backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name, kept in found.items() if not kept.tokens]
    if unseen:
        raise ValueError(f"target_modules: no token passes {unseen[0]}, so nothing is known of it: leave it out.")
    return found
