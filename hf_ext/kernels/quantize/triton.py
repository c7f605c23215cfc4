"""Quantise, compensate and pack on a GPU: one program per group of tokens, whose error e stays in registers.

The mathematics is in reference.py: SQuat, https://huggingface.co/papers/2503.24358, in low-rank form. Channels come in any order, while a
packed byte holds channels that are far apart. So a program adds every code, at its place, to the byte that it belongs to: a product of the
codes with a matrix that has one power of two in each row, exact in half precision.

Shapes: T tokens, D channels, G tokens of a scale group, N channels of a block and K rank, both padded, W bytes of a token, padded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hf_ext.kernels.quantize import reference
from hf_ext.kernels.quantize.reference import Quantized

VALUE_TOKENS = 16  # tokens of a program that packs values


@triton.jit
def _encode(x, low, step, TOP: tl.constexpr):
    """Codes of x as float32, half to even, 0 where the step is 0."""
    code = tl.div_rn(x - low, tl.where(step > 0, step, 1.0))
    # Beside 1.5 * 2^23 there is no room for a fraction: the sum is rounded, half to even.
    code = code + 12582912.0 - 12582912.0
    return tl.where(step > 0, tl.minimum(tl.maximum(code, 0.0), TOP), 0.0)


@triton.jit
def _fit(x, axis: tl.constexpr, TOP: tl.constexpr, CLIP: tl.constexpr, DTYPE: tl.constexpr):
    """Step and minimum of the groups along `axis`, as they are stored: of their range, or of its middle share CLIP where that has the smaller error."""
    low, high = tl.min(x, axis, keep_dims=True), tl.max(x, axis, keep_dims=True)
    step, minimum = tl.div_rn(high - low, 1.0 * TOP).to(DTYPE), low.to(DTYPE)
    if CLIP < 1:
        narrow_step = tl.div_rn(CLIP * (high - low), 1.0 * TOP).to(DTYPE)
        narrow_minimum = (low + (1 - CLIP) / 2 * (high - low)).to(DTYPE)
        error = _squared_error(x, minimum.to(tl.float32), step.to(tl.float32), axis, TOP)
        narrow = _squared_error(x, narrow_minimum.to(tl.float32), narrow_step.to(tl.float32), axis, TOP) < error
        step, minimum = tl.where(narrow, narrow_step, step), tl.where(narrow, narrow_minimum, minimum)
    return step, minimum


@triton.jit
def _squared_error(x, low, step, axis: tl.constexpr, TOP: tl.constexpr):
    delta = _encode(x, low, step, TOP) * step + low - x
    return tl.sum(delta * delta, axis, keep_dims=True)


@triton.jit
def _add_planes(bytes_GW, code_GN, channel_N, real_N, D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr):
    """Bytes with codes of BITS bits added at their places."""
    PLANE: tl.constexpr = D * BITS // 8
    power_N = (1 << channel_N // PLANE * BITS).to(tl.float16)
    own_NW = (channel_N % PLANE)[:, None] == tl.arange(0, W)[None, :]
    place_NW = tl.where(own_NW & real_N[:, None], power_N[:, None], 0.0)
    return tl.dot(code_GN.to(tl.float16), place_NW.to(tl.float16), bytes_GW)


@triton.jit(do_not_specialize=["tokens", "key_head"])
def _quantize_keys(
    keys, key_head, key_token, key_channel, order, gains, basis, codes, scale, minimum, tokens,
    D: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program l * (T / G) + g: group g of the keys of a leading index l."""
    head = (tl.program_id(0) // (tokens // G)).to(tl.int64)
    group = tl.program_id(0) % (tokens // G)
    token_G = group * G + tl.arange(0, G)
    bytes_G = codes + (head * tokens + token_G) * (D * BITS // 8)
    rank_K = tl.arange(0, K)
    error_GK = tl.zeros((G, K), tl.float32)
    bytes_GW = tl.zeros((G, W), tl.float32)
    high_GW = tl.zeros((G, HIGH), tl.float32)  # the plane of the third bit
    for start in range(0, D, BLOCK):
        place_N = start + tl.arange(0, N)
        real_N = (tl.arange(0, N) < BLOCK) & (place_N < D)
        channel_N = place_N
        if order is not None:
            channel_N = tl.load(order + head * D + place_N, mask=real_N, other=0).to(tl.int32)
        key_at_GN = keys + head * key_head + token_G[:, None] * key_token + channel_N[None, :] * key_channel
        key_GN = tl.load(key_at_GN, mask=real_N[None, :], other=0).to(tl.float32)
        target_GN = key_GN
        if RANK:
            at_KN = (head * RANK + rank_K[:, None]) * D + place_N[None, :]
            there_KN = (rank_K < RANK)[:, None] & real_N[None, :]
            target_GN -= tl.dot(error_GK, tl.load(gains + at_KN, mask=there_KN, other=0), input_precision=PRECISION)
        scale_1N, minimum_1N = _fit(target_GN, 0, (1 << BITS) - 1, CLIP, scale.dtype.element_ty)
        at_1N = ((head * (tokens // G) + group) * D + channel_N)[None, :]
        tl.store(scale + at_1N, scale_1N, mask=real_N[None, :])
        tl.store(minimum + at_1N, minimum_1N, mask=real_N[None, :])
        step_1N, low_1N = scale_1N.to(tl.float32), minimum_1N.to(tl.float32)
        code_GN = _encode(target_GN, low_1N, step_1N, (1 << BITS) - 1)
        if RANK:
            delta_GN = code_GN * step_1N + low_1N - key_GN
            basis_KN = tl.load(basis + at_KN, mask=there_KN, other=0)
            error_GK = tl.dot(delta_GN, tl.trans(basis_KN), error_GK, input_precision=PRECISION)
        if BITS == 8:
            tl.store(bytes_G[:, None] + channel_N[None, :], code_GN.to(tl.uint8), mask=real_N[None, :])
        elif BITS == 3:
            third_GN = tl.where(code_GN >= 4, 1.0, 0.0)
            high_GW = _add_planes(high_GW, third_GN, channel_N, real_N, D, HIGH, 1)
            bytes_GW = _add_planes(bytes_GW, code_GN - 4 * third_GN, channel_N, real_N, D, W, 2)
        else:
            bytes_GW = _add_planes(bytes_GW, code_GN, channel_N, real_N, D, W, BITS)

    if BITS < 8:
        LOW: tl.constexpr = D * (2 if BITS == 3 else BITS) // 8
        byte_W, byte_H = tl.arange(0, W), tl.arange(0, HIGH)
        tl.store(bytes_G[:, None] + byte_W[None, :], bytes_GW.to(tl.uint8), mask=(byte_W < LOW)[None, :])
        if BITS == 3:
            tl.store(bytes_G[:, None] + LOW + byte_H[None, :], high_GW.to(tl.uint8), mask=(byte_H < D // 8)[None, :])


@triton.jit
def _store_planes(at_T, code_TD, there_T, T: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Pack whole tokens, whose channels are in their own order."""
    planes_TPW = tl.reshape(code_TD, (T, 8 // BITS, D * BITS // 8)) << tl.arange(0, 8 // BITS)[None, :, None] * BITS
    byte_W = tl.arange(0, D * BITS // 8)
    tl.store(at_T[:, None] + byte_W[None, :], tl.sum(planes_TPW, 1).to(tl.uint8), mask=there_T[:, None])


@triton.jit(do_not_specialize=["tokens", "value_head"])
def _quantize_values(
    values, value_head, value_token, value_channel, codes, scale, minimum, tokens,
    D: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """Program l * ceil(tokens / T) + t: tile t of the values of a leading index l."""
    head = (tl.program_id(0) // tl.cdiv(tokens, T)).to(tl.int64)
    token_T = tl.program_id(0) % tl.cdiv(tokens, T) * T + tl.arange(0, T)
    there_T = token_T < tokens
    channel_D = tl.arange(0, D)
    at_TD = values + head * value_head + token_T[:, None] * value_token + channel_D[None, :] * value_channel
    value_TD = tl.load(at_TD, mask=there_T[:, None], other=0).to(tl.float32)
    groups = tl.reshape(value_TD, (T, D // GROUP, GROUP))
    step, low = _fit(groups, 2, (1 << BITS) - 1, CLIP, scale.dtype.element_ty)
    at = (head * tokens + token_T)[:, None, None] * (D // GROUP) + tl.arange(0, D // GROUP)[None, :, None]
    tl.store(scale + at, step, mask=there_T[:, None, None])
    tl.store(minimum + at, low, mask=there_T[:, None, None])
    code = _encode(groups, low.to(tl.float32), step.to(tl.float32), (1 << BITS) - 1)
    code_TD = tl.reshape(code, (T, D)).to(tl.int32)
    at_T = codes + (head * tokens + token_T) * (D * BITS // 8)
    if BITS == 3:
        _store_planes(at_T, code_TD & 3, there_T, T, D, 2)
        _store_planes(at_T + D // 4, code_TD >> 2, there_T, T, D, 1)
    else:
        _store_planes(at_T, code_TD, there_T, T, D, BITS)


def precision(device: torch.device) -> str:
    """How products of float32 are taken: in three parts on NVIDIA's tensor cores, which loses next to nothing, and plainly elsewhere."""
    return "tf32x3" if device.type == "cuda" and torch.version.hip is None else "ieee"


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def supports_keys(keys: torch.Tensor, basis: torch.Tensor | None, group_size: int, block_size: int) -> bool:
    """Whether `quantize_keys` takes these shapes."""
    channels = keys.shape[-1]
    fits = basis is None or block_size >= channels or (block_size <= 64 and basis.shape[-2] <= 64)
    return group_size in (16, 32, 64, 128) and channels <= 256 and fits


def supports_values(values: torch.Tensor, group_size: int) -> bool:
    """Whether `quantize_values` takes these shapes."""
    channels = values.shape[-1]
    return _power_of_two(channels) and 16 <= channels <= 256 and _power_of_two(group_size)


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
    """The same as `hf_ext.kernels.quantize.quantize_keys`, for what `supports_keys` accepts."""
    *leading, tokens, channels = keys.shape
    heads = math.prod(leading)
    keys = keys.reshape(heads, tokens, channels)
    rank = 0
    gains = None
    if basis is None or block_size >= channels:
        order = basis = None  # without compensation the order of the channels is nothing to their codes
        block_size = min(64, triton.next_power_of_2(channels))
    else:
        rank = basis.shape[-2]
        basis = basis.float()
        if order is not None:
            basis = basis.gather(-1, order.unsqueeze(-2).expand(basis.shape))
            order = order.contiguous()
        basis = basis.contiguous()
        gains = reference.gains(basis, block_size).contiguous()
    codes = keys.new_empty(*leading, tokens, channels * bits // 8, dtype=torch.uint8)
    scale = keys.new_empty(*leading, tokens // group_size, channels, dtype=scale_dtype)
    minimum = torch.empty_like(scale)
    width = triton.next_power_of_2(channels * (2 if bits == 3 else bits) // 8)
    with torch.accelerator.device_index(keys.device.index):
        _quantize_keys[(heads * (tokens // group_size),)](
            keys, *keys.stride(), order, gains, basis, codes, scale, minimum, tokens,
            D=channels, RANK=rank, K=max(triton.next_power_of_2(rank), 16), BLOCK=block_size, N=max(triton.next_power_of_2(block_size), 16),
            G=group_size, W=max(width, 16), HIGH=max(triton.next_power_of_2(channels // 8), 16), BITS=bits, CLIP=clip,
            PRECISION=precision(keys.device),
            num_warps=4 if group_size <= 64 else 8,
        )  # fmt: skip
    return Quantized(codes, scale, minimum)


def quantize_values(
    values: torch.Tensor, *, bits: int, group_size: int, scale_dtype: torch.dtype, clip: float = 1.0
) -> Quantized:
    """The same as `hf_ext.kernels.quantize.quantize_values`, for what `supports_values` accepts."""
    *leading, tokens, channels = values.shape
    heads = math.prod(leading)
    values = values.reshape(heads, tokens, channels)
    codes = values.new_empty(*leading, tokens, channels * bits // 8, dtype=torch.uint8)
    scale = values.new_empty(*leading, tokens, channels // group_size, dtype=scale_dtype)
    minimum = torch.empty_like(scale)
    with torch.accelerator.device_index(values.device.index):
        _quantize_values[(heads * triton.cdiv(tokens, VALUE_TOKENS),)](
            values, *values.stride(), codes, scale, minimum, tokens,
            D=channels, GROUP=group_size, T=VALUE_TOKENS, BITS=bits, CLIP=clip, num_warps=4,
        )  # fmt: skip
    return Quantized(codes, scale, minimum)
