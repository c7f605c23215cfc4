"""`disaggregate`: from predictions and factors to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hf_ext.metrics.disaggregation.groups import Groups, find_groups
from hf_ext.metrics.disaggregation.intervals import Estimate, Proportions, Resampled, count, resample
from hf_ext.metrics.disaggregation.measures import Items, Metric, Own, Sums, as_array, measures
from hf_ext.metrics.disaggregation.report import GroupReport, GroupResult
from hf_ext.metrics.statistics import holm, wilson_interval

_FEW_CLUSTERS = 10


@dataclass(frozen=True)
class _Options:
    min_n: int
    intersections: int
    confidence: float
    method: str
    resamples: int
    seed: int

    def __post_init__(self) -> None:
        if self.min_n < 1:
            raise ValueError(f"min_n={self.min_n}: give at least 1; below 30 intervals by bootstrap are too narrow.")
        if self.intersections not in (1, 2, 3):
            raise ValueError(f"intersections={self.intersections}: give 1, 2 or 3, the factors that are combined.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}: give a number between 0 and 1, such as 0.95.")
        if self.method not in ("auto", "wilson", "bootstrap"):
            raise ValueError(f"method={self.method!r}: give 'auto', 'wilson' or 'bootstrap'.")
        if self.resamples < 100:
            raise ValueError(f"resamples={self.resamples}: give at least 100; the ends of an interval need more.")


@dataclass(frozen=True)
class _Task:
    """What is the same for all metrics.

    Attributes:
        units: `(N,)`, the cluster of each item; `None` if items are drawn.
        drawn: `(2, G)`, units in each group and in the rest of it.
    """

    groups: Groups
    units: np.ndarray | None
    drawn: np.ndarray
    options: _Options

    @property
    def drawn_kind(self) -> str:
        return "items" if self.units is None else "clusters"

    @property
    def asked(self) -> np.ndarray:
        """`(G,)`: whether a group is evaluated."""
        asked = self.groups.sizes >= self.options.min_n
        asked[0] = True
        return asked


def disaggregate(
    predictions: Any,
    references: Any,
    factors: Any,
    metrics: str | Sequence[str] | Mapping[str, str | Metric] = "accuracy",
    *,
    probabilities: Any = None,
    clusters: Any = None,
    min_n: int = 30,
    intersections: int = 2,
    confidence: float = 0.95,
    method: Literal["auto", "wilson", "bootstrap"] = "auto",
    resamples: int = 2000,
    seed: int = 0,
) -> GroupReport:
    """Metrics of all items, of each group and of combinations of factors, with intervals and the gap to the rest.

    Args:
        predictions: N classes, or N scores for the metric `"mean"`.
        references: N classes; `None` for `"mean"`.
        factors: name -> N labels, a list of N dicts, a `pandas.DataFrame` or a `datasets.Dataset`. `None` and NaN are the group "not stated".
        metrics: of `accuracy`, `error_rate`, `f1` (macro), `ece`, `brier`, `nll`, `mean`; or a mapping of names to these or to functions of
            predictions and references, both as arrays, that return a number.
        probabilities: `(N, C)`, for `ece`, `brier` and `nll`; references are then indices of classes.
        clusters: N ids of what was sampled as a whole, such as a document with several questions.
        min_n: groups with fewer items are listed without a value; groups whose rest has fewer are not compared.
        intersections: 1 for single factors only, 2 for pairs, 3 for triples too.
        confidence: of the intervals.
        method: `"wilson"` takes scores of 0 and 1 without clusters only; `"bootstrap"` is BCa; `"auto"` is Wilson where it can be.
        resamples: of the bootstrap, at least 100.
        seed: of the bootstrap.

    Raises:
        ValueError: input that does not fit together, or that a metric is not defined for.
        ImportError: without the extra `cards`.
    """
    options = _Options(min_n, intersections, confidence, method, resamples, seed)
    items = Items(
        as_array(predictions, "predictions"),
        None if references is None else as_array(references, "references"),
        None if probabilities is None else as_array(probabilities, "probabilities"),
    )
    n = len(items.predictions)
    if not n:
        raise ValueError("predictions: there is none; give at least one.")
    for name, array in (("references", items.references), ("probabilities", items.probabilities)):
        if array is not None and len(array) != n:
            raise ValueError(f"{name} has {len(array)} rows for {n} predictions; give one for each.")
    groups = find_groups(factors, n, intersections)
    units = None if clusters is None else _units(as_array(clusters, "clusters"), n)
    task = _Task(groups, units, _count_units(groups, units), options)
    found = {name: _results(name, measure, task) for name, measure in measures(metrics, items).items()}
    rows = tuple(row for of_group in zip(*(results for results, _ in found.values()), strict=True) for row in of_group)
    ways = {name: way for name, (_, way) in found.items()}
    return GroupReport(rows, groups.factors, confidence, _uncertainty(ways, task))


def _units(clusters: np.ndarray, n: int) -> np.ndarray:
    if clusters.shape != (n,):
        raise ValueError(f"clusters of shape {clusters.shape} for {n} predictions: give one id for each.")
    missing = [i for i, c in enumerate(clusters.tolist()) if c is None or c != c]
    if missing:
        raise ValueError(f"clusters: row {missing[0]} has none; give items without a cluster an id of their own.")
    return np.unique(clusters.astype(str), return_inverse=True)[1]


def _count_units(groups: Groups, units: np.ndarray | None) -> np.ndarray:
    n_groups = len(groups.sizes)
    if units is None:
        return np.stack([groups.sizes, groups.sizes[0] - groups.sizes])
    sizes = np.bincount(units)
    pairs, counts = np.unique(groups.of_items * len(sizes) + units[:, None], return_counts=True)
    group, unit = np.divmod(pairs, len(sizes))
    inside = np.bincount(group, minlength=n_groups)
    whole = np.bincount(group[counts == sizes[unit]], minlength=n_groups)
    return np.stack([inside, len(sizes) - whole])


def _results(name: str, measure: Sums | Own, task: _Task) -> tuple[list[GroupResult], str]:
    """Rows in the order of the groups, and the way they were computed."""
    options, asked = task.options, task.asked
    proportion = measure.scores is not None and bool(np.isin(measure.scores, (0, 1)).all())
    way = options.method
    if way == "wilson" and not proportion:
        raise ValueError(f"method='wilson' is for scores of 0 and 1, and {name} is none; use method='auto'.")
    if way == "wilson" and task.units is not None:
        raise ValueError("method='wilson' takes items for independent; use method='auto' with clusters.")
    if way == "auto":
        way = "wilson" if proportion and task.units is None else "bootstrap"
    index = np.where(asked, asked.cumsum() - 1, -1)
    of_items, n_asked = index[task.groups.of_items], int(asked.sum())
    found: Proportions | Resampled
    if way == "wilson":
        assert measure.scores is not None
        found = count(measure.scores, of_items, n_asked, options.confidence)
    else:
        found = resample(measure, of_items, n_asked, task.units, options.resamples, options.seed, options.confidence)
    rows = []
    for group, (labels, n) in enumerate(zip(task.groups.labels, task.groups.sizes.tolist(), strict=True)):
        row = GroupResult(labels, n, name)
        if not asked[group]:
            rows.append(replace(row, note="n too small"))
            continue
        value = found.estimate(index[group])
        if proportion and value.low is None and value.value in (0, 1):
            # All alike: the bootstrap sees no spread, and units that are drawn as a whole count as one item each.
            units = int(task.drawn[0, group])
            interval = wilson_interval(int(value.value * units), units, level=options.confidence)
            value = Estimate(value.value, *interval, f"all alike: Wilson's interval for {units} {task.drawn_kind}")
        reason = _not_compared(task, group)
        gap = Estimate(None, note=reason) if reason or group == 0 else found.gap(index[group])
        rows.append(_row(row, value, gap))
    p_values = {place: row.p_value for place, row in enumerate(rows) if row.p_value is not None}
    for place, p_value in zip(p_values, holm(list(p_values.values())), strict=True):
        rows[place] = replace(rows[place], p_value=p_value)
    return rows, way


def _not_compared(task: _Task, group: int) -> str:
    """Why a group is not compared with its rest; empty if it is."""
    if group == 0:
        return ""
    rest = int(task.groups.sizes[0] - task.groups.sizes[group])
    if not rest:
        return "all items: no rest"
    if rest < task.options.min_n:
        return f"rest of {rest} items too small"
    if task.units is not None and (few := int(task.drawn[:, group].min())) < _FEW_CLUSTERS:
        return f"not compared: {few} clusters"
    return ""


def _row(row: GroupResult, value: Estimate, gap: Estimate) -> GroupResult:
    note = "; ".join(filter(None, (value.note, gap.note)))
    return replace(
        row,
        value=value.value,
        low=value.low,
        high=value.high,
        gap=gap.value,
        gap_low=gap.low,
        gap_high=gap.high,
        p_value=gap.p_value,
        note=note,
    )


def _uncertainty(ways: dict[str, str], task: _Task) -> str:
    """How intervals and p-values were computed, in two sentences."""
    options = task.options
    drawn = f"{int(task.drawn[0, 0]):,} {task.drawn_kind}"
    words = {
        "wilson": "Wilson's score intervals, gaps by Newcombe's method and Fisher's exact test",
        "bootstrap": f"BCa bootstrap of {drawn} ({options.resamples:,} resamples, seed {options.seed}), gaps likewise with a normal test",
    }
    parts = [
        f"{', '.join(name for name in ways if ways[name] == way)}: {text}"
        for way, text in words.items()
        if way in ways.values()
    ]
    return (
        f"{100 * options.confidence:g} % intervals ({'; '.join(parts)}). A gap is a group less all items outside it, its p-value is Holm-adjusted "
        f"over all tested groups of a metric, and groups of fewer than {options.min_n} items are listed but not evaluated."
    )
