"""From labels to groups: which items belong together."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

NOT_STATED = "not stated"
MAX_GROUPS = 1000


@dataclass(frozen=True)
class Groups:
    """N items in G groups.

    Attributes:
        labels: of each group, factor -> label; the first group has none and holds all items.
        sizes: `(G,)`, items in each.
        of_items: `(N, D)`, the groups of each item: all items, one for each factor, one for each combination of factors.
        factors: factor -> label -> items, in the order of the groups.
    """

    labels: list[dict[str, str]]
    sizes: np.ndarray
    of_items: np.ndarray
    factors: dict[str, dict[str, int]]


def find_groups(factors: Any, n: int, intersections: int) -> Groups:
    """Groups of one factor, and of combinations of up to `intersections` factors, that hold at least one item.

    Raises:
        ValueError: factors of another form or length, or so many labels that one of them seems to be an id.
    """
    columns = {str(name): _labels(str(name), column, n) for name, column in _columns(factors).items()}
    if not columns:
        raise ValueError("factors: there is none; give a mapping of name: labels.")
    names = {name: sorted(set(column), key=_order) for name, column in columns.items()}
    for name, known in names.items():
        if len(known) > MAX_GROUPS:
            raise ValueError(
                f"factors: {name!r} has {len(known)} labels, as an id would; leave it out, or sort its labels into at most {MAX_GROUPS} kinds."
            )
    codes = {name: _codes(columns[name], known) for name, known in names.items()}
    labels: list[dict[str, str]] = [{}]
    sizes, of_items = [n], [np.zeros(n, dtype=np.int64)]
    for chosen in (c for size in range(1, intersections + 1) for c in combinations(names, size)):
        shape = [len(names[name]) for name in chosen]
        cells = np.ravel_multi_index([codes[name] for name in chosen], shape)
        found, of_item, counts = np.unique(cells, return_inverse=True, return_counts=True)
        of_items.append(of_item + len(labels))
        rows = np.stack(np.unravel_index(found, shape), 1).tolist()
        labels += [{name: names[name][code] for name, code in zip(chosen, row, strict=True)} for row in rows]
        sizes += counts.tolist()
        if len(labels) > MAX_GROUPS + 1:
            raise ValueError(
                f"factors: more than {MAX_GROUPS} groups; {max(names, key=lambda name: len(names[name]))!r} has the most labels. "
                f"Leave a factor out, merge labels, or lower intersections={intersections}."
            )
    counted = {name: dict(zip(known, np.bincount(codes[name]).tolist(), strict=True)) for name, known in names.items()}
    return Groups(labels, np.array(sizes), np.stack(of_items, 1), counted)


def _codes(labels: list[str], known: list[str]) -> np.ndarray:
    code = {label: index for index, label in enumerate(known)}
    return np.array([code[label] for label in labels])


def _columns(factors: Any) -> dict[Any, Iterable]:
    # A table of a library exists only where that library has been imported.
    pandas, datasets = sys.modules.get("pandas"), sys.modules.get("datasets")
    if isinstance(factors, Mapping):
        return dict(factors)
    if pandas is not None and isinstance(factors, pandas.DataFrame):
        return {name: factors[name] for name in factors.columns}
    if datasets is not None and isinstance(factors, datasets.Dataset):
        return {name: factors[name] for name in factors.column_names}
    if isinstance(factors, Sequence) and all(isinstance(row, Mapping) for row in factors):
        names = dict.fromkeys(name for row in factors for name in row)
        return {name: [row.get(name) for row in factors] for name in names}
    raise ValueError(
        f"factors of type {type(factors).__name__}: give a mapping of name: labels, a list of dicts, a DataFrame or a Dataset."
    )


def _labels(name: str, column: Any, n: int) -> list[str]:
    if isinstance(column, str):
        raise ValueError(f"factors[{name!r}]={column!r} is a text; give one label for each of the {n} predictions.")
    values = column.tolist() if isinstance(column, Tensor | np.ndarray) else list(column)
    if len(values) != n:
        raise ValueError(f"factors[{name!r}] has {len(values)} labels for {n} predictions; give one for each.")
    missing = [None, sys.modules["pandas"].NA] if "pandas" in sys.modules else [None]
    labels = []
    for row, value in enumerate(values):
        value = value.item() if isinstance(value, np.generic) else value
        if any(value is none for none in missing) or (isinstance(value, float) and math.isnan(value)):
            labels.append(NOT_STATED)
        elif isinstance(value, str | int | float):
            labels.append(str(value))
        else:
            raise ValueError(
                f"factors[{name!r}]: row {row} has {value!r}, a {type(value).__name__}; give text, a number or None."
            )
    return labels


def _order(label: str) -> tuple[int, float, str]:
    """Numbers by size, then text, then what is not stated."""
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if math.isfinite(number):
        return 0, number, label
    return 2 if label == NOT_STATED else 1, 0.0, label
