"""Sampling in which a row depends on its own seed alone, whatever stands beside it in the batch."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn.

    Attributes:
        temperature: >= 0; 0 is greedy.
        top_p: (0, 1].
        max_new_tokens: >= 1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature!r}: give a finite number >= 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}: give a number in (0, 1].")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens!r}: ask for at least one.")


def seed_of(*parts: object) -> int:
    """A seed of 31 bits from anything that can be written, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class DrawByRow(LogitsProcessor):
    """Leave one token per row, drawn from its distribution by the row's own seed; to be followed by greedy decoding.

    `torch.multinomial` draws for the whole batch at once, so that a row's tokens would depend on its place in it.

    Args:
        seeds: of every row.
        sampling: temperature > 0, and top_p.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._draws = [random.Random(seed) for seed in seeds]
        self._warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(sampling.temperature))]
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        cumulated = scores.double().softmax(-1).cumsum(-1)
        draws = torch.tensor([draw.random() for draw in self._draws], dtype=torch.float64, device=scores.device)
        # The total may differ from 1 in the last bit.
        tokens = torch.searchsorted(cumulated, (draws * cumulated[:, -1])[:, None], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens.clamp(max=scores.shape[-1] - 1), 0.0)
