"""The metrics, each as something that can be computed quickly for many groups and many resamples at once.

Shapes: N items, U units that are drawn together (the items, or clusters of them), G groups, K sums, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hf_ext._lazy import optional_import

Metric = Callable[[Any, Any], float]
# From how often each unit is drawn, (B, U), to the metric in each group and in the rest of the items: (2, G, B), NaN where there are none.
Evaluate = Callable[[np.ndarray], np.ndarray]

HIGHER_IS_BETTER = {"accuracy": True, "f1": True, "error_rate": False, "ece": False, "brier": False, "nll": False}
BUILT_IN = (*HIGHER_IS_BETTER, "mean")
_BINS = 15


@dataclass(frozen=True)
class Items:
    """What is judged. Arrays of N rows."""

    predictions: np.ndarray
    references: np.ndarray | None
    probabilities: np.ndarray | None


@dataclass(frozen=True)
class Sums:
    """A metric that depends on sums over the items only, such as a mean, or F1, which depends on counts.

    Attributes:
        terms: `(N,)` of indices below K and `(N,)` of values: each item adds its value to the sum of that index.
        width: K.
        finish: from the sums `(G, K, B)` to the metric `(G, B)`.
        scores: `(N,)`, if the metric is their mean.
        bounds: lowest and highest value that the metric can have.
        overestimates: whether the metric of few items is too high on average, so that it says little about how low that of many would be.
    """

    terms: tuple[tuple[np.ndarray, np.ndarray], ...]
    width: int
    finish: Callable[[np.ndarray], np.ndarray]
    scores: np.ndarray | None = None
    bounds: tuple[float, float] = (-np.inf, np.inf)
    overestimates: bool = False

    def evaluator(self, of_items: np.ndarray, n_groups: int, clusters: np.ndarray | None) -> Evaluate:
        """
        Args:
            of_items: `(N, D)`, groups of each item, -1 for those that are not asked for; group 0 holds all items.
            clusters: `(N,)`, the unit of each item; default: it is one itself.
        """
        # Sorted, so that the draws do not depend on the order in which the items came.
        order = np.lexsort((*(array for term in self.terms for array in term), *of_items.T))
        units = np.arange(len(order)) if clusters is None else clusters[order]
        rows, columns, values = [], [], []
        for index, value in self.terms:
            for group in of_items[order].T:
                asked = group >= 0
                rows.append(group[asked] * self.width + index[order][asked])
                columns.append(units[asked])
                values.append(value[order][asked])
        sums = optional_import("scipy.sparse", "cards").csr_array(
            (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
            shape=(n_groups * self.width, units.max() + 1),
        )

        def evaluate(weights: np.ndarray) -> np.ndarray:
            inside = (sums @ np.ascontiguousarray(weights.T)).reshape(n_groups, self.width, -1)
            with np.errstate(invalid="ignore"):
                return np.stack([self.finish(inside), self.finish(inside[:1] - inside)])

        return evaluate


@dataclass(frozen=True)
class Own:
    """A metric that is a function of the user: called for each group, each rest and each resample."""

    name: str
    items: Items
    metric: Metric
    width: int = 1
    scores: None = None
    bounds: tuple[float, float] = (-np.inf, np.inf)
    overestimates: bool = False

    def evaluator(self, of_items: np.ndarray, n_groups: int, clusters: np.ndarray | None) -> Evaluate:
        """See [`Sums`]; the draws depend on the order of the items."""
        inside = np.stack([(of_items == group).any(1) for group in range(n_groups)])
        units = np.arange(len(of_items)) if clusters is None else clusters

        def evaluate(weights: np.ndarray) -> np.ndarray:
            found = []
            for weight in weights:
                rows = np.arange(len(units)).repeat(weight[units].astype(np.int64))
                found.append([[self._value(rows[side[rows]]) for side in sides] for sides in (inside, ~inside)])
            return np.moveaxis(np.array(found), 0, 2)

        return evaluate

    def _value(self, rows: np.ndarray) -> float:
        if not len(rows):
            return np.nan
        predictions, references = self.items.predictions, self.items.references
        value = self.metric(predictions[rows], None if references is None else references[rows])
        try:
            number = float(value)
        except TypeError:
            raise ValueError(f"metrics[{self.name!r}] returned {value!r}; return one number.") from None
        return number if np.isfinite(number) else np.nan


def measures(metrics: str | Sequence[str] | Mapping[str, str | Metric], items: Items) -> dict[str, Sums | Own]:
    """The metrics that were asked for, by the name they have in the report.

    Raises:
        ValueError: unknown ones, or items that they are not defined for.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    named = metrics if isinstance(metrics, Mapping) else {name: name for name in metrics}
    if not named:
        raise ValueError("metrics: there is none; give at least one.")
    return {name: _measure(name, metric, items) for name, metric in named.items()}


