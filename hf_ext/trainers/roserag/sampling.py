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


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: temperature, nucleus and length.

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

    `torch.multinomial` draws for the whole batch at once, so that a row's tokens would depend on its place in it. With `top_p`, a row is
    sorted only as far as its likely tokens reach: sorting whole vocabularies would take longer than a small model.

    Args:
        seeds: of every row.
        sampling: temperature > 0, and top_p.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self._draws = [random.Random(seed) for seed in seeds]
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities_BV = (scores.float() / self._sampling.temperature).softmax(-1)
        draws_B = torch.tensor([draw.random() for draw in self._draws], dtype=torch.float64, device=scores.device)
        if self._sampling.top_p < 1:
            tokens_B = _draw_likely(probabilities_BV, draws_B, self._sampling.top_p)
        else:
            tokens_B = _draw(probabilities_BV, draws_B)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens_B[:, None], 0.0)


def _draw(weights_BV: Tensor, draws_B: Tensor) -> Tensor:
    """The places, `(B,)`, at which numbers from [0, 1) fall if every row of weights is laid end to end."""
    cumulated = weights_BV.double().cumsum(-1)
    # The total may differ from 1 in the last bit.
    places = torch.searchsorted(cumulated, (draws_B * cumulated[:, -1])[:, None], right=True)
    return places[:, 0].clamp(max=weights_BV.shape[-1] - 1)


def _draw_likely(probabilities_BV: Tensor, draws_B: Tensor, top_p: float) -> Tensor:
    """Tokens, `(B,)`, drawn from the fewest likely ones whose probabilities reach `top_p`."""
    rows, vocabulary = probabilities_BV.shape
    tokens_B = torch.empty(rows, dtype=torch.long, device=probabilities_BV.device)
    left = torch.arange(rows, device=probabilities_BV.device)
    sorted_ones = 256
    while len(left):
        sorted_ones = min(sorted_ones, vocabulary)
        likely, tokens = probabilities_BV[left].topk(sorted_ones)
        before = likely.double().cumsum(-1) - likely
        # How far a row is sorted depends on the row alone, and so does what is drawn.
        enough = (before[:, -1] + likely[:, -1] >= top_p) | (sorted_ones == vocabulary)
        chosen = _draw(likely.masked_fill(before >= top_p, 0.0)[enough], draws_B[left[enough]])
        tokens_B[left[enough]] = tokens[enough].gather(1, chosen[:, None])[:, 0]
        left, sorted_ones = left[~enough], sorted_ones * 16
    return tokens_B
