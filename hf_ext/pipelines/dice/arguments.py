"""Arguments that are one for all rows, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_ext.pipelines.dice.noise import Generators

Strength = float | Sequence[float] | Tensor


def strength(name: str, value: Strength, count: int) -> float | Tensor:
    """A number, or a tensor `(B, 1, 1)` or `(B, N, 1)`.

    Raises:
        ValueError: it is negative, not finite, or has another shape.
    """
    found = torch.as_tensor(value, dtype=torch.float32)
    if not (found.isfinite() & (found >= 0)).all():
        raise ValueError(f"{name}={value}: give a finite number >= 0.")
    if found.ndim == 0:
        return float(found)
    if found.ndim > 2 or (found.ndim == 2 and found.shape[1] != count):
        raise ValueError(
            f"{name} has the shape {tuple(found.shape)}; give a number, one for each row, or (B, {count})."
        )
    return found.reshape(len(found), -1, 1)


def common_rows(recorded: int, given: dict[str, Any]) -> int:
    """How many rows there are: those of the trace, or, if it has one, those of the argument that has several.

    Raises:
        ValueError: the numbers of rows do not match.
    """
    counts = {name: len(value) for name, value in given.items() if isinstance(value, list | Tensor)}
    rows = recorded if recorded > 1 else max([1, *counts.values()])
    for name, count in counts.items():
        if count not in (1, rows):
            raise ValueError(f"{name} has {count} rows and there are {rows} in all; give 1 or {rows}.")
    return rows


def row_generators(generator: Any, rows: int) -> Generators:
    """One generator for all rows, or a list with one for each.

    Raises:
        ValueError: there are not as many as rows.
    """
    if not isinstance(generator, list | tuple):
        return generator
    if len(generator) != rows:
        raise ValueError(f"generator has {len(generator)} entries and there are {rows} rows; give one for each.")
    return list(generator)


def per_row(name: str, value: str | Sequence[str | None] | None, rows: int, needed: bool = False) -> list[Any]:
    """One value for each row.

    Args:
        needed: whether None is refused.

    Raises:
        ValueError: there are neither one nor `rows` of them, or some are None.
    """
    given = [value] if value is None or isinstance(value, str) else list(value)
    if not given or len(given) not in (1, rows):
        raise ValueError(f"{name} has {len(given)} entries and there are {rows} rows; give 1 or {rows}.")
    if None in given and (needed or set(given) != {None}):
        raise ValueError(f"{name}={value!r}: give a prompt for every row, '' for an empty one.")
    return given * (rows // len(given))
