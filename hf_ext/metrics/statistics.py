"""How sure a number is: intervals of means, proportions and anything that was resampled, and tests between methods or groups.

A row is whatever was judged: an edit, a text, a question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from hf_ext._lazy import optional_import

_SEED = 0
_MAX_DRAWS_AT_ONCE = 2**22


def bootstrap_interval(
    values: Sequence[float], weights: Sequence[float] | None = None, *, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile interval of the (weighted) mean, by drawing rows with replacement; the same input gives the same answer.

    Args:
        values: one value per row.
        weights: optional weight per value, e.g. tokens per text; the statistic is then Σ w·v / Σ w of the drawn ones.

    Returns:
        (low, high); both NaN for no values, both the value itself for one.
    """
    if not len(values):
        return math.nan, math.nan
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(_SEED)
    means: list[float] = []
    while len(means) < resamples:
        rounds = min(resamples - len(means), max(1, _MAX_DRAWS_AT_ONCE // len(value)))
        drawn = generator.integers(0, len(value), size=(rounds, len(value)))
        means.extend((value * weight)[drawn].sum(axis=1) / weight[drawn].sum(axis=1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def short(interval: Sequence[float]) -> list[float]:
    """Bounds with four significant digits, for the metadata of model cards."""
    return [float(f"{bound:.4g}") for bound in interval]


def paired_permutation_test(first: Sequence[float], second: Sequence[float], *, permutations: int = 10000) -> float:
    """Two-sided p-value that two methods differ in mean on the same rows, by flipping the signs of the differences.

    All 2^n sign patterns are enumerated up to n = 12 differing rows; beyond, `permutations` random patterns are drawn with
    a fixed seed and the observed one is counted in, so that p is never 0.

    Raises:
        ValueError: the two sequences differ in length.
    """
    if len(first) != len(second):
        raise ValueError(
            f"first has {len(first)} values and second {len(second)}: a paired test needs the same rows in both."
        )
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    difference = difference[difference != 0]
    n = len(difference)
    if n == 0:
        return 1.0
    # Rounding must not make a pattern with the observed sum look smaller than it.
    threshold = abs(difference.sum()) - 1e-12
    if n <= 12:
        signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
        return float((np.abs(signs @ difference) >= threshold).mean())
    generator = np.random.default_rng(_SEED)
    extreme, done = 1, 1
    while done <= permutations:
        rounds = min(permutations + 1 - done, max(1, _MAX_DRAWS_AT_ONCE // n))
        signs = generator.integers(0, 2, size=(rounds, n)) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= threshold).sum())
        done += rounds
    return extreme / (permutations + 1)


def wilson_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; unlike value ± error it stays inside [0, 1] and is honest where all or none succeed."""
    stats = optional_import("scipy.stats", "cards")
    found = stats.binomtest(successes, n).proportion_ci(level, "wilson")
    return float(found.low), float(found.high)


def newcombe_interval(first: tuple[int, int], second: tuple[int, int], *, level: float = 0.95) -> tuple[float, float]:
    """Newcombe's interval of the difference of two independent proportions, first less second: his method 10, from both Wilson intervals.

    Args:
        first, second: successes and n of each.
    """
    (p, p_low, p_high), (q, q_low, q_high) = (
        (successes / n, *wilson_interval(successes, n, level=level)) for successes, n in (first, second)
    )
    return p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def bca_interval(draws: np.ndarray, value: float, left_out: np.ndarray, *, level: float = 0.95) -> tuple[float, float]:
    """Bias-corrected and accelerated interval (Efron 1987).

    It equals that of `scipy.stats.bootstrap`, which can neither draw clusters nor leave out blocks: its jackknife is quadratic in the rows.

    Args:
        draws: the metric on each resample.
        value: the metric on the data.
        left_out: the metric without each row, cluster or block.
    """
    special = optional_import("scipy.special", "cards")
    below = ((draws < value).mean() + (draws <= value).mean()) / 2
    bias = special.ndtri(np.clip(below, 0.5 / len(draws), 1 - 0.5 / len(draws)))
    influence = left_out.mean() - left_out
    square = (influence**2).sum()
    acceleration = (influence**3).sum() / (6 * square**1.5) if square else 0.0
    tails = bias + special.ndtri([(1 - level) / 2, (1 + level) / 2])
    low, high = np.quantile(draws, special.ndtr(bias + tails / (1 - acceleration * tails)))
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm's step-down method: those below α are significant with a chance of any false one of at most α."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted.tolist()
