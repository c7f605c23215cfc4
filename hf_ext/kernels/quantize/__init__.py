"""Quantise keys and values into packed codes: the low-rank quantise-compensate-pack operator.

`quantize_keys` and `quantize_values` choose the implementation by device: Triton on a GPU, the compiled library on a CPU, and the reference
in PyTorch everywhere else.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from types import ModuleType

import torch

from hf_ext.kernels import native
from hf_ext.kernels.quantize import reference
from hf_ext.kernels.quantize.reference import BITS, Quantized

__all__ = ["BITS", "Quantized", "dequantize", "quantize_keys", "quantize_values"]


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

    Returns:
        `Quantized` with codes `(*, T, D * bits / 8)` and groups `(*, T / group_size, D)`.
    """
    kernels = triton_kernels(__name__, keys.device)
    if kernels is not None and kernels.supports_keys(keys, basis, group_size, block_size):
        return kernels.quantize_keys(
            keys, basis, order, bits=bits, group_size=group_size, block_size=block_size, scale_dtype=scale_dtype
        )
    library = native.library()
    if library is not None and keys.device.type == "cpu":
        return _native_keys(library, keys, basis, order, bits, group_size, block_size, scale_dtype)
    if order is not None:
        keys = keys.gather(-1, _rows(order, keys))
        basis = basis.gather(-1, _rows(order, basis)) if basis is not None else None
    codes, scale, minimum = reference.quantize(
        keys, basis, bits=bits, group_size=group_size, block_size=block_size, scale_dtype=scale_dtype
    )
    if order is not None:
        back = order.argsort(-1)
        codes, scale, minimum = (x.gather(-1, _rows(back, x)) for x in (codes, scale, minimum))
    return Quantized(reference.pack(codes, bits), scale, minimum)


def _rows(order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return order.unsqueeze(-2).expand(like.shape)


def _native_keys(library, keys, basis, order, bits, group_size, block_size, scale_dtype) -> Quantized:
    *leading, tokens, channels = keys.shape
    keys = keys.float().contiguous()
    rank = 0
    gains = None
    if basis is not None and block_size < channels:
        rank = basis.shape[-2]
        basis = basis.float()
        basis = (basis if order is None else basis.gather(-1, _rows(order, basis))).contiguous()
        gains = reference.gains(basis, block_size).contiguous()
        order = order.contiguous() if order is not None else None
    codes = torch.empty(*leading, tokens, channels * bits // 8, dtype=torch.uint8)
    scale = torch.empty(*leading, tokens // group_size, channels, dtype=scale_dtype)
    minimum = torch.empty_like(scale)
    library.hf_ext_quantize_keys(
        keys.data_ptr(),
        basis.data_ptr() if rank else None,
        gains.data_ptr() if gains is not None else None,
        order.data_ptr() if rank and order is not None else None,
        codes.data_ptr(),
        scale.data_ptr(),
        minimum.data_ptr(),
        math.prod(leading),
        tokens,
        channels,
        rank,
        group_size,
        block_size,
        bits,
        scale_dtype == torch.float16,
        native.threads(keys.numel() * (2 * rank + 4)),
    )
    return Quantized(codes, scale, minimum)


def quantize_values(values: torch.Tensor, *, bits: int, group_size: int, scale_dtype: torch.dtype) -> Quantized:
    """Packed values with one scale and minimum for `group_size` channels of a token.

    Args:
        values: `(*, T, D)`, any floating dtype; D is a multiple of `group_size`.
        bits: 2, 3, 4 or 8.
        group_size: channels that share a scale.
        scale_dtype: float16 or float32.

    Returns:
        `Quantized` with codes `(*, T, D * bits / 8)` and groups `(*, T, D / group_size)`.
    """
    kernels = triton_kernels(__name__, values.device)
    if kernels is not None and kernels.supports_values(values, group_size):
        return kernels.quantize_values(values, bits=bits, group_size=group_size, scale_dtype=scale_dtype)
    library = native.library()
    if library is None or values.device.type != "cpu":
        codes, scale, minimum = reference.group_quantize(values, bits, group_size, -1, scale_dtype)
        return Quantized(reference.pack(codes, bits), scale, minimum)
    *leading, channels = values.shape
    values = values.float().contiguous()
    codes = torch.empty(*leading, channels * bits // 8, dtype=torch.uint8)
    scale = torch.empty(*leading, channels // group_size, dtype=scale_dtype)
    minimum = torch.empty_like(scale)
    library.hf_ext_quantize_values(
        values.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        minimum.data_ptr(),
        math.prod(leading),
        channels,
        group_size,
        bits,
        scale_dtype == torch.float16,
        native.threads(values.numel() * 8),
    )
    return Quantized(codes, scale, minimum)


def dequantize(packed: Quantized, bits: int, group_size: int, axis: int) -> torch.Tensor:
    """Values of packed codes, float32 `(*, T, D)`; axis -2 for keys, -1 for values."""
    return reference.dequantize(packed._replace(codes=reference.unpack(packed.codes, bits)), group_size, axis)
