"""Group quantisation with compensation of the error that later queries would see, as in SQuat.

Source: SQuat, https://huggingface.co/papers/2503.24358, in the low-rank form derived below; KIVI, https://huggingface.co/papers/2402.02750,
is the case without a basis.

Keys k are rounded so that (k_hat - k) A (k_hat - k)^T is small, with A = I + W^T W and W (rank x d) the scaled directions of the queries.
Channels are rounded in blocks; what a block's rounding costs is compensated in the channels that are still to come. With
e = sum over finished blocks of (k_hat_C - k_C) W_C^T, the error seen through W, the minimiser over the remaining channels R is

    k_R - e (I + W_R W_R^T)^-1 W_R                                              (Woodbury on -A_RR^-1 A_RF)

so a block only needs its own columns of that matrix, the gains. Their size is rank x d, where the inverse in the paper's form takes d x d.

Shapes: `*` leading dimensions, T tokens, D channels, K rank of the basis, G elements of a scale group. All arithmetic is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BITS = (2, 3, 4, 8)


class Quantized(NamedTuple):
    """Codes with the scale and the minimum of each group; a value is `code * scale + minimum`.

    Attributes:
        codes: uint8 `(*, T, D)`, or packed `(*, T, D * bits / 8)`.
        scale: floating point, `(*, T / G, D)` for groups of tokens (axis -2), `(*, T, D / G)` for groups of channels (axis -1).
        minimum: as `scale`.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor


def group_quantize(
    x_TD: torch.Tensor,
    bits: int,
    group_size: int,
    axis: int,
    scale_dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
) -> Quantized:
    """Asymmetric quantisation in groups along `axis` (-2: tokens, -1: channels), to the nearest code, half to even.

    The codes span the range of a group (min-max), or only the middle share `clip` of it where that has the smaller squared error: with few codes
    the ends of the range are worth less than a finer step between them. Codes refer to the scale and minimum as they are stored in `scale_dtype`.
    A constant group gets scale 0 and code 0.
    """
    groups = x_TD.float().unflatten(axis, (-1, group_size))
    low, high = groups.aminmax(dim=axis, keepdim=True)
    best = _span(groups, low, high - low, bits, scale_dtype)
    if clip < 1:
        narrow = _span(groups, low + (1 - clip) / 2 * (high - low), clip * (high - low), bits, scale_dtype)
        better = _squared_error(groups, narrow, axis) < _squared_error(groups, best, axis)
        best = Quantized(*(torch.where(better, *pair) for pair in zip(narrow, best, strict=True)))
    return Quantized(best.codes.flatten(axis - 1, axis), best.scale.squeeze(axis), best.minimum.squeeze(axis))


def _span(
    groups: torch.Tensor, low: torch.Tensor, span: torch.Tensor, bits: int, scale_dtype: torch.dtype
) -> Quantized:
    """Codes that span `span` from `low` on, groups still apart."""
    top = 2**bits - 1
    scale, minimum = (span / top).to(scale_dtype), low.to(scale_dtype)
    step = scale.float()
    codes = ((groups - minimum.float()) / torch.where(step > 0, step, 1)).round_().clamp_(0, top)
    return Quantized(torch.where(step > 0, codes, 0).to(torch.uint8), scale, minimum)


def _squared_error(groups: torch.Tensor, quantized: Quantized, axis: int) -> torch.Tensor:
    codes, scale, minimum = (part.float() for part in quantized)
    return (codes * scale + minimum - groups).square_().sum(axis, keepdim=True)


def dequantize(quantized: Quantized, group_size: int, axis: int) -> torch.Tensor:
    """Values of unpacked codes, float32 `(*, T, D)`."""
    groups = quantized.codes.unflatten(axis, (-1, group_size)).float()
    scale, minimum = quantized.scale.float().unsqueeze(axis), quantized.minimum.float().unsqueeze(axis)
    return (groups * scale + minimum).flatten(axis - 1, axis)


