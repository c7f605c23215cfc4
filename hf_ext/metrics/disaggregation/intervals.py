"""Intervals of groups and of their gaps to the rest: of proportions in closed form, of anything else by resampling.

Units, items or clusters of them, are drawn with replacement. One draw from all units serves every group and its rest, so that a cluster on both
sides is drawn for both at once, and the cost does not grow with the rest of each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hf_ext._lazy import optional_import
from hf_ext.metrics.disaggregation.measures import Own, Sums
from hf_ext.metrics.statistics import bca_interval, newcombe_interval, wilson_interval

_BLOCKS = 200
_BIASED = "biased at this n"
_MAX_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; where something is missing, `note` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    p_value: float | None = None


@dataclass(frozen=True)
class Proportions:
    """Items with the score 1, `hits`, among those of each group, `sizes`: `(G,)`; group 0 holds all."""

    hits: np.ndarray
    sizes: np.ndarray
    level: float

    def estimate(self, group: int) -> Estimate:
        hits, n = int(self.hits[group]), int(self.sizes[group])
        return Estimate(hits / n, *wilson_interval(hits, n, level=self.level))

    def gap(self, group: int) -> Estimate:
        """Group less rest, with the p-value of Fisher's exact test."""
        (hits, n), (all_hits, all_n) = ((int(self.hits[i]), int(self.sizes[i])) for i in (group, 0))
        rest_hits, rest = all_hits - hits, all_n - n
        low, high = newcombe_interval((hits, n), (rest_hits, rest), level=self.level)
        table = [[hits, n - hits], [rest_hits, rest - rest_hits]]
        p_value = optional_import("scipy.stats", "cards").fisher_exact(table).pvalue
        return Estimate(hits / n - rest_hits / rest, low, high, p_value=float(p_value))


@dataclass(frozen=True)
class Resampled:
    """Metrics of groups and of their rests.

    Attributes:
        values: `(2, G)`, on the data.
        draws: `(2, G, B)`, on the resamples.
        left_out: `(2, G, J)`, without each unit; beyond 200 units without each of 200 blocks of units.
    """

    values: np.ndarray
    draws: np.ndarray
    left_out: np.ndarray
    level: float
    measure: Sums | Own

    def estimate(self, group: int) -> Estimate:
        value, draws, left_out = self.values[0, group], self.draws[0, group], self.left_out[0, group]
        fault = self._fault(value, draws)
        if fault == _BIASED:
            tails = [(1 + self.level) / 2, (1 - self.level) / 2]
            low, high = np.clip(2 * value - np.nanquantile(draws, tails), *self.measure.bounds)
            low = self.measure.bounds[0] if self.measure.overestimates else low
            return Estimate(float(value), float(min(low, value)), float(max(high, value)), fault)
        if fault:
            return Estimate(float(value) if np.isfinite(value) else None, note=f"no interval: {fault}")
        return self._bca(value, draws, left_out)

    def gap(self, group: int) -> Estimate:
        """Group less rest, with the p-value of a normal test by the spread of the resamples; neither if a side has a fault."""
        value, draws, left_out = (
            array[0, group] - array[1, group] for array in (self.values, self.draws, self.left_out)
        )
        of_group, of_rest = (self._fault(self.values[side, group], self.draws[side, group]) for side in (0, 1))
        if of_group or of_rest or self._fault(value, draws):
            note = f"gap not tested: the rest is {of_rest}" if of_rest and not of_group else "gap not tested"
            return Estimate(float(value) if np.isfinite(value) else None, note=note)
        z = abs(value) / np.nanstd(draws, ddof=1)
        p_value = float(2 * optional_import("scipy.special", "cards").ndtr(-z))
        return replace(self._bca(value, draws, left_out), p_value=p_value)

    def _fault(self, value: float, draws: np.ndarray) -> str:
        """What is wrong with the resamples for BCa; empty if nothing is."""
        finite = draws[np.isfinite(draws)]
        if not np.isfinite(value) or len(finite) < 0.95 * len(draws):
            return "undefined in many resamples"
        spread = finite.std(ddof=1)
        if spread <= 1e-12 * max(1.0, abs(value)):
            return "the same in every resample"
        # A rule of Efron and Tibshirani: bias below a quarter of the standard error does not matter. Means have none.
        biased = self.measure.scores is None and abs(finite.mean() - value) > spread / 4
        return _BIASED if biased else ""

    def _bca(self, value: float, draws: np.ndarray, left_out: np.ndarray) -> Estimate:
        """Widened to hold the value, if need be."""
        draws, left_out = draws[np.isfinite(draws)], left_out[np.isfinite(left_out)]
        low, high = bca_interval(draws, value, left_out, level=self.level)
        return Estimate(float(value), min(low, float(value)), max(high, float(value)))


def count(scores: np.ndarray, of_items: np.ndarray, n_groups: int, level: float) -> Proportions:
    """
    Args:
        scores: `(N,)` of 0 and 1.
        of_items: `(N, D)`, groups of each item, -1 for those that are not asked for.
    """
    asked = of_items >= 0
    hits, sizes = (
        np.bincount(of_items[chosen], minlength=n_groups) for chosen in (asked & (scores[:, None] == 1), asked)
    )
    return Proportions(hits, sizes, level)


def resample(
    measure: Sums | Own,
    of_items: np.ndarray,
    n_groups: int,
    clusters: np.ndarray | None,
    resamples: int,
    seed: int,
    level: float,
) -> Resampled:
    """
    Args:
        of_items: see [`count`].
        clusters: `(N,)`, from 0; default: items are drawn.
    """
    evaluate = measure.evaluator(of_items, n_groups, clusters)
    n_units = len(of_items) if clusters is None else int(clusters.max()) + 1
    generator = np.random.default_rng(seed)
    at_once = max(1, _MAX_AT_ONCE // max(n_units, n_groups * measure.width))
    draws = [evaluate(weights) for weights in _bootstrap(n_units, resamples, at_once, generator)]
    left_out = [evaluate(weights) for weights in _leave_out(n_units, at_once, generator)]
    values = evaluate(np.ones((1, n_units)))[..., 0]
    return Resampled(values, np.concatenate(draws, -1), np.concatenate(left_out, -1), level, measure)


def _bootstrap(n_units: int, resamples: int, at_once: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    for start in range(0, resamples, at_once):
        drawn = [generator.integers(0, n_units, n_units) for _ in range(min(at_once, resamples - start))]
        yield np.stack([np.bincount(units, minlength=n_units) for units in drawn]).astype(np.float64)


def _leave_out(n_units: int, at_once: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """What is estimated from it, a skewness, is the same for units and for random blocks of them."""
    blocks = min(n_units, _BLOCKS)
    block = generator.permutation(n_units) % blocks
    for start in range(0, blocks, at_once):
        left_out = np.arange(start, min(start + at_once, blocks))
        yield (block != left_out[:, None]).astype(np.float64)
