"""How far the probabilities of a classifier can be believed, and what is gained by not answering where it is unsure.

Shapes: N rows, C classes. Computed in float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ext._lazy import optional_import
from hf_ext.metrics.statistics import short

_TITLES = {
    "accuracy": "accuracy, %",
    "ece": "ECE, %",
    "adaptive_ece": "ECE, bins of equal size, %",
    "nll": "NLL",
    "brier": "Brier",
    "auroc": "AUROC of errors, %",
    "aurc": "risk under all coverages, %",
}
_PERCENT = {"accuracy", "ece", "adaptive_ece", "auroc", "aurc"}
_TEMPERATURES = (1e-2, 1e2)


def nll(probs: Tensor, labels: Tensor) -> float:
    """Mean negative log-probability of the labels in nats; infinite where a label has probability 0.

    Args:
        probs: `(N, C)`.
        labels: `(N,)` of integers.
    """
    return float(-probs.double().gather(1, labels[:, None]).log().mean())


def brier(probs: Tensor, labels: Tensor) -> float:
    """Mean squared distance between the probabilities and the one-hot labels, summed over classes: from 0 to 2."""
    target_NC = torch.nn.functional.one_hot(labels, probs.shape[1])
    return float((probs.double() - target_NC).square().sum(1).mean())


def reliability(
    confidence: Tensor, correct: Tensor, n_bins: int = 15, adaptive: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, mean confidence and share of right predictions, bin by bin: what a reliability diagram shows.

    Args:
        confidence: `(N,)`, probability of the predicted class.
        correct: `(N,)`, whether it is the label.
        n_bins: K, the number of bins.
        adaptive: bins between quantiles of the confidence, so that each holds about N / K rows; equal values share a bin. Otherwise the
            bins are `((k - 1) / K, k / K]`.

    Returns:
        Rows, mean confidence and share of correct rows of each bin, `(K,)` each; NaN in bins without rows.
    """
    confidence, correct = confidence.double(), correct.double()
    edges = torch.linspace(0, 1, n_bins + 1, dtype=torch.float64, device=confidence.device)[1:-1]
    if adaptive:
        # k N / K rounded up, in whole numbers: 2 / 3 * 9 is more than 6.
        upto = (torch.arange(1, n_bins, device=confidence.device) * len(confidence) + n_bins - 1) // n_bins
        edges = confidence.sort().values[upto - 1]
    bins = torch.bucketize(confidence, edges)
    rows, sums, hits = (
        edges.new_zeros(n_bins).index_add(0, bins, value)
        for value in (torch.ones_like(confidence), confidence, correct)
    )
    return rows, sums / rows, hits / rows


