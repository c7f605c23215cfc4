"""Random numbers by row, so that a row of a batch gets the same as alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | list[torch.Generator] | None


def uniform_rows(
    lengths: Sequence[int], count: int, width: int, generator: Generators, device: torch.device
) -> Tensor:
    """Uniform float32 numbers in [0, 1), `(B, count, width)`.

    Args:
        lengths: how many of the `count` positions of each row are in use. A list of generators draws for these alone, and leaves 0.5 in the others.
        generator: one for all rows, or one for each; numbers are drawn where it lives, and moved.
    """
    if not isinstance(generator, list):
        place = device if generator is None else generator.device
        return torch.rand(len(lengths), count, width, generator=generator, device=place).to(device)
    found = torch.full((len(lengths), count, width), 0.5, device=device)
    for row, length, each in zip(found, lengths, generator, strict=True):
        row[:length] = torch.rand(length, width, generator=each, device=each.device).to(device)
    return found


def lengths_of(editable_BN: Tensor) -> list[int]:
    """Positions up to the last editable one, by row."""
    places = torch.arange(1, editable_BN.shape[1] + 1, device=editable_BN.device)
    return (editable_BN * places).amax(-1).tolist()
