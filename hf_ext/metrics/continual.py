"""What a model keeps while it learns one task after another: the task matrix and its metrics.

R[i][j] is the score on task j after task i was learnt, T the number of tasks, b[j] the score of the model before the first
task, s[j] that of a model which learnt task j alone. In the standard convention

    average accuracy            mean_j R[T-1][j]
    learning accuracy           mean_j R[j][j]
    average anytime accuracy    mean_t mean_{j<=t} R[t][j]
    backward transfer           mean_{j<T-1} (R[T-1][j] - R[j][j])                          negative: forgetting
    forgetting                  mean_{j<T-1} (max_{j<=l<T-1} R[l][j] - R[T-1][j])
    forward transfer, zero shot mean_{j>=1} (R[j-1][j] - b[j])
    forward transfer, alone     mean_{j>=1} (R[j][j] - s[j])

so that average accuracy = learning accuracy + (T-1)/T backward transfer. Papers and their code use others, and a backward
transfer can be compared within one convention only:

    "sapt"      (SAPT, https://huggingface.co/papers/2401.08295) divides the backward transfer by T, and takes the maximum of
                the forgetting over all earlier rows, those before the task was learnt included
    "treelora"  (TreeLoRA) divides by T and counts losses alone: sum_j min(R[T-1][j] - R[j][j], 0) / T

A metric is None where it is not defined (transfer of a single task) or where a score that it needs was not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_ext._lazy import optional_import

CONVENTIONS = ("standard", "sapt", "treelora")
Scores = Sequence[float | None]


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(values) > 0 else None


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


@dataclass(frozen=True)
class TaskMatrix:
    """Scores of a sequence of tasks, all of one kind and scale.

    Attributes:
        tasks: their names in the order of learning.
        scores: R, one row for each task learnt so far, one column for each task; None where nothing was measured.
        before: b, scores before the first task.
        alone: s, scores of models that learnt one task each.
        sizes: test examples of each task, for the micro average.

    Raises:
        ValueError: names that occur twice, a row or column too many or too few, or a score that is not finite.
    """

    tasks: tuple[str, ...]
    scores: tuple[tuple[float | None, ...], ...]
    before: tuple[float | None, ...] | None = None
    alone: tuple[float | None, ...] | None = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "scores", tuple(tuple(row) for row in self.scores))
        twice = sorted({name for name in self.tasks if self.tasks.count(name) > 1})
        if not self.tasks or twice:
            raise ValueError(f"tasks: {twice} occur twice; rename them." if twice else "tasks is empty.")
        if not 1 <= len(self.scores) <= len(self.tasks):
            raise ValueError(f"scores: {len(self.scores)} rows for {len(self.tasks)} tasks; give one per task learnt.")
        rows: dict[str, Any] = {f"scores[{i}]": row for i, row in enumerate(self.scores)}
        given = {"before": self.before, "alone": self.alone, "sizes": self.sizes}
        rows |= {name: row for name, row in given.items() if row is not None}
        for name, row in rows.items():
            if len(row) != len(self.tasks):
                raise ValueError(f"{name} has {len(row)} entries for {len(self.tasks)} tasks; give one for each.")
            wrong = [value for value in row if value is not None and not math.isfinite(value)]
            if wrong:
                raise ValueError(f"{name}: {wrong[0]} is no score; leave out with None what was not measured.")

    # -- metrics -----------------------------------------------------------------------------------------------------

    @property
    def learnt(self) -> int:
        """T: the tasks learnt so far; the metrics are those of this part of the matrix."""
        return len(self.scores)

    @property
    def diagonal(self) -> list[float | None]:
        return [self.scores[j][j] for j in range(self.learnt)]

    @property
    def last(self) -> list[float | None]:
        return list(self.scores[-1][: self.learnt])

    def average_accuracy(self) -> float | None:
        return _mean(self.last)

    def micro_average(self) -> float | None:
        """The average accuracy over test examples instead of tasks; None without `sizes`."""
        if self.sizes is None or any(value is None for value in self.last):
            return None
        sizes = self.sizes[: self.learnt]
        return math.fsum((value or 0.0) * size for value, size in zip(self.last, sizes, strict=True)) / sum(sizes)

    def learning_accuracy(self) -> float | None:
        return _mean(self.diagonal)

    def average_anytime_accuracy(self) -> float | None:
        return _mean([_mean(self.scores[t][: t + 1]) for t in range(self.learnt)])

    def backward_transfer(self, convention: str = "standard") -> float | None:
        """Negative: forgetting. None for a single task."""
        _check(convention)
        changes = [_minus(last, own) for last, own in zip(self.last, self.diagonal, strict=True)][:-1]
        if convention == "treelora":
            changes = [None if change is None else min(change, 0.0) for change in changes]
        mean = _mean(changes)
        return mean if mean is None or convention == "standard" else mean * len(changes) / self.learnt

    def forgetting(self, convention: str = "standard") -> float | None:
        """Best score of each task before the last one minus its score at the end. None for a single task."""
        _check(convention)
        losses = []
        for j in range(self.learnt - 1):
            earlier = [row[j] for row in self.scores[0 if convention == "sapt" else j : self.learnt - 1]]
            # Scores of tasks that are yet to come may be missing.
            known = [value for value in earlier if value is not None]
            whole = len(known) == len(earlier) or (convention == "sapt" and self.scores[j][j] is not None)
            losses.append(_minus(max(known), self.last[j]) if known and whole else None)
        return _mean(losses)

    def forward_transfer(self) -> float | None:
        """Zero shot: what the tasks before it give a task, beyond the model before the first. None without `before`."""
        if self.before is None:
            return None
        return _mean([_minus(self.scores[j - 1][j], self.before[j]) for j in range(1, self.learnt)])

    def forward_transfer_alone(self) -> float | None:
        """How much better a task is learnt after the others than alone. None without `alone`."""
        if self.alone is None:
            return None
        return _mean([_minus(self.scores[j][j], self.alone[j]) for j in range(1, self.learnt)])

    def metrics(self, convention: str = "standard") -> dict[str, float | None]:
        """All metrics by name; those that others define otherwise in `convention`."""
        return {
            "average_accuracy": self.average_accuracy(),
            "micro_average": self.micro_average(),
            "learning_accuracy": self.learning_accuracy(),
            "average_anytime_accuracy": self.average_anytime_accuracy(),
            "backward_transfer": self.backward_transfer(convention),
            "forgetting": self.forgetting(convention),
            "forward_transfer": self.forward_transfer(),
            "forward_transfer_alone": self.forward_transfer_alone(),
        }

    # -- reports -----------------------------------------------------------------------------------------------------

    def table(self, digits: int = 1) -> str:
        """The matrix as markdown, with a row before the first task if it was measured."""

        def cells(name: str, row: Scores) -> str:
            return "| " + " | ".join([name, *("" if v is None else f"{v:.{digits}f}" for v in row)]) + " |"

        head = "| after | " + " | ".join(self.tasks) + " |"
        rows = [cells("before", self.before)] if self.before is not None else []
        rows += [cells(name, row) for name, row in zip(self.tasks, self.scores, strict=False)]
        return "\n".join([head, "|" + " --- |" * (len(self.tasks) + 1), *rows])

    def plot(self, path: str | Path, title: str | None = None) -> None:
        """A heat map of the matrix, in any format matplotlib writes; a frame marks the task learnt last in each row."""
        figure = optional_import("matplotlib.figure", "continual").Figure(layout="constrained")
        axes = figure.subplots()
        numbers = [[math.nan if value is None else value for value in row] for row in self.scores]
        image = axes.imshow(numbers, cmap="viridis")
        for i, row in enumerate(self.scores):
            for j, value in enumerate(row):
                if value is not None:
                    colour = "white" if image.norm(value) < 0.6 else "black"
                    axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=colour)
            axes.add_patch(
                optional_import("matplotlib.patches", "continual").Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False)
            )
        axes.set_xticks(range(len(self.tasks)), self.tasks, rotation=30, ha="right")
        axes.set_yticks(range(self.learnt), self.tasks[: self.learnt])
        axes.set(xlabel="score on", ylabel="after learning")
        if title is not None:
            axes.set_title(title)
        figure.colorbar(image)
        figure.savefig(path)

    # -- files -------------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TaskMatrix:
        """Undo `to_dict`, also after JSON."""

        def row(name: str) -> Any:
            return None if data.get(name) is None else tuple(data[name])

        return cls(tuple(data["tasks"]), tuple(map(tuple, data["scores"])), row("before"), row("alone"), row("sizes"))

    def to_json(self, path: str | Path) -> None:
        """Write the whole matrix."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> TaskMatrix:
        """What `to_json` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _check(convention: str) -> None:
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r} is unknown: choose one of {', '.join(CONVENTIONS)}.")


@dataclass(frozen=True)
class ContinualReport:
    """A task matrix as model cards take it.

    Attributes:
        matrix: scores in percent.
        notes: sentences below the tables.
    """

    matrix: TaskMatrix
    notes: tuple[str, ...] = ()

    @property
    def datasets(self) -> dict[str, str]:
        """The task that each metric of a single one is of."""
        return {f"score on {name}": name for name in self.matrix.tasks[: self.matrix.learnt]}

    @property
    def metrics(self) -> dict[str, float]:
        """The last scores of the tasks learnt, and the metrics of the sequence that are defined."""
        scores = zip(self.datasets, self.matrix.last, strict=True)
        named = {name.replace("_", " "): value for name, value in self.matrix.metrics().items()}
        return {name: value for name, value in [*scores, *named.items()] if value is not None}

    @property
    def arguments(self) -> dict[str, dict[str, int]]:
        """Evaluation rows behind each metric, where they are known; for model cards."""
        sizes = self.matrix.sizes
        if sizes is None:
            return {}
        of_tasks = dict(zip(self.datasets, sizes, strict=False))
        return {name: {"n": of_tasks.get(name, sum(sizes))} for name in self.metrics}

    def table(self) -> str:
        """Matrix, metrics, and how to read them, in markdown."""
        rows = [f"| {name} | {value:.1f} |" for name, value in self.metrics.items() if name not in self.datasets]
        told = (
            "Rows are the model after each task, columns what it scores on every task, in percent. Backward transfer is the "
            f"mean change of a task from when it was learnt to the end, over all but the last of {self.matrix.learnt} tasks: "
            "negative is forgetting."
        )
        notes = "\n".join([told, *self.notes])
        return "\n".join([self.matrix.table(), "", "| metric | value |", "| --- | --- |", *rows, "", notes])
