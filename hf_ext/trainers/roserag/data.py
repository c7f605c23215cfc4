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
        for example in examples:
            # Streams are not read before.
            _check_margin(example[self._column], self._column)
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
            _check_margin(value, f"{name} dataset, row {row}: {column}")


def _check_margin(value: Any, where: str) -> None:
    number = value.item() if isinstance(value, torch.Tensor) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError(f"{where}={value!r} is no finite number.")


def check_prompts(dataset: Dataset, prepared: Dataset, max_length: int | None, name: str) -> None:
    """Say how many rows `DPOTrainer` dropped because their prompt leaves no room for a response, and how many responses it will cut.

    Raises:
        ValueError: all of them are dropped.
    """
    if max_length is not None and len(prepared):
        columns = [[len(ids) for ids in prepared[side]] for side in ("prompt_ids", "chosen_ids", "rejected_ids")]
        cut = sum(prompt + max(sides) > max_length for prompt, *sides in zip(*columns, strict=True))
        if cut:
            logger.warning(
                "%s dataset: prompt and response of %d of %d rows are longer than max_length=%d and are cut, which takes the answer away: raise it.",
                name,
                cut,
                len(prepared),
                max_length,
            )
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