def ece(probs: Tensor, labels: Tensor, n_bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error (https://huggingface.co/papers/1706.04599, eq. 3): by how much confidence and accuracy differ in a bin, in the
    mean over rows, from 0 to 1.

    Args:
        probs: `(N, C)`.
        labels: `(N,)`.
        n_bins, adaptive: see [`reliability`].
    """
    confidence, predicted = probs.max(1)
    rows, mean, share = reliability(confidence, predicted == labels, n_bins, adaptive)
    return float(((mean - share).abs() * rows).nansum() / rows.sum())


def auroc(score: Tensor, positive: Tensor) -> float:
    """Probability that a positive row has a higher score than a negative one; ties count half. NaN without rows of both kinds.

    Args:
        score: `(N,)`, e.g. an uncertainty.
        positive: `(N,)`, e.g. whether the prediction is wrong.
    """
    ones, zeros = score[positive].double(), score[~positive].double().sort().values
    below = torch.searchsorted(zeros, ones) + torch.searchsorted(zeros, ones, right=True)
    return float(below.double().mean() / (2 * len(zeros))) if len(ones) and len(zeros) else math.nan


def risk_coverage(uncertainty: Tensor, wrong: Tensor) -> Tensor:
    """Share of errors among the 1, 2, ... N rows of least uncertainty: `(N,)`. Rows of equal uncertainty come in as their mean.

    Its mean is the area under the curve of risk over coverage (https://huggingface.co/papers/1805.08206).

    Args:
        uncertainty: `(N,)`.
        wrong: `(N,)`.
    """
    _, group, sizes = uncertainty.double().unique(return_inverse=True, return_counts=True)
    errors = wrong.new_zeros(len(sizes), dtype=torch.float64).index_add(0, group, wrong.double())
    expected_N = (errors / sizes).repeat_interleave(sizes)
    return expected_N.cumsum(0) / torch.arange(1, len(expected_N) + 1, device=group.device)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the NLL of `softmax(logits / T)` (https://huggingface.co/papers/1706.04599, eq. 9), from 0.01 to 100.

    The NLL is convex in 1 / T, and its slope is found by bisection. Fit it on rows that are not those it is judged on. Of probabilities, give the
    logarithm.

    Args:
        logits: `(N, C)`.
        labels: `(N,)`.

    Raises:
        ValueError: labels without a class, or logits that are not finite.
    """
    _check(logits, labels, "logits")
    logits = logits.double() - logits.double().max(1, keepdim=True).values
    of_label = logits.gather(1, labels[:, None]).mean()

    def slope(inverse: float) -> float:
        expected = (torch.softmax(logits * inverse, 1) * logits).sum(1).mean()
        return float(expected - of_label)

    low, high = (math.log(1 / temperature) for temperature in reversed(_TEMPERATURES))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(math.exp(middle)) > 0 else (middle, high)
    return math.exp(-high)


def _check(values: Tensor, labels: Tensor, name: str) -> None:
    """
    Raises:
        ValueError: they are not what the metrics are defined for.
    """
    if values.ndim != 2 or not len(values):
        raise ValueError(
            f"{name} of shape {tuple(values.shape)}: give one row of classes for each of at least one label."
        )
    if labels.shape != values.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {len(values)} rows of {name}: give one for each.")
    if (outside := ((labels < 0) | (labels >= values.shape[1])).nonzero()).numel():
        row = int(outside[0])
        raise ValueError(f"labels: row {row} has {int(labels[row])}, and there are {values.shape[1]} classes from 0.")
    if (bad := (~values.isfinite().all(1)).nonzero()).numel():
        raise ValueError(
            f"{name}: row {int(bad[0])} holds a number that is not finite; leave such rows out, and say so."
        )


@dataclass(frozen=True)
class CalibrationReport:
    """Probabilities beside the labels, and everything that is computed from both.

    Attributes:
        probs: `(N, C)`, float64.
        labels: `(N,)`.
        uncertainty: `(N,)`, what abstaining goes by; 1 less the largest probability unless something else was given.
        n_bins: of both calibration errors.
    """

    probs: Tensor
    labels: Tensor
    uncertainty: Tensor
    n_bins: int = 15

    @cached_property
    def wrong(self) -> Tensor:
        """`(N,)`: whether the most likely class is not the label."""
        return self.probs.argmax(1) != self.labels

    @cached_property
    def metrics(self) -> dict[str, float]:
        """`accuracy`, `ece`, `adaptive_ece`, `nll`, `brier`, `auroc` (of errors, by uncertainty) and `aurc`, as fractions or nats."""
        return {
            "accuracy": float((~self.wrong).double().mean()),
            "ece": ece(self.probs, self.labels, self.n_bins),
            "adaptive_ece": ece(self.probs, self.labels, self.n_bins, adaptive=True),
            "nll": nll(self.probs, self.labels),
            "brier": brier(self.probs, self.labels),
            "auroc": auroc(self.uncertainty, self.wrong),
            "aurc": float(risk_coverage(self.uncertainty, self.wrong).mean()),
        }

    def _drawn(self, resamples: int, what: Callable[[CalibrationReport], Any]) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(resamples):
            rows = torch.randint(len(self.labels), (len(self.labels),), generator=generator)
            found.append(
                what(CalibrationReport(self.probs[rows], self.labels[rows], self.uncertainty[rows], self.n_bins))
            )
        return found

    def intervals(self, level: float = 0.95, resamples: int = 500) -> dict[str, tuple[float, float]]:
        """Percentile intervals of the metrics, by drawing rows with replacement; the same report gives the same ones."""
        drawn = self._drawn(resamples, lambda report: list(report.metrics.values()))
        values = torch.tensor(drawn, dtype=torch.float64)
        low, high = (values.nanquantile(q, 0).tolist() for q in ((1 - level) / 2, (1 + level) / 2))
        return dict(zip(self.metrics, zip(low, high, strict=True), strict=True))

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Rows behind each metric, and its interval; for model cards."""
        rows = len(self.labels)
        return {name: {"n": rows, "ci95": short(bounds)} for name, bounds in self.intervals().items()}

    @property
    def uncertainty_note(self) -> str:
        """For model cards."""
        return "Intervals are 95 % percentile intervals over rows, from 500 draws with replacement."

    def risk_interval(self, level: float = 0.95, resamples: int = 500) -> tuple[Tensor, Tensor]:
        """Percentile interval of [`risk_coverage`] at every coverage: two of `(N,)`."""
        drawn = torch.stack(self._drawn(resamples, lambda report: risk_coverage(report.uncertainty, report.wrong)))
        low, high = (drawn.quantile(q, 0) for q in ((1 - level) / 2, (1 + level) / 2))
        return low, high

    def table(self) -> str:
        """Markdown: one line per metric, with its interval."""
        lines = ["| metric | value | 95 % interval |", "| --- | --- | --- |"]
        intervals = self.intervals()
        for name, title in _TITLES.items():
            scale, digits = (100, 1) if name in _PERCENT else (1, 3)
            value, low, high = (f"{scale * number:.{digits}f}" for number in (self.metrics[name], *intervals[name]))
            lines.append(f"| {title} | {value} | {low} to {high} |")
        return "\n".join([*lines, "", f"{len(self.labels)} rows; intervals by bootstrap over them."])

    def plot(self, path: str | Path) -> None:
        """Draw the reliability diagram, and risk over coverage with its interval."""
        figure = optional_import("matplotlib.figure", "calibration").Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        rows, mean, share = reliability(self.probs.max(1).values, ~self.wrong, self.n_bins)
        left.plot([0, 1], [0, 1], color="grey", linewidth=1)
        left.scatter(mean, share, s=(200 * rows / rows.sum()).clamp(min=8).tolist())
        left.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        left.set_title(f"ECE {100 * self.metrics['ece']:.1f} %")
        risk = risk_coverage(self.uncertainty, self.wrong)
        coverage = torch.arange(1, len(risk) + 1) / len(risk)
        right.plot(coverage, risk)
        right.fill_between(coverage, *self.risk_interval(), alpha=0.2)
        right.set(xlabel="share answered", ylabel="share of errors", xlim=(0, 1), ylim=(0, None))
        right.set_title(f"AURC {100 * self.metrics['aurc']:.1f} %")
        figure.savefig(path)

    def to_json(self, path: str | Path) -> None:
        """Write the whole report."""
        content = {
            "probs": self.probs.tolist(),
            "labels": self.labels.tolist(),
            "uncertainty": self.uncertainty.tolist(),
            "n_bins": self.n_bins,
        }
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> CalibrationReport:
        """What `to_json` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        probs, uncertainty = (torch.tensor(content[name], dtype=torch.float64) for name in ("probs", "uncertainty"))
        return cls(probs, torch.tensor(content["labels"]), uncertainty, content["n_bins"])


def evaluate_calibration(
    probs: Tensor, labels: Tensor, uncertainty: Tensor | None = None, n_bins: int = 15
) -> CalibrationReport:
    """Judge probabilities `(N, C)` by labels: accuracy, calibration errors, NLL, Brier score, and how well uncertainty finds errors.

    Args:
        probs: `(N, C)`, each row adding up to 1.
        labels: `(N,)` of integers.
        uncertainty: `(N,)`, what abstaining goes by, such as mutual information; default: 1 less the largest probability.
        n_bins: of both calibration errors, at least 1.

    Raises:
        ValueError: shapes that do not match, labels without a class, rows that are no probabilities.
    """
    _check(probs, labels, "probs")
    probs = probs.double()
    off = ((probs < 0).any(1) | ((probs.sum(1) - 1).abs() > 1e-2)).nonzero()
    if off.numel():
        row = int(off[0])
        raise ValueError(
            f"probs: row {row} adds up to {float(probs[row].sum()):.4g} and is not a distribution; give a softmax."
        )
    if n_bins < 1:
        raise ValueError(f"n_bins={n_bins}: give at least 1.")
    if uncertainty is None:
        uncertainty = 1 - probs.max(1).values
    if uncertainty.shape != labels.shape:
        raise ValueError(f"uncertainty of shape {tuple(uncertainty.shape)} for {len(labels)} rows: give one for each.")
    return CalibrationReport(probs.cpu(), labels.cpu(), uncertainty.double().cpu(), n_bins)
