"""Which of a question's responses become a pair: https://huggingface.co/papers/2502.10993.

The paper takes the least confident correct response against the most confident wrong one, under the model that is trained and the
prompt that it will see: the pair with the smallest gap, which gains most from widening.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NORMALIZATIONS = ("mean", "sum")


@dataclass(frozen=True)
class Pair:
    """Indices of the chosen and the rejected candidate, and score chosen - score rejected."""

    chosen: int
    rejected: int
    margin: float


@dataclass(frozen=True)
class Dropped:
    """Why a question makes no pair: "no_correct" or "no_incorrect"."""

    reason: str


def score(token_logps: Sequence[float], normalization: str = "mean") -> float:
    """Log-probability of a response: the mean over its tokens, or their sum."""
    total = float(sum(token_logps))
    return total / max(len(token_logps), 1) if normalization == "mean" else total


def _hardest(scores: Sequence[float], right: list[int], wrong: list[int]) -> tuple[int, int]:
    return min(right, key=lambda i: scores[i]), max(wrong, key=lambda i: scores[i])


def _easiest(scores: Sequence[float], right: list[int], wrong: list[int]) -> tuple[int, int]:
    return max(right, key=lambda i: scores[i]), min(wrong, key=lambda i: scores[i])


RULES: dict[str, Callable[[Sequence[float], list[int], list[int]], tuple[int, int]]] = {
    "hardest": _hardest,
    "easiest": _easiest,
}


def select(scores: Sequence[float], correct: Sequence[bool], rule: str = "hardest", seed: int = 0) -> Pair | Dropped:
    """The pair of one question; ties go to the lower index.

    Args:
        scores: of every candidate, under the model that will be trained.
        correct: whether its answer is right.
        rule: "hardest" (the paper's), "easiest" (the opposite), or "random".
        seed: for "random".
    """
    right = [i for i, is_correct in enumerate(correct) if is_correct]
    wrong = [i for i, is_correct in enumerate(correct) if not is_correct]
    if not right or not wrong:
        return Dropped("no_incorrect" if right else "no_correct")
    if rule == "random":
        chooser = random.Random(seed)
        chosen, rejected = chooser.choice(right), chooser.choice(wrong)
    else:
        chosen, rejected = RULES[rule](scores, right, wrong)
    return Pair(chosen, rejected, scores[chosen] - scores[rejected])
