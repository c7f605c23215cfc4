"""Attention over a cache that is partly packed: the truth, and the container that the implementations share.

Shapes: B batch, H key-value heads, Q query heads (a multiple of H), N new tokens, T packed tokens, S all tokens, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_ext.kernels.quantize import Quantized, dequantize

SLICE = 2048  # tokens dequantised at a time


class Tokens(NamedTuple):
    """The keys or the values of a layer: whole tokens at the beginning, packed ones, and the newest whole.

    Attributes:
        first: first tokens, `(B, H, F, D)`; F may be 0, as may T and R.
        packed: `Quantized` with packed codes `(B, H, T, D * bits / 8)`.
        recent: newest tokens, `(B, H, R, D)`.
        bits: bits of a code.
        group_size: elements that share a scale.
        axis: -2 where these are tokens of a channel (keys), -1 where they are channels of a token (values).
    """

    first: torch.Tensor
    packed: Quantized
    recent: torch.Tensor
    bits: int
    group_size: int
    axis: int

    @property
    def lengths(self) -> list[int]:
        """Tokens at the beginning, packed and newest."""
        return [self.first.shape[-2], self.packed.codes.shape[-2], self.recent.shape[-2]]

    def whole(self, dtype: torch.dtype) -> torch.Tensor:
        """All tokens, dequantised, `(B, H, S, D)`."""
        first, packed, recent = self.lengths
        if not packed:
            return torch.cat([self.first, self.recent], -2).to(dtype) if first else self.recent.to(dtype)
        out = self.recent.new_empty(
            *self.recent.shape[:-2], first + packed + recent, self.recent.shape[-1], dtype=dtype
        )
        out[..., :first, :] = self.first
        step = max(SLICE // self.group_size, 1) * self.group_size
        for start in range(0, packed, step):
            end = min(start + step, packed)
            out[..., first + start : first + end, :] = self.dequantized(start, end)
        out[..., first + packed :, :] = self.recent
        return out

    def dequantized(self, start: int, end: int) -> torch.Tensor:
        """The packed tokens from `start` to `end`, whole groups of them for keys, in float32."""
        codes, *numbers = self.packed
        groups = slice(start // self.group_size, end // self.group_size) if self.axis == -2 else slice(start, end)
        part = Quantized(codes[..., start:end, :], *(number[..., groups, :] for number in numbers))
        return dequantize(part, self.bits, self.group_size, self.axis)


def softmax(scores_S: torch.Tensor, sinks_Q: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last dimension of `(B, Q, N, S)`, with one more logit per head that takes weight but has no value.

    A row whose scores are all -inf gets no weight at all.
    """
    if sinks_Q is None:
        weights = scores_S.softmax(-1)
    else:
        sinks = sinks_Q.to(scores_S.dtype).view(1, -1, 1, 1).expand(*scores_S.shape[:-1], 1)
        weights = torch.cat([scores_S, sinks], -1).softmax(-1)[..., :-1].contiguous()
    return weights.nan_to_num_(0.0)


def adjust(scores: torch.Tensor, mask: torch.Tensor | None, softcap: float | None) -> torch.Tensor:
    """Scaled scores `(B, Q, N, S)` with soft cap and mask applied in place. The mask is boolean (True: may attend) or is added."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, float("-inf"))
    return scores.add_(mask)


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
    """softmax(cap(scaling * q k^T) + mask) v on dequantised keys and values, in float32.

    Args:
        query: `(B, Q, N, D)`; query heads that read the same key-value head are neighbours.
        keys, values: the cache, S tokens each.
        mask: what a query may attend to, broadcastable to `(B, Q, N, S)`: boolean, or added to the scores.
        scaling: factor of the scores.
        softcap: scores are softcap * tanh(scores / softcap) before the mask.
        sinks: one more logit per query head, `(Q,)`, that takes weight but has no value.

    Returns:
        `(B, Q, N, D)` in the dtype of `query`.
    """
    ratio = query.shape[1] // keys.recent.shape[1]
    whole_keys, whole_values = (tokens.whole(torch.float32).repeat_interleave(ratio, 1) for tokens in (keys, values))
    scores = adjust(query.float() @ whole_keys.mT * scaling, mask, softcap)
    return (softmax(scores, sinks) @ whole_values).to(query.dtype)
