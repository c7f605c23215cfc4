"""Measured results: the table in the text and the entries of the model index."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import EvalResult

from hf_ext.metrics.disaggregation import GroupReport
from hf_ext.model_cards.facts.base_model import REPO_ID


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


@runtime_checkable
class Certain(Protocol):
    """A report that knows how sure its numbers are: metric name to arguments for the model index, such as `n` and `ci95`."""

    @property
    def arguments(self) -> Mapping[str, Mapping[str, Any]]: ...


@runtime_checkable
class Explained(Protocol):
    """A report that says in sentences how uncertainty was estimated."""

    @property
    def uncertainty_note(self) -> str: ...


@dataclass(frozen=True)
class DatasetName:
    """A data set as cards name it: a Hub id, or any name, and what of it was used."""

    id: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> DatasetName:
        """`"you/probe"`, or `"you/probe@revision"`."""
        name, _, revision = text.partition("@")
        return cls(name, revision=revision) if REPO_ID.fullmatch(name) and revision else cls(text)

    @property
    def on_hub(self) -> bool:
        return bool(REPO_ID.fullmatch(self.id))

    @property
    def words(self) -> str:
        """For the text of a card."""
        name = f"[{self.id}](https://huggingface.co/datasets/{self.id})" if self.on_hub else self.id
        parts = (("configuration", self.config), ("split", self.split), ("revision", self.revision))
        told = ", ".join(f"{word} `{value}`" for word, value in parts if value)
        return f"{name} ({told})" if told else name


@dataclass(frozen=True)
class Results:
    """Results of one evaluation.

    Attributes:
        values: metric name, with the protocol it was measured by, to value.
        table: Markdown table.
        dataset: what it was measured on; `None` if nobody said.
        datasets: the same of single metrics.
        arguments: of single metrics, for the model index: rows, intervals, groups.
        uncertainty: how it was estimated; `None` if the report does not say.
        factors: what the results are broken down by, with the groups and their sizes.
    """

    values: dict[str, float]
    table: str
    dataset: DatasetName | None
    datasets: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    uncertainty: str | None = None
    factors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def eval_results(self, task_type: str) -> list[EvalResult]:
        """Entries for the model index: finite values only, and only if the data has a name, as the Hub demands.

        The Hub keeps the arguments of one data set for all its metrics, so groups are in the name and the arguments of the metric.
        """
        entries = []
        for name, value in self.values.items():
            dataset = DatasetName(self.datasets[name]) if name in self.datasets else self.dataset
            if dataset is None or not math.isfinite(value):
                continue
            entries.append(
                EvalResult(
                    task_type=task_type,
                    dataset_type=dataset.id if dataset.on_hub else _slug(dataset.id),
                    dataset_name=dataset.id,
                    dataset_config=dataset.config,
                    dataset_split=dataset.split,
                    dataset_revision=dataset.revision,
                    metric_type=_slug(name.partition(" (")[0]),
                    metric_name=name,
                    metric_value=value,
                    metric_args=dict(self.arguments[name]) if name in self.arguments else None,
                )
            )
        return entries


def read_results(
    metrics: Mapping[str, float] | MetricsReport | None, dataset: DatasetName | None, rows: int | None = None
) -> Results | None:
    """Results from a flat dict or a report.

    Args:
        rows: how many rows a flat dict was measured on, if that is known.

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
    table = _table(numbers) if isinstance(metrics, Mapping) else _table_of(metrics)
    if not numbers:
        return None
    arguments = metrics.arguments if isinstance(metrics, Certain) else {}
    return Results(
        numbers,
        table.strip(),
        dataset,
        metrics.datasets if isinstance(metrics, ManyDatasets) else {},
        arguments or ({name: {"n": rows} for name in numbers} if rows is not None else {}),
        metrics.uncertainty_note if isinstance(metrics, Explained) else None,
        metrics.factors if isinstance(metrics, GroupReport) else {},
    )


def _table_of(report: MetricsReport) -> str:
    """Groups of one factor and combinations apart, as the model card paper asks for them."""
    if not isinstance(report, GroupReport):
        return report.table()
    parts = {
        "One factor at a time": report.table("unitary"),
        "Combinations of factors": report.table("intersectional"),
    }
    return "\n\n".join(f"#### {heading}\n\n{table}" for heading, table in parts.items() if table)


def _table(values: dict[str, float]) -> str:
    rows = [f"| {' '.join(name.replace('|', '/').split())} | {value:.4g} |" for name, value in values.items()]
    return "\n".join(["| metric | value |", "| --- | --- |", *rows])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
