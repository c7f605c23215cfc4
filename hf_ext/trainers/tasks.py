"""The tasks of a sequence: `ContinualTask`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset


@dataclass(frozen=True)
class ContinualTask:
    """One task of a sequence: what it is trained on, and what its score is measured on.

    Attributes:
        name: unique in the sequence.
        train: a dataset as `SFTTrainer` takes it.
        eval: the same, to be scored after every task; without one the task has no score.
        options: the answers among which a model chooses, all that `completion` may be. The score is then the share of rows
            whose completion is the most probable option, in percent; otherwise it is the mean share of answer tokens that are the
            most probable ones, in percent.
    """

    name: str
    train: Dataset
    eval: Dataset | None = None
    options: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"task {self.name!r}: use letters, digits, '.', '-' and '_', since it names a folder.")
        if self.options is not None:
            object.__setattr__(self, "options", tuple(self.options))
        for split, data in (("train", self.train), ("eval", self.eval)):
            if split == "eval" and data is None:
                continue
            if not isinstance(data, Dataset):
                raise TypeError(f"task {self.name!r}: {split} is a {type(data).__name__}; give a datasets.Dataset.")
            if not len(data):
                raise ValueError(f"task {self.name!r} has no {split} rows: give at least one.")
        self._check_options()

    def _check_options(self) -> None:
        if self.options is None or self.eval is None:
            return
        if len(set(self.options)) < max(len(self.options), 2):
            raise ValueError(f"task {self.name!r}: options={self.options!r}: give at least two different answers.")
        if not {"prompt", "completion"} <= set(self.eval.column_names):
            raise ValueError(f"task {self.name!r}: with options, eval needs the columns `prompt` and `completion`.")
        for row, completion in enumerate(self.eval["completion"]):
            if completion not in self.options:
                raise ValueError(
                    f"task {self.name!r}, eval row {row}: the completion {completion!r} is none of the options; they "
                    "must be written alike, white space included."
                )


def read_tasks(tasks: Iterable[ContinualTask] | Mapping[str, Any]) -> list[ContinualTask]:
    """The tasks of a sequence, checked; a mapping has names and training datasets.

    Raises:
        ValueError: no task, or a name that occurs twice.
        TypeError: something that is no task.
    """
    found = [ContinualTask(n, data) for n, data in tasks.items()] if isinstance(tasks, Mapping) else list(tasks)
    if not found:
        raise ValueError("tasks is empty: give at least one.")
    for task in found:
        if not isinstance(task, ContinualTask):
            raise TypeError(f"tasks: {task!r:.80} is a {type(task).__name__}; give a ContinualTask.")
    names = [task.name for task in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: the names {twice} occur twice; each names a folder.")
    return found
