"""A cache for `generate` that keeps most tokens packed."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.utils import cached_file

from hf_ext._compat import attention_name, has_latent_attention, layers_read_by_others
from hf_ext.cache.squat import state, store
from hf_ext.cache.squat.attention import NAME
from hf_ext.cache.squat.config import SQuatCacheConfig
from hf_ext.cache.squat.handle import IN_USE, uncompiled
from hf_ext.cache.squat.layer import SQuatLayer

FILE = "squat_cache.safetensors"


class SQuatCache(DynamicCache):
    """Keys and values of past tokens in 2 to 8 bits, rounded so that the prompt's queries notice least.

    Pass it to `generate` or to a model's forward as `past_key_values`. With `model.set_attn_implementation("squat")`
    (or inside `with squat_attention(model)`) decoding reads the packed tokens directly and the rounding knows the
    queries. Any other attention gets dequantised keys and values, which is correct but slow, and keys are rounded
    plainly.

    Layers with full attention are packed. Sliding, chunked and linear layers, which do not grow, are kept as in a
    `DynamicCache`, and so are layers that are both linear and full attention, and the latents of multi-head latent
    attention, which are no keys.

    A cache belongs to one call at a time. Two calls whose forward passes overlap are refused.

    Source: SQuat, https://huggingface.co/papers/2503.24358.

    Args:
        config (`PreTrainedConfig`): the model's config.
        offloading (`bool`, defaults to False): keep layers in CPU memory while they are not in use. Sliding layers and
            those whose keys and values other layers read stay on the accelerator.
        **settings: fields of `SQuatCacheConfig`: `bits`, `key_bits`, `value_bits`, `group_size`, `residual_length`,
            `sink_tokens`, ...

    Raises:
        ValueError: a setting or a model that cannot work, with the remedy.

    Example:

    ```python
    model.set_attn_implementation("squat")
    output = model.generate(**inputs, past_key_values=SQuatCache(model.config, bits=2))
    ```
    """

    layers: list[Any]

    def __init__(self, config: PreTrainedConfig, *, offloading: bool = False, **settings: Any):
        if not isinstance(config, PreTrainedConfig):
            raise ValueError(
                f"config is a {type(config).__name__}: give the model's config, SQuatCache(model.config, ...)."
            )
        if offloading and not torch.accelerator.is_available():
            raise ValueError(
                "offloading=True: there is no accelerator here, so every layer is in CPU memory already; "
                "leave offloading out."
            )
        self.settings = SQuatCacheConfig(**settings)
        self._config = config
        self.model_config = config.get_text_config(decoder=True)
        layers = _layers(self.model_config, self.settings)
        Cache.__init__(self, layers=layers, offloading=offloading)
        if not self.packed_layers:
            warnings.warn(
                f"Nothing of a {self.model_config.model_type!r} model is packed: its layers cache latents, a window "
                "or a state, or a state beside their keys and values. A DynamicCache does the same.",
                stacklevel=2,
            )
        self._warned = not self.packed_layers
        self._first = next((index for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)), None)
        self._length = 0  # tokens before the forward pass that is under way
        self._updating: dict[str, object] = {}  # what is in `update`, at most one
        self._resident: int | None = None  # the layer that offloading has not sent away yet

    @property
    def packed_layers(self) -> list[SQuatLayer]:
        return [layer for layer in self.layers if isinstance(layer, SQuatLayer)]

    @uncompiled
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Append keys and values `(B, H, N, D)` of a layer; returns all of them, as handles where they are packed.

        Raises:
            RuntimeError: the layers do not agree in length, since two calls use the cache at once or an earlier
                forward pass was interrupted.
        """
        if not self._warned and attention_name(self._config.get_text_config(decoder=True)) != NAME:
            self._warned = True
            warnings.warn(
                f"This model uses the attention {attention_name(self.model_config)!r}, which cannot read a "
                "SQuatCache packed: results are right, but every step dequantises all tokens and keys are rounded "
                'without knowing the queries. Call model.set_attn_implementation("squat") first, if the model has '
                "that choice.",
                stacklevel=3,
            )
        layer = self.layers[layer_idx]
        if not self._warned and isinstance(layer, SQuatLayer) and layer.slow_steps:
            self._warned = True
            warnings.warn(
                "This model computes with its keys and values before the attention, or asks the attention for what "
                "packed tokens cannot give (its weights, gradients), so every step dequantises all tokens: results "
                "are right, but a DynamicCache is faster.",
                stacklevel=3,
            )
        # `setdefault` asks and claims in one step; unlike a lock, a dictionary can be copied with the cache.
        if self._updating.setdefault("by", own := object()) is not own:
            raise RuntimeError(IN_USE)
        try:
            length = layer.get_seq_length()
            if layer_idx == self._first:
                self._length = length
            elif length != self._length:
                raise RuntimeError(IN_USE)
            if self.offloading and key_states.device.type != "cpu":
                self._exchange(layer_idx, key_states.device)
            states = layer.update(key_states, value_states, *args, **kwargs)
            if key_states.shape[-2] > 1 and self.is_sliding[layer_idx]:
                # A window is a view of the prompt, which it would keep alive, and copy, with every copy of the cache.
                layer.keys, layer.values = store.released(layer.keys), store.released(layer.values)
            return states
        finally:
            self._updating.clear()

    def _exchange(self, layer_idx: int, device: torch.device) -> None:
        """Send the layer of the last update, whose attention is done, to CPU memory and fetch the next one."""
        stream = torch.accelerator.current_stream(device)
        stream.wait_stream(self.prefetch_stream)
        past = self._resident
        if (
            past is not None
            and past != layer_idx
            and not (isinstance(self.layers[past], SQuatLayer) and self.layers[past].shared)
        ):
            self.offload(past, self.only_non_sliding)
        # Copies to CPU memory must have ended, and reads of what was fetched before, whose memory is used again.
        self.prefetch_stream.wait_stream(stream)
        self.prefetch(layer_idx + 1, self.only_non_sliding)
        self._resident = layer_idx

    @property
    def nbytes(self) -> int:
        """Bytes that the packed layers hold, all together."""
        return sum(layer.nbytes for layer in self.packed_layers)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the cache to one safetensors file; returns its path."""
        return state.save(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str], config: PreTrainedConfig, device: torch.device | str = "cpu") -> SQuatCache:
        """The cache that `save` wrote, on `device`, for the model with this `config`.

        Raises:
            ValueError: the file is damaged, no saved cache, or that of another model.
        """
        cache = SQuatCache(config, **state.settings(path))
        state.restore(cache, path, device)
        return cache

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the cache into a folder that can be published, under the name that `from_pretrained` looks for."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.save(Path(save_directory) / FILE)

    @staticmethod
    def from_pretrained(
        folder_or_repo: str | os.PathLike[str],
        config: PreTrainedConfig,
        device: torch.device | str = "cpu",
        **hub_options: Any,
    ) -> SQuatCache:
        """The cache in a folder or in a repository of the Hub.

        Args:
            config: of the model that reads it.
            hub_options: `revision`, `token`, `cache_dir`, ... as for a model.

        Raises:
            OSError: there is none.
            ValueError: as `load`.
        """
        return SQuatCache.load(str(cached_file(folder_or_repo, FILE, **hub_options)), config, device)


def _layers(config: PreTrainedConfig, settings: SQuatCacheConfig) -> list[Any]:
    """A `SQuatLayer` for every layer with full attention, and what a `DynamicCache` has for every other."""
    types, options = get_layer_types_and_kwargs(config)
    shared = layers_read_by_others(config)
    layers: list[Any] = []
    for index, (kind, layer_config, kwargs) in enumerate(zip(types, config.per_layer_config, options, strict=True)):
        if kind == "full_attention" and not has_latent_attention(layer_config):
            layers.append(SQuatLayer(settings, shared=index in shared))
        else:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
    return layers
