"""Quantise keys and values into packed codes: the low-rank quantise-compensate-pack operator.

`quantize_keys` and `quantize_values` choose the implementation by device: Triton on a GPU, the compiled library on a CPU, and the reference
in PyTorch everywhere else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import math
from collections.abc import Iterator
from types import ModuleType

import torch

from hf_ext.kernels import native
from hf_ext.kernels.quantize import reference
from hf_ext.kernels.quantize.reference import BITS, Quantized

__all__ = ["BITS", "Quantized", "dequantize", "quantize_keys", "quantize_values"]

PART = 1 << 20  # numbers that are quantised at a time where PyTorch or the compiled library does it


@functools.cache
def triton_kernels(package: str, device: torch.device) -> ModuleType | None:
    """The module `triton` of an operator's package, imported only for devices that can run it; None for the others."""
    if device.type not in ("cuda", "xpu") or importlib.util.find_spec("triton") is None:
        return None
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return importlib.import_module(f"{package}.triton")


def quantize_keys(
    keys: torch.Tensor,
    basis: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    block_size: int,
    scale_dtype: torch.dtype,
    clip: float = 1.0,
) -> Quantized:
    """Packed keys with one scale and minimum for `group_size` tokens of a channel.

    Args:
        keys: `(*, T, D)`, any floating dtype; T is a multiple of `group_size`.
        basis: the scaled directions W of the queries, `(*, K, D)`, channels as in `keys`; None for plain rounding.
        order: int64 `(*, D)`, the order in which channels are rounded; None for their own order.
        bits: 2, 3, 4 or 8.
        group_size: tokens that share a scale.
        block_size: channels that are rounded together; a divisor of D.
        scale_dtype: float16 or float32.
        clip: the least share of a group's range that its codes span; 1 for min-max, see `reference.group_quantize`.

    Returns:
        `Quantized` with codes `(*, T, D * bits / 8)` and groups `(*, T / group_size, D)`.
    """
    kernels = triton_kernels(__name__, keys.device)
    if kernels is not None and kernels.supports_keys(keys, basis, group_size, block_size):
        return kernels.quantize_keys(
            keys,
            basis,
            order,
            bits=bits,
            group_size=group_size,
            block_size=block_size,
            scale_dtype=scale_dtype,
            clip=clip,
        )
    library = native.library() if keys.device.type == "cpu" else None
    gains = None
    if basis is None or block_size >= keys.shape[-1]:
        basis = order = None  # every channel by itself, in whatever order
    else:
        basis = basis.float()
        basis = (basis if order is None else basis.gather(-1, _rows(order, basis))).contiguous()
        gains = reference.gains(basis, block_size).contiguous() if library is not None else None
    packed = _empty(keys, bits, keys.shape[-2] // group_size, keys.shape[-1], scale_dtype)
    for heads, tokens in _parts(keys.shape, group_size):
        part = keys[(*heads, tokens)]
        target = _view(packed, heads, tokens, group_size)
        own_basis, own_order, own_gains = (None if x is None else x[heads] for x in (basis, order, gains))
        if library is not None:
            _native_keys(library, part, own_basis, own_order, own_gains, target, bits, group_size, block_size, clip)
        else:
            _torch_keys(part, own_basis, own_order, target, bits, group_size, block_size, clip)
    return packed


def _torch_keys(keys, basis, order, target, bits, group_size, block_size, clip) -> None:
    if order is not None:
        keys = keys.gather(-1, _rows(order, keys))
    parts = reference.quantize(
        keys,
        basis,
        bits=bits,
        group_size=group_size,
        block_size=block_size,
        scale_dtype=target.scale.dtype,
        clip=clip,
    )
    if order is not None:
        back = order.argsort(-1)
        parts = Quantized(*(part.gather(-1, _rows(back, part)) for part in parts))
    _copy(parts, target, bits)


def _native_keys(library, keys, basis, order, gains, target, bits, group_size, block_size, clip) -> None:
    *leading, tokens, channels = keys.shape
    keys = keys.float().contiguous()
    order = None if order is None else order.contiguous()
    rank = 0 if basis is None else basis.shape[-2]
    library.hf_ext_quantize_keys(
        keys.data_ptr(),
        None if basis is None else basis.data_ptr(),
        None if gains is None else gains.data_ptr(),
        None if order is None else order.data_ptr(),
        *(tensor.data_ptr() for tensor in target),
        math.prod(leading),
        tokens,
        channels,
        rank,
        group_size,
        block_size,
        bits,
        clip,
        target.scale.dtype == torch.float16,
        native.threads(keys.numel() * (2 * rank + 4)),
    )


def _rows(order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return order.unsqueeze(-2).expand(like.shape)


def quantize_values(
    values: torch.Tensor, *, bits: int, group_size: int, scale_dtype: torch.dtype, clip: float = 1.0
) -> Quantized:
    """Packed values with one scale and minimum for `group_size` channels of a token.

    Args:
        values: `(*, T, D)`, any floating dtype; D is a multiple of `group_size`.
        bits: 2, 3, 4 or 8.
        group_size: channels that share a scale.
        scale_dtype: float16 or float32.
        clip: as for `quantize_keys`.

    Returns:
        `Quantized` with codes `(*, T, D * bits / 8)` and groups `(*, T, D / group_size)`.
    """
    kernels = triton_kernels(__name__, values.device)
    if kernels is not None and kernels.supports_values(values, group_size):
        return kernels.quantize_values(values, bits=bits, group_size=group_size, scale_dtype=scale_dtype, clip=clip)
    library = native.library() if values.device.type == "cpu" else None
    packed = _empty(values, bits, values.shape[-2], values.shape[-1] // group_size, scale_dtype)
    for heads, tokens in _parts(values.shape, 1):
        part = values[(*heads, tokens)]
        target = _view(packed, heads, tokens, 1)
        if library is not None:
            _native_values(library, part, target, bits, group_size, clip)
        else:
            _copy(reference.group_quantize(part, bits, group_size, -1, scale_dtype, clip), target, bits)
    return packed


def _native_values(library, values, target, bits, group_size, clip) -> None:
    values = values.float().contiguous()
    library.hf_ext_quantize_values(
        values.data_ptr(),
        *(tensor.data_ptr() for tensor in target),
        math.prod(values.shape[:-1]),
        values.shape[-1],
        group_size,
        bits,
        clip,
        target.scale.dtype == torch.float16,
        native.threads(values.numel() * 8),
    )


# -- Parts: temporary numbers stay few, and near the processor -----------------------------------------------------------

Heads = tuple[int | slice, ...]


def _parts(shape: torch.Size, step: int) -> Iterator[tuple[Heads, slice]]:
    """Indices that cut `(*, T, D)` into parts of about `PART` numbers: some heads, or a multiple of `step` tokens of one head."""
    *outer, tokens, channels = shape
    heads = outer.pop() if outer else 1
    together = max(PART // max(tokens * channels, 1), 1)
    size = tokens if together > 1 else max(PART // channels // step, 1) * step
    for index in itertools.product(*map(range, outer)):
        for head in range(0, heads, together):
            for token in range(0, tokens, max(size, 1)):
                some: Heads = (*index, slice(head, head + together)) if len(shape) > 2 else ()
                yield some, slice(token, min(token + size, tokens))


def _empty(like: torch.Tensor, bits: int, groups: int, width: int, scale_dtype: torch.dtype) -> Quantized:
    """For the codes of `like` `(*, T, D)`, with scales and minima `(*, groups, width)`."""
    *leading, channels = like.shape
    codes = like.new_empty(*leading, channels * bits // 8, dtype=torch.uint8)
    return Quantized(codes, *(like.new_empty(*leading[:-1], groups, width, dtype=scale_dtype) for _ in range(2)))


def _view(packed: Quantized, heads: Heads, tokens: slice, group_size: int) -> Quantized:
    """The codes of a part, and its scales and minima, which `group_size` tokens share."""
    groups = slice(tokens.start // group_size, tokens.stop // group_size)
    return Quantized(*(tensor[(*heads, own)] for tensor, own in zip(packed, (tokens, groups, groups), strict=True)))


def _copy(parts: Quantized, target: Quantized, bits: int) -> None:
    target.codes.copy_(reference.pack(parts.codes, bits))
    target.scale.copy_(parts.scale)
    target.minimum.copy_(parts.minimum)


def dequantize(packed: Quantized, bits: int, group_size: int, axis: int) -> torch.Tensor:
    """Values of packed codes, float32 `(*, T, D)`; axis -2 for keys, -1 for values."""
    return reference.dequantize(packed._replace(codes=reference.unpack(packed.codes, bits)), group_size, axis)