def gains(basis_KD: torch.Tensor, block_size: int) -> torch.Tensor:
    """Columns C of (I + W_R W_R^T)^-1 W_R for every block C of `block_size` channels, R being C and all later channels.

    Args:
        basis_KD: W, float32 `(*, K, D)`, channels in the order in which they are rounded.
        block_size: channels per block; D must be a multiple of it.

    Returns:
        float32 `(*, K, D)`.
    """
    blocks = basis_KD.unflatten(-1, (-1, block_size)).movedim(-2, -3)  # (*, D / block, K, block)
    own = blocks @ blocks.mT
    later = own.flip(-3).cumsum(-3).flip(-3)
    eye = torch.eye(basis_KD.shape[-2], dtype=basis_KD.dtype, device=basis_KD.device)
    factor = torch.linalg.cholesky(eye + later)
    return torch.cholesky_solve(blocks, factor).movedim(-3, -2).flatten(-2)


def quantize(
    x_TD: torch.Tensor,
    basis_KD: torch.Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    axis: int = -2,
    block_size: int = 8,
    scale_dtype: torch.dtype = torch.float32,
    clip: float = 1.0,
) -> Quantized:
    """Quantise with compensation through `basis_KD`, or plainly without one.

    Args:
        x_TD: keys (or values), `(*, T, D)`. T is a multiple of `group_size` for axis -2, the block size for axis -1.
        basis_KD: W, `(*, K, D)`, its channels in the order of `x_TD`; None for plain rounding.
        bits: 2, 3, 4 or 8.
        group_size: elements that share a scale and a minimum.
        axis: -2 for groups of tokens in one channel, -1 for groups of channels of one token.
        block_size: channels that are rounded together; D gives plain rounding.
        scale_dtype: dtype of scale and minimum.
        clip: the least share of a group's range that its codes span, as in `group_quantize`.

    Returns:
        Unpacked codes with their groups.
    """
    if basis_KD is None or block_size >= x_TD.shape[-1]:
        return group_quantize(x_TD, bits, group_size, axis, scale_dtype, clip)
    x_TD, basis_KD = x_TD.float(), basis_KD.float()
    columns = gains(basis_KD, block_size)
    error_TK = x_TD.new_zeros(*x_TD.shape[:-1], basis_KD.shape[-2])
    parts = []
    for start in range(0, x_TD.shape[-1], block_size):
        block = slice(start, start + block_size)
        target = x_TD[..., block] - error_TK @ columns[..., block]
        part = group_quantize(target, bits, group_size, axis, scale_dtype, clip)
        error_TK += (dequantize(part, group_size, axis) - x_TD[..., block]) @ basis_KD[..., block].mT
        parts.append(part)
    return Quantized(*(torch.cat(tensors, -1) for tensors in zip(*parts, strict=True)))


def pack(codes_TD: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes `(*, T, D)` to bytes `(*, T, D * bits / 8)` in planes.

    With P = 8 / bits planes, byte j of a token holds the channels j, j + D/P, j + 2 D/P, ... from the lowest bits upwards, so that a
    plane is read without shuffling. Three bits are a plane set of two bits followed by one of the third bit.
    """
    if bits == 3:
        return torch.cat([pack(codes_TD & 3, 2), pack(codes_TD >> 2, 1)], -1)
    planes = codes_TD.unflatten(-1, (8 // bits, -1))
    packed = planes[..., 0, :]
    for plane in range(1, 8 // bits):
        packed = packed | planes[..., plane, :] << (plane * bits)
    return packed.contiguous()


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: uint8 codes `(*, T, D)`."""
    if bits == 3:
        low, high = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], -1)
        return unpack(low, 2) | unpack(high, 1) << 2
    return torch.cat([packed >> (plane * bits) & (2**bits - 1) for plane in range(8 // bits)], -1)
