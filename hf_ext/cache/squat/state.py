"""Caches in files: a prefix that was computed once serves other processes."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from hf_ext._compat import attention_shape
from hf_ext.cache.squat.layer import SQuatLayer
from hf_ext.cache.squat.subspace import QuerySubspace
from hf_ext.kernels.quantize import Quantized

if TYPE_CHECKING:
    from hf_ext.cache.squat.cache import SQuatCache

FORMAT = "hf_ext.squat_cache.2"
# safetensors writes several keys of metadata in an order that changes, and the same cache is to give the same bytes.
_KEY = "hf_ext"
_SIDES = ("keys", "values")


def save(cache: SQuatCache, path: str | os.PathLike[str]) -> Path:
    """Write all layers and settings to one safetensors file, under a temporary name first; returns its path."""
    tensors: dict[str, torch.Tensor] = {}
    lengths: dict[str, int] = {}
    for index, layer in enumerate(cache.layers):
        tensors.update({f"{index}.{name}": tensor for name, tensor in _tensors(layer).items()})
        if isinstance(layer, DynamicSlidingWindowLayer):
            lengths[str(index)] = layer.cumulative_length
    told = {
        "format": FORMAT,
        "settings": dataclasses.asdict(cache.settings),
        "model": _identity(cache),
        "lengths": lengths,
    }
    target = Path(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        part = Path(folder) / target.name
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, part, metadata={_KEY: json.dumps(told)})
        os.replace(part, target)
    return target


def settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Settings of a saved cache.

    Raises:
        ValueError: the file is damaged or no saved cache.
    """
    return _read(path)[0]["settings"]


def restore(cache: SQuatCache, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> None:
    """Fill a new cache from a file.

    Args:
        cache: made with the settings of the file.
        path: what `save` wrote.
        device: where the tensors go.

    Raises:
        ValueError: the file is damaged, no saved cache, or belongs to a model of another shape; the message names both shapes.
    """
    told, tensors = _read(path, str(device))
    theirs, ours = told["model"], _identity(cache)
    if theirs != ours:
        different = ", ".join(
            f"{name} {theirs.get(name)} in the file and {ours[name]} in the model"
            for name in ours
            if theirs.get(name) != ours[name]
        )
        raise ValueError(
            f"{path} belongs to another model: {different}. Load it with the config of the model it was computed with."
        )
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if own:
            _restore(layer, own, told["lengths"].get(str(index)))


def _read(path: str | os.PathLike[str], device: str | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the file says of itself, and the tensors if a device is given."""
    try:
        with safe_open(path, framework="pt", device=device or "cpu") as file:
            told = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()} if device else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}); compute the cache again.") from error
    if told.get("format") != FORMAT:
        raise ValueError(f"{path} is no saved SQuatCache: its format is {told.get('format')!r}, expected {FORMAT!r}.")
    return told, tensors


def _identity(cache: SQuatCache) -> dict[str, Any]:
    """What must agree between the model that made a cache and the one that uses it; shapes per layer, since they may vary."""
    config = cache.model_config
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "layers": [type(layer).__name__ for layer in cache.layers],
        "heads, key-value heads and head_dim per layer": [attention_shape(layer) for layer in config.per_layer_config],
    }


def _tensors(layer: Any) -> dict[str, torch.Tensor]:
    """Everything that a layer remembers, by name."""
    if isinstance(layer, SQuatLayer):
        return _packed_tensors(layer)
    found: dict[str, torch.Tensor | None] = {}
    if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
        found.update(keys=layer.keys, values=layer.values)
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for state in range(layer.number_of_states):
            if layer.has_previous_state[state]:
                found[f"conv.{state}"] = layer.conv_states[state]
            if layer.is_recurrent_states_initialized[state]:
                found[f"recurrent.{state}"] = layer.recurrent_states[state]
    known = isinstance(layer, (DynamicLayer, LinearAttentionCacheLayerMixin, DummyLayer))
    if not known or isinstance(layer, DynamicIndexedLayer):
        raise ValueError(f"A {type(layer).__name__} layer cannot be saved; keep the cache in memory.")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _packed_tensors(layer: SQuatLayer) -> dict[str, torch.Tensor]:
    if layer.tokens is None:
        return {}
    found: dict[str, torch.Tensor | None] = {"real": layer.real}
    for side, tokens in zip(_SIDES, layer.tokens, strict=True):
        found.update({f"{side}.first": tokens.first, f"{side}.recent": tokens.recent})
        found.update({f"{side}.{name}": tensor for name, tensor in tokens.packed._asdict().items()})
    if layer.subspace is not None:
        found.update({f"subspace.{name}": tensor for name, tensor in layer.subspace.tensors().items()})
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _restore(layer: Any, tensors: dict[str, torch.Tensor], length: int | None) -> None:
    if isinstance(layer, SQuatLayer):
        first = [tensors[f"{side}.first"] for side in _SIDES]
        layer.lazy_initialization(*first)
        layer.tokens = tuple(  # type: ignore[assignment]
            empty._replace(
                first=tensors[f"{side}.first"],
                packed=Quantized(*(tensors[f"{side}.{name}"] for name in Quantized._fields)),
                recent=tensors[f"{side}.recent"],
            )
            for side, empty in zip(_SIDES, layer.tokens or (), strict=True)
        )
        layer.scale_dtype = tensors["keys.scale"].dtype
        layer.real = tensors.get("real")
        known = {
            name.removeprefix("subspace."): tensor for name, tensor in tensors.items() if name.startswith("subspace.")
        }
        layer.subspace = QuerySubspace(**known) if known else None
        return
    if "keys" in tensors:
        DynamicLayer.lazy_initialization(layer, tensors["keys"], tensors["values"])
        layer.keys, layer.values = tensors["keys"], tensors["values"]
    if length is not None:
        layer.cumulative_length = length
    for name, tensor in tensors.items():
        if name.startswith("conv."):
            layer.update_conv_state(tensor, int(name.removeprefix("conv.")))
        elif name.startswith("recurrent."):
            layer.update_recurrent_state(tensor, int(name.removeprefix("recurrent.")))