def _measure(name: str, metric: Any, items: Items) -> Sums | Own:
    if callable(metric):
        return Own(name, items, metric)
    if metric not in BUILT_IN:
        raise ValueError(
            f"metrics: {metric!r} is none of {', '.join(BUILT_IN)}; give a mapping of a name to a function of predictions and references."
        )
    if metric == "mean":
        return _mean(_scores(items))
    if items.references is None:
        raise ValueError(f"references=None: {metric} needs them.")
    if metric in ("accuracy", "error_rate", "f1"):
        predictions, references = _classes(items.predictions, "predictions"), _classes(items.references, "references")
        kinds = {predictions.dtype.kind, references.dtype.kind}
        if "O" in kinds:  # such as a missing answer among numbers
            predictions, references = predictions.astype(str), references.astype(str)
        elif "U" in kinds and len(kinds) > 1:
            raise ValueError(
                f"predictions of {predictions.dtype} and references of {references.dtype} are never equal; give both as text or both as numbers."
            )
        if metric == "f1":
            return _macro_f1(predictions, references)
        return _mean(((predictions == references) == (metric == "accuracy")).astype(np.float64))
    probabilities, references = _probabilities(items)
    if metric == "ece":
        return _ece(probabilities, references)
    of_reference = probabilities[np.arange(len(references)), references]
    if metric == "brier":
        return _mean((probabilities**2).sum(1) - 2 * of_reference + 1)
    if not of_reference.all():
        row = int(np.flatnonzero(of_reference == 0)[0])
        raise ValueError(
            f"probabilities: row {row} gives its reference 0, and nll is infinite; compute them in float32 or more, or clip them."
        )
    return _mean(-np.log(of_reference))


def _mean(scores: np.ndarray) -> Sums:
    every, one = np.zeros(len(scores), dtype=np.int64), np.ones(len(scores))
    return Sums(((every, scores), (every + 1, one)), 2, lambda sums: sums[:, 0] / sums[:, 1], scores)


def _macro_f1(predictions: np.ndarray, references: np.ndarray) -> Sums:
    """Mean F1 of the classes that are predicted or right at least once in the group."""
    _, codes = np.unique(np.concatenate([predictions, references]), return_inverse=True)
    predicted, right = codes.reshape(2, -1)
    one, n = np.ones(len(right)), int(codes.max()) + 1

    def finish(sums: np.ndarray) -> np.ndarray:
        twice_hits, found = sums[:, :n], sums[:, n:]
        present = found > 0
        return np.divide(twice_hits, found, where=present, out=np.zeros_like(found)).sum(1) / present.sum(1)

    terms = ((right, 2.0 * (predicted == right)), (n + predicted, one), (n + right, one))
    return Sums(terms, 2 * n, finish, bounds=(0, 1))


def _ece(probabilities: np.ndarray, references: np.ndarray) -> Sums:
    """As [`hf_ext.metrics.calibration.ece`], with 15 bins."""
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == references
    bins = np.searchsorted(np.linspace(0, 1, _BINS + 1)[1:-1], confidence)
    counter = np.full(len(bins), _BINS)
    terms = ((bins, confidence - correct), (counter, np.ones(len(bins))))
    return Sums(
        terms, _BINS + 1, lambda sums: np.abs(sums[:, :-1]).sum(1) / sums[:, -1], bounds=(0, 1), overestimates=True
    )


def _scores(items: Items) -> np.ndarray:
    if items.references is not None:
        raise ValueError("metrics='mean' is the mean of predictions that are scores; give references=None.")
    scores = items.predictions
    if scores.ndim != 1 or scores.dtype.kind not in "biuf":
        raise ValueError(f"predictions of shape {scores.shape} and {scores.dtype}: give one score for each item.")
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"predictions: row {row} is {scores[row]}; leave such items out, and say so on the card.")
    return scores.astype(np.float64)


def _classes(values: np.ndarray, name: str) -> np.ndarray:
    if values.ndim != 1:
        raise ValueError(f"{name} of shape {values.shape}: give one class for each item, such as the argmax.")
    if values.dtype.kind == "f" and (odd := np.flatnonzero(values != np.floor(values))).size:
        raise ValueError(f"{name}: row {int(odd[0])} is {values[odd[0]]}, which is no class; give text or integers.")
    return values


def _probabilities(items: Items) -> tuple[np.ndarray, np.ndarray]:
    probabilities, references = items.probabilities, items.references
    assert references is not None
    if probabilities is None:
        raise ValueError("probabilities=None: ece, brier and nll need them, (N, C).")
    if probabilities.ndim != 2 or probabilities.dtype.kind not in "biuf":
        raise ValueError(
            f"probabilities of shape {probabilities.shape} and {probabilities.dtype}: give (N, C) numbers."
        )
    wrong = ~((probabilities >= 0).all(1) & (np.abs(probabilities.sum(1, dtype=np.float64) - 1) <= 1e-2))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"probabilities: row {row} adds up to {probabilities[row].sum():.4g} or has a negative number; give a softmax."
        )
    classes = probabilities.shape[1]
    if references.dtype.kind not in "iu" or references.ndim != 1:
        raise ValueError(f"references of shape {references.shape} and {references.dtype}: give the index of a class.")
    if (outside := np.flatnonzero((references < 0) | (references >= classes))).size:
        row = int(outside[0])
        raise ValueError(
            f"references: row {row} is {references[row]}, and probabilities have {classes} classes from 0."
        )
    return probabilities.astype(np.float64), references


def as_array(values: Any, name: str) -> np.ndarray:
    """An array of rows; of Python objects where they are no numbers or texts, or differ in length."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, str):
        raise ValueError(f"{name}={values!r} is a text; give one for each item.")
    rows = list(values)
    try:
        return np.array(rows)
    except ValueError:  # rows of different lengths
        array = np.empty(len(rows), dtype=object)
        array[:] = rows
        return array
