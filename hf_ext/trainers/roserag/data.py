"""Preference data for `RoseRAGTrainer`: a margin for every pair, and prompts that fit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

GAMMA = "gamma"
_MAY_BE_DROPPED = 0.05


class WithGamma:
    """TRL's collator, with text or images, and a margin for every pair.

    Args:
        collator: makes the batch.
        column: of the margins.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], column: str) -> None:
        self._collator, self._column = collator, column

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        margins = torch.tensor([float(example[self._column]) for example in examples])
        return {**self._collator(examples), GAMMA: margins}


def check_margins(dataset: Any, column: str, name: str) -> None:
    """Raises `ValueError` naming the row if the column of margins is missing or has something that is no number."""
    if isinstance(dataset, IterableDataset):
        names = dataset.column_names or list(next(iter(dataset)))
    else:
        names = dataset.column_names
    if column not in names:
        raise ValueError(f"margin_column={column!r}: the {name} dataset has the columns {sorted(names)}.")
    if isinstance(dataset, Dataset):
        for row, value in enumerate(dataset[column]):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} dataset, row {row}: {column}={value!r} is no finite number.")


def check_prompts(dataset: Dataset, prepared: Dataset, max_length: int | None, name: str) -> None:
    """Say how many rows `DPOTrainer` dropped because their prompt leaves no room for a response.

    Raises:
        ValueError: all of them.
    """
    dropped = len(dataset) - len(prepared)
    if not dropped:
        return
    told = f"{name} dataset: the prompts of {dropped} of {len(dataset)} rows fill max_length={max_length}"
    if dropped == len(dataset):
        raise ValueError(f"{told}, and nothing is left: raise max_length, or give fewer passages.")
    if dropped > _MAY_BE_DROPPED * len(dataset):
        logger.warning("%s, and these rows are dropped: raise max_length, or give fewer passages.", told)
    else:
        logger.info("%s, and these rows are dropped.", told)
