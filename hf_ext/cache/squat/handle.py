"""Tensors that stand for what a cache layer holds, without holding it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hf_ext._compat import disabled_torch_function, map_nested, wrapper_tensor

if TYPE_CHECKING:
    from hf_ext.cache.squat.layer import SQuatLayer

IN_USE = (
    "This cache is used by two calls at once, or an earlier forward pass on it was interrupted, so its layers do not "
    "hold the same tokens: use one cache per call (copy.deepcopy(cache) shares a prefix), or start again with "
    "cache.reset()."
)


# `torch.compile` leaves the cache alone: tensors of changing size behind handles are nothing that it could trace. It compiles what lies between.
uncompiled = torch.compiler.disable(reason="a SQuatCache grows; use a StaticCache to compile whole steps")


class KVHandle(torch.Tensor):
    """The keys or the values of a layer, as `update` returns them to the model.

    A model that hands them on to its attention function pays nothing, since that function reads the packed tokens of
    `kv_layer` itself. Any operation on a handle computes with the dequantised tensor instead, so that every other
    model gets the right result too.

    Attributes:
        kv_layer: the layer.
        kind: 0 for keys, 1 for values.
    """

    kv_layer: SQuatLayer
    kind: int

    @staticmethod
    def __new__(cls, layer: SQuatLayer, kind: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        handle = wrapper_tensor(cls, shape, dtype, device)
        handle.kv_layer, handle.kind = layer, kind
        return handle

    __torch_function__ = disabled_torch_function

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:  # type: ignore[override]
        def whole(handle: KVHandle) -> torch.Tensor:
            return _current(handle).materialize(handle.kind).contiguous()  # as the handle claims to be

        return func(*map_nested(KVHandle, whole, args), **map_nested(KVHandle, whole, kwargs or {}))

    def __repr__(self, *, tensor_contents=None) -> str:  # type: ignore[override]
        return f"KVHandle({'values' if self.kind else 'keys'}, shape={tuple(self.shape)}, dtype={self.dtype})"


def layer_of(key: torch.Tensor, value: torch.Tensor) -> SQuatLayer | None:
    """The layer whose untouched keys and values these are; None if either is anything else."""
    if (
        type(key) is KVHandle
        and type(value) is KVHandle
        and key.kv_layer is value.kv_layer
        and (key.kind, value.kind) == (0, 1)
    ):
        return _current(key)
    return None


def _current(handle: KVHandle) -> SQuatLayer:
    """The layer of a handle.

    Raises:
        RuntimeError: the layer holds other tokens by now.
    """
    if handle.kv_layer.get_seq_length() != handle.shape[-2]:
        raise RuntimeError(IN_USE)
    return handle.kv_layer
