"""One layer of a SQuat cache: whole first and newest tokens around packed ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin

from hf_ext.cache.squat import store
from hf_ext.cache.squat.config import SQuatCacheConfig
from hf_ext.cache.squat.handle import KVHandle
from hf_ext.cache.squat.subspace import QuerySubspace
from hf_ext.kernels.attention import Tokens
from hf_ext.kernels.quantize import Quantized, quantize_keys, quantize_values


def aside(method: Callable[..., None]) -> Callable[..., None]:
    """A method of a layer that runs outside of autograd and autocast: float32 must stay float32, and nothing here has a gradient."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            method(self, *args, **kwargs)

    return run


class SQuatLayer(CacheLayerMixin):
    """Keys and values of one attention layer, most of them packed.

    Args:
        config: settings of the cache.
        shared: other layers read this one's keys and values too, so that a step's tokens stay whole until the next step.

    Attributes:
        tokens: the keys and the values, None before the first update.
        subspace: what is known of the queries.
        materializations: how often packed tokens were dequantised for an attention that cannot read them packed.
        slow_steps: how often that was for a single new token.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, config: SQuatCacheConfig, shared: bool = False):
        self.config, self.shared = config, shared
        self.materializations = self.slow_steps = 0
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and queries."""
        self.is_initialized = False
        self.tokens: tuple[Tokens, Tokens] = None  # type: ignore[assignment]
        self.subspace: QuerySubspace | None = None
        self.newest = 0  # tokens of the last update
        self.real: torch.Tensor | None = None  # (B, R) bool: which of the newest tokens are no padding; None: all

    # -- What transformers calls ---------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        config = self.config
        config.check_channels(key_states.shape[-1], "key")
        config.check_channels(value_states.shape[-1], "value")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.scale_dtype = torch.float16
        value_group = config.value_group(value_states.shape[-1])
        keys, values = key_states[..., :0, :].clone(), value_states[..., :0, :].clone()
        self.tokens = (
            Tokens(keys, self._packed_keys(keys), keys, config.key_bits, config.group_size, -2),
            Tokens(values, self._packed_values(values), values, config.value_bits, value_group, -1),
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pack what is old enough, append the new tokens `(B, H, N, D)`, and return handles to all keys and values."""
        if self.is_initialized:
            self.pack()
        else:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.tokens
        self.tokens = (store.append(keys, key_states), store.append(values, value_states))
        self.newest = key_states.shape[-2]
        if self.real is not None:
            self.real = torch.cat([self.real, self.real.new_ones(key_states.shape[0], key_states.shape[-2])], -1)
        return self._handle(0), self._handle(1)

    def _handle(self, kind: int) -> KVHandle:
        batch, heads, _, channels = self.tokens[kind].recent.shape
        return KVHandle(self, kind, (batch, heads, self.get_seq_length(), channels), self.dtype, self.device)

    def get_seq_length(self) -> int:
        return sum(self.tokens[0].lengths) if self.tokens else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens.

        The newest `residual_length` tokens at least are whole and go without a trace. Beyond them the remainder of the group that is cut stays as it was rounded.

        Raises:
            ValueError: `tokens_to_remove` is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number, crop({-tokens_to_remove})."
            )
        left = self.get_seq_length() + tokens_to_remove
        if tokens_to_remove == 0 or self.tokens is None:
            return
        if left <= 0:
            self.reset()
            return
        keys, values = self.tokens
        cut = left < sum(keys.lengths[:2])  # the newest tokens are then others than those that were marked
        self.tokens = (store.crop(keys, left), store.crop(values, left))
        self.real = None if self.real is None or cut else self.real[:, : self.tokens[0].recent.shape[-2]]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices.to(tensor.device), ...])

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.tokens is not None and self.tokens[0].recent.device != self.device:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """`function` on every tensor; all of them have the batch in front."""
        if self.tokens is None:
            return
        keys, values = self.tokens
        self.tokens = (store.apply(keys, function), store.apply(values, function))
        self.real = None if self.real is None else function(self.real)
        self.subspace = None if self.subspace is None else self.subspace.map(function)

    @property
    def batch_size(self) -> int:
        return self.tokens[0].recent.shape[0] if self.tokens else -1

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """All keys, dequantised."""
        return self.materialize(0) if self.tokens else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """All values, dequantised."""
        return self.materialize(1) if self.tokens else None

    # -- What the attention function calls -----------------------------------------------------------------------------

    @property
    def has_packed(self) -> bool:
        return self.tokens[0].packed.codes.shape[-2] > 0 or self.tokens[1].packed.codes.shape[-2] > 0

    def materialize(self, kind: int) -> torch.Tensor:
        """All keys (0) or values (1), dequantised, `(B, H, S, D)`."""
        self.materializations += self.has_packed
        self.slow_steps += self.has_packed and self.newest == 1
        return self.tokens[kind].whole(self.dtype)

    @aside
    def mark(self, real: torch.Tensor) -> None:
        """Remember which of the newest tokens are no padding, `(B, N)`."""
        waiting = self.tokens[0].recent.shape[-2]
        if self.real is None:
            self.real = real.new_ones(real.shape[0], waiting)
        size = min(real.shape[-1], waiting)
        self.real[:, waiting - size :] = real[:, real.shape[-1] - size :]

    @aside
    def observe(self, query: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Learn from the queries of a prompt or a chunk of one, before its keys are packed.

        Args:
            query: `(B, Q, N, D)`.
            real: `(B, N)`, False for padding; None if there is none.
        """
        if self.config.subspace_dim:
            self.subspace = QuerySubspace.of(query, self.subspace, self.tokens[0].recent.shape[1], self.config, real)

    @aside
    def pack(self) -> None:
        """Pack the tokens that are old enough."""
        keys, values = self.tokens
        begins = self.config.sink_tokens > 0 and not keys.first.shape[-2] and not self.has_packed
        if begins:
            if not self._due(keys, self.config.sink_tokens):
                self.tokens = (store.release(keys), store.release(values))
                return
            keys, values = (store.take_first(tokens, self.config.sink_tokens) for tokens in (keys, values))
            self.real = None if self.real is None else self.real[:, self.config.sink_tokens :]
        if count := self._due(keys):
            keys = store.pack(keys, count, self._packed_keys)
            self.tokens = (keys, values)  # the old keys go before the values come
            self.real = None if self.real is None or self.real[:, count:].all() else self.real[:, count:].clone()
        if (count := self._due(values)) or begins:
            values = store.pack(values, count, self._packed_values)
        self.tokens = (keys, values)

    def _due(self, tokens: Tokens, reserved: int = 0) -> int:
        """How many of the newest tokens are to be packed, `reserved` of them set aside."""
        window, step = self.config.residual_length, self.config.group_size
        waiting = tokens.recent.shape[-2] - reserved
        if self.config.schedule == "kivi":
            return max(waiting // window * window if tokens.axis == -2 else waiting - window, 0)
        return max((waiting - window) // step * step, 0)

    def _packed_keys(self, keys: torch.Tensor) -> Quantized:
        basis = order = None
        if self.real is not None:
            keys = _fill_padding(keys, self.real[:, : keys.shape[-2]], self.config.group_size)
        if self.subspace is not None and keys.shape[-2]:
            basis, order = self.subspace.basis(keys, self.config, self.scale_dtype)
        return self._stored(
            quantize_keys,
            keys,
            basis,
            order,
            bits=self.config.key_bits,
            group_size=self.config.group_size,
            block_size=self.config.block_size,
            clip=self.config.clip(self.config.key_bits),
        )

    def _packed_values(self, values: torch.Tensor) -> Quantized:
        return self._stored(
            quantize_values,
            values,
            bits=self.config.value_bits,
            group_size=self.config.value_group(values.shape[-1]),
            clip=self.config.clip(self.config.value_bits),
        )

    def _stored(self, quantize: Callable[..., Quantized], *args, **kwargs) -> Quantized:
        """Scale and minimum in float16, which is finer than bfloat16; in float32 from the first number on that it cannot hold."""
        packed = quantize(*args, **kwargs, scale_dtype=self.scale_dtype)
        if self.dtype == torch.float16 or self.scale_dtype == torch.float32:
            return packed
        if packed.minimum.isfinite().all() and packed.scale.isfinite().all():
            return packed
        self.scale_dtype = torch.float32
        return quantize(*args, **kwargs, scale_dtype=self.scale_dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is kept."""
        tokens = sum(map(store.nbytes, self.tokens)) if self.tokens else 0
        return (
            tokens
            + (self.real.nbytes if self.real is not None else 0)
            + (self.subspace.nbytes if self.subspace else 0)
        )


def _fill_padding(keys: torch.Tensor, real: torch.Tensor, group_size: int) -> torch.Tensor:
    """Keys `(B, H, T, D)` with those of padding replaced by a real one of the same group, so that padding widens no group's range."""
    groups, marks = keys.unflatten(-2, (-1, group_size)), real.unflatten(-1, (-1, group_size))
    some = marks.to(torch.uint8).argmax(-1)[:, None, :, None, None]
    example = groups.take_along_dim(some.expand(*groups.shape[:3], 1, groups.shape[-1]), -2)
    return torch.where(marks[:, None, :, :, None], groups, example).flatten(2, 3)
