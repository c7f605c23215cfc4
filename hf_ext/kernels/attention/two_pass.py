"""Attention in two passes over the codes: all scores, a softmax, then the weighted sum of the values.

For a few query rows the scores of all tokens are small, so only the two products touch what is packed. They are the compiled ones, or PyTorch
in slices, which never holds more than a slice of dequantised tokens.
"""

from __future__ import annotations

import ctypes

import torch

from hf_ext.kernels import native
from hf_ext.kernels.attention.reference import Tokens, adjust, softmax
from hf_ext.kernels.quantize import reference

SLICE = 512  # tokens dequantised at a time


def attend(
    query: torch.Tensor,
    keys: Tokens,
    values: Tokens,
    mask: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `reference.attend`, without dequantising the whole cache."""
    batch, query_heads, tokens, channels = query.shape
    heads = keys.recent.shape[1]
    rows = (query.float() * scaling).reshape(batch, heads, -1, channels).contiguous()
    library = native.library() if query.device.type == "cpu" else None

    scores = rows.new_empty(*rows.shape[:-1], sum(keys.lengths))
    first, packed, recent = scores.split(keys.lengths, -1)
    first.copy_(rows @ keys.first.float().mT)
    recent.copy_(rows @ keys.recent.float().mT)
    if library is not None:
        _native_scores(library, rows, keys, packed)
    else:
        _torch_scores(rows, keys, packed)

    weights = softmax(adjust(scores.view(batch, query_heads, tokens, -1), mask, softcap), sinks).view_as(scores)
    first, packed, recent = weights.split(values.lengths, -1)
    sums = _native_sums(library, packed, values) if library is not None else _torch_sums(packed, values)
    sums += first @ values.first.float()
    sums += recent @ values.recent.float()
    return sums.view(batch, query_heads, tokens, -1).to(query.dtype)


def _torch_scores(rows: torch.Tensor, keys: Tokens, out: torch.Tensor) -> None:
    """rows . key: the scale of a group is folded into the rows, its minimum into a bias."""
    group, bits = keys.group_size, keys.bits
    step = max(SLICE // group, 1) * group
    for start in range(0, out.shape[-1], step):
        codes = (
            reference.unpack(keys.packed.codes[..., start : start + step, :], bits).float().unflatten(-2, (-1, group))
        )
        groups = slice(start // group, start // group + codes.shape[-3])
        folded = rows.unsqueeze(-3) * keys.packed.scale[..., groups, :].float().unsqueeze(-2)
        bias = rows @ keys.packed.minimum[..., groups, :].float().mT
        scores = (folded @ codes.mT).movedim(-3, -2) + bias.unsqueeze(-1)
        out[..., start : start + step] = scores.flatten(-2)


def _torch_sums(weights: torch.Tensor, values: Tokens) -> torch.Tensor:
    """weights . value, per group of channels with the scale folded into the weights."""
    group, bits = values.group_size, values.bits
    channels = values.packed.scale.shape[-1] * group
    sums = weights.new_zeros(*weights.shape[:-1], channels)
    for start in range(0, weights.shape[-1], SLICE):
        tokens = slice(start, start + SLICE)
        codes = reference.unpack(values.packed.codes[..., tokens, :], bits).float().unflatten(-1, (-1, group))
        part = weights[..., tokens]
        scale = values.packed.scale[..., tokens, :].float().mT.unsqueeze(-2)  # (*, groups, 1, tokens)
        sums += (part.unsqueeze(-3) * scale @ codes.movedim(-2, -3)).movedim(-3, -2).flatten(-2)
        sums += (part @ values.packed.minimum[..., tokens, :].float()).repeat_interleave(group, -1)
    return sums


def _native_scores(library: ctypes.CDLL, rows: torch.Tensor, keys: Tokens, out: torch.Tensor) -> None:
    codes, scale, minimum = keys.packed
    batch, heads, count, channels = rows.shape
    library.hf_ext_key_scores(
        rows.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        minimum.data_ptr(),
        out.data_ptr(),
        batch * heads,
        count,
        codes.shape[-2],
        channels,
        keys.group_size,
        out.stride(-2),
        keys.bits,
        scale.dtype == torch.float16,
        native.threads(codes.shape[-2] * rows.numel()),
    )


def _native_sums(library: ctypes.CDLL, weights: torch.Tensor, values: Tokens) -> torch.Tensor:
    codes, scale, minimum = values.packed
    batch, heads, count, tokens = weights.shape
    sums = weights.new_empty(batch, heads, count, scale.shape[-1] * values.group_size)
    library.hf_ext_value_sums(
        weights.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        minimum.data_ptr(),
        sums.data_ptr(),
        batch * heads,
        count,
        tokens,
        sums.shape[-1],
        values.group_size,
        weights.stride(-2),
        values.bits,
        scale.dtype == torch.float16,
        native.threads(tokens * sums.numel()),
    )
    return sums
