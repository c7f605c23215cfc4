"""Measured results: the table in the text and the entries of the model index."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Protocol, runtime_checkable

from huggingface_hub import EvalResult

from hf_ext.model_cards.base_model import REPO_ID


class MetricsReport(Protocol):
    """What an evaluator returns, such as `hf_ext.metrics.editing.EditingReport`."""

    @property
    def metrics(self) -> Mapping[str, float]: ...

    def table(self) -> str: ...


@runtime_checkable
class Reporting(Protocol):
    """A trainer that has measured something itself: its card has that if nothing else is given."""

    @property
    def report(self) -> MetricsReport | None: ...


@runtime_checkable
class DataMaker(Protocol):
    """A trainer that knows how its data were made."""

    @property
    def data_notes(self) -> Sequence[str]: ...


@runtime_checkable
class ManyDatasets(Protocol):
    """A report whose metrics are of different data."""

    @property
    def datasets(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class Results:
    """Results of one evaluation.

    Attributes:
        values: metric name, with the protocol it was measured by, to value.
        table: Markdown table.
        dataset: what it was measured on: a Hub id or a name; `None` if nobody said.
        datasets: the same of single metrics.
    """

    values: dict[str, float]
    table: str
    dataset: str | None
    datasets: Mapping[str, str] = field(default_factory=dict)

    def eval_results(self, task_type: str) -> list[EvalResult]:
        """Entries for the model index: finite values only, and only if the data has a name, as the Hub demands."""
        named = ((name, value, self.datasets.get(name, self.dataset)) for name, value in self.values.items())
        return [
            EvalResult(
                task_type=task_type,
                dataset_type=dataset if REPO_ID.fullmatch(dataset) else _slug(dataset),
                dataset_name=dataset,
                metric_type=_slug(name),
                metric_name=name,
                metric_value=value,
            )
            for name, value, dataset in named
            if dataset is not None and math.isfinite(value)
        ]


def read_results(metrics: Mapping[str, float] | MetricsReport | None, dataset: str | None) -> Results | None:
    """Results from a flat dict or a report.

    Raises:
        ValueError: a value is not a number.
    """
    if metrics is None:
        return None
    values = metrics if isinstance(metrics, Mapping) else metrics.metrics
    for name, value in values.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise ValueError(f"metrics[{name!r}]={value!r} is not a number; give a flat dict of name: number.")
    numbers = {name: float(value) for name, value in values.items()}
    table = _table(numbers) if isinstance(metrics, Mapping) else metrics.table()
    datasets = metrics.datasets if isinstance(metrics, ManyDatasets) else {}
    return Results(numbers, table.strip(), dataset, datasets) if numbers else None


def _table(values: dict[str, float]) -> str:
    rows = [f"| {name.replace('|', '/')} | {value:.4g} |" for name, value in values.items()]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
