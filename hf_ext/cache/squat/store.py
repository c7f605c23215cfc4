"""Operations on the keys or the values of a layer; each returns new `Tokens` and leaves the old ones alone.

What is kept of a slice is cloned, since a view would keep all of the tensor it comes from alive.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_ext.kernels.attention import Tokens
from hf_ext.kernels.quantize import Quantized

Pack = Callable[[torch.Tensor], Quantized]


def token_step(tokens: Tokens) -> int:
    """Tokens that are packed together."""
    return tokens.group_size if tokens.axis == -2 else 1


def append(tokens: Tokens, new: torch.Tensor) -> Tokens:
    """With `new` tokens at the end; they are not copied if no others wait there."""
    return tokens._replace(recent=torch.cat([tokens.recent, new], -2) if tokens.recent.shape[-2] else new)


def released(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it if it is a view of something larger."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def release(tokens: Tokens) -> Tokens:
    """With newest tokens that are no view of something larger, such as queries, keys and values in one."""
    return tokens._replace(recent=released(tokens.recent))


def take_first(tokens: Tokens, count: int) -> Tokens:
    """Move up to `count` tokens from the newest to the first ones. The newest are a view until the next `pack`."""
    first = torch.cat([tokens.first, tokens.recent[..., :count, :]], -2)
    return tokens._replace(first=first, recent=tokens.recent[..., count:, :])


def pack(tokens: Tokens, count: int, function: Pack) -> Tokens:
    """Pack the `count` oldest of the newest tokens."""
    packed = function(tokens.recent[..., :count, :])
    if tokens.packed.codes.shape[-2]:
        packed = Quantized(*(torch.cat(pair, -2) for pair in zip(tokens.packed, packed, strict=True)))
    return tokens._replace(packed=packed, recent=tokens.recent[..., count:, :].clone())


def crop(tokens: Tokens, left: int) -> Tokens:
    """The oldest `left` tokens. Of a group that is cut, the remainder becomes whole again, as it was rounded."""
    first, packed, _ = tokens.lengths
    if left >= first + packed:
        return tokens._replace(recent=tokens.recent[..., : left - first - packed, :].clone())
    step = token_step(tokens)
    kept = max(left - first, 0) // step
    rest = tokens.dequantized(kept * step, min((kept + 1) * step, packed))[
        ..., : max(left - first, 0) - kept * step, :
    ]
    return tokens._replace(
        first=tokens.first[..., :left, :].clone(),
        packed=Quantized(
            tokens.packed.codes[..., : kept * step, :].clone(),
            *(part[..., :kept, :].clone() for part in tokens.packed[1:]),
        ),
        recent=rest.to(tokens.recent.dtype),
    )


def apply(tokens: Tokens, function: Callable[[torch.Tensor], torch.Tensor]) -> Tokens:
    """`function` on every tensor, for batch operations and moves between devices."""
    return tokens._replace(
        first=function(tokens.first), packed=Quantized(*map(function, tokens.packed)), recent=function(tokens.recent)
    )


def nbytes(tokens: Tokens) -> int:
    return sum(tensor.nbytes for tensor in (tokens.first, *tokens.packed, tokens.recent))
