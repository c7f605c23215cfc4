"""The results that metadata state: what is well formed, and what is not."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from hf_ext.model_cards.rules.yaml_text import told

# The parts of a result by which the Hub groups its metrics.
_GROUPED_BY = (
    ("task", ("type", "name")),
    ("dataset", ("type", "name", "config", "split", "revision")),
    ("source", ("name", "url")),
)


@dataclass(frozen=True)
class Result:
    """One entry under `results`: mappings throughout, with every required key.

    Attributes:
        place: for messages.
        model: number of the entry of the model index.
        metrics: each with a `type` that is text, a `value`, and a `name` that is text if there is one.
    """

    place: str
    model: int
    task: dict[Any, Any]
    dataset: dict[Any, Any]
    source: dict[Any, Any]
    metrics: list[dict[Any, Any]]

    @property
    def group(self) -> Hashable:
        """What the Hub tells results apart by, besides their metrics."""
        parts = {"task": self.task, "dataset": self.dataset, "source": self.source}
        return self.model, tuple(frozen(parts[part].get(key)) for part, keys in _GROUPED_BY for key in keys)


def stated_results(data: dict[Any, Any]) -> tuple[list[Result], list[str]]:
    """The well-formed results under `model-index`, and a sentence for everything else that stands there."""
    index = data.get("model-index")
    results: list[Result] = []
    problems: list[str] = []
    if index is not None and not isinstance(index, list):
        return results, ["model-index must be a list of {name, results: [...]}"]
    for model, entry in enumerate(index or []):
        found = entry.get("results") if isinstance(entry, dict) else None
        if not isinstance(found, list):
            problems.append("model-index must be a list of {name, results: [...]}")
            continue
        if not (isinstance(entry.get("name"), str) and entry["name"]):
            problems.append(f"model-index entry {model} lacks name, which must be text")
        for number, result in enumerate(found):
            place = f"model-index result {number}"
            faults = list(_faults(result))
            problems += [f"{place} {fault}" for fault in faults]
            if not faults:
                metrics = result["metrics"]
                problems += [
                    f"{place} has a metric without type or value, or with a name that is no text"
                    for metric in metrics
                    if not _is_metric(metric)
                ]
                results.append(
                    Result(
                        place,
                        model,
                        result["task"],
                        result["dataset"],
                        result.get("source") or {},
                        [metric for metric in metrics if _is_metric(metric)],
                    )
                )
    return results, problems


def is_finite_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a float can hold."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and -sys.float_info.max <= value <= sys.float_info.max
    )


def frozen(value: Any) -> Hashable:
    """Something that is equal, and hashes equally, where the value is equal."""
    if isinstance(value, dict):
        return "mapping", frozenset((key, frozen(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return "list", tuple(map(frozen, value))
    return ("set", frozenset(value)) if isinstance(value, set) else value


def _faults(result: Any) -> Iterator[str]:
    if not isinstance(result, dict):
        yield f"must be a mapping with task, dataset and metrics, not {told(result)}"
        return
    for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
        entry = result.get(part)
        if not (isinstance(entry, dict) and isinstance(entry.get(key), str) and entry[key]):
            yield f"lacks {part}.{key}, which must be text"
    if not isinstance(result.get("metrics"), list):
        yield f"must give its metrics as a list, not {told(result.get('metrics'))}"
    if not isinstance(result.get("source") or {}, dict):
        yield f"must give its source as {{name, url}}, not {told(result['source'])}"


def _is_metric(metric: Any) -> bool:
    return (
        isinstance(metric, dict)
        and isinstance(metric.get("type"), str)
        and bool(metric["type"])
        and metric.get("value") is not None
        and isinstance(metric.get("name", ""), str)
    )
