"""What an evaluation of answers found: per condition, with intervals, as a table and as a curve."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_ext._lazy import optional_import
from hf_ext.metrics.statistics import bootstrap_interval, paired_permutation_test, short

SCORES = ("exact_match", "f1", "accuracy", "correct", "refusal", "unanswered", "answer_in_passages")
_TITLES = {
    "exact_match": "exact match",
    "f1": "F1",
    "accuracy": "accuracy",
    "refusal": "refusals",
    "unanswered": "without an answer",
    "answer_in_passages": "answer in passages",
}
_LEVEL = re.compile(r"gold \+ (\d+)")


@dataclass(frozen=True)
class RagReport:
    """Judged answers under every condition, with means and bootstrap intervals.

    Attributes:
        conditions: their names in the order they were asked.
        records: one row per condition and question: `condition`, `id`, `answer`, `rationale` and the scores, 0 to 1.
        settings: how it was measured; reports are comparable only if equal.
    """

    conditions: tuple[str, ...]
    records: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)

    def values(self, condition: str, score: str) -> dict[str, float]:
        """Score of every question asked under a condition.

        Raises:
            ValueError: there is no such condition.
        """
        if condition not in self.conditions:
            raise ValueError(f"condition={condition!r}: choose among {list(self.conditions)}.")
        return {row["id"]: row[score] for row in self.records if row["condition"] == condition}

    def mean(self, condition: str, score: str) -> float:
        """In percent."""
        values = self.values(condition, score)
        return 100 * math.fsum(values.values()) / len(values)

    def interval(self, condition: str, score: str) -> tuple[float, float]:
        """95 % bootstrap interval of the mean over questions, in percent."""
        low, high = bootstrap_interval(list(self.values(condition, score).values()))
        return 100 * low, 100 * high

    @property
    def metrics(self) -> dict[str, float]:
        """Flat dictionary, e.g. `{"exact_match/gold + 4": 41.2}`, in percent; for logging and for model cards."""
        return {
            f"{score}/{condition}": self.mean(condition, score) for condition in self.conditions for score in SCORES
        }

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Questions behind each metric, and its interval in percent; for model cards."""
        return {
            f"{score}/{condition}": {
                "n": len(self.values(condition, score)),
                "ci95": short(self.interval(condition, score)),
            }
            for condition in self.conditions
            for score in SCORES
        }

    @property
    def uncertainty_note(self) -> str:
        """For model cards."""
        return "Intervals are 95 % bootstrap intervals over questions."

    def table(self) -> str:
        """Markdown: one line per condition."""
        head = ["passages", *_TITLES.values(), "words of rationale", "questions"]
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        for condition in self.conditions:
            cells = [condition]
            for score in _TITLES:
                low, high = self.interval(condition, score)
                cells.append(f"{self.mean(condition, score):.1f} [{low:.1f}, {high:.1f}]")
            words = list(self.values(condition, "rationale_words").values())
            lines.append("| " + " | ".join([*cells, f"{math.fsum(words) / len(words):.0f}", str(len(words))]) + " |")
        note = "Percent [95 % bootstrap interval over questions]. Accuracy: a gold answer stands in the answer."
        return "\n".join([*lines, "", note])

    def plot(self, path: str | Path, score: str = "exact_match") -> None:
        """Draw the score over the number of distractors, with its interval, and the other conditions as marks."""
        draw({"": self}, path, score)

    def to_json(self, path: str | Path) -> None:
        """Write the whole report."""
        Path(path).write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> RagReport:
        """What `to_json` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(tuple(content["conditions"]), content["records"], content["settings"])


def draw(reports: Mapping[str, RagReport], path: str | Path, score: str = "exact_match") -> None:
    """One robustness curve per report."""
    pyplot = optional_import("matplotlib.pyplot", "rag")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, report in reports.items():
        levels = {int(found[1]): c for c in report.conditions if (found := _LEVEL.fullmatch(c))}
        numbers = sorted(levels)
        means = [report.mean(levels[n], score) for n in numbers]
        (line,) = axes.plot(numbers, means, marker="o", label=name or None)
        intervals = [report.interval(levels[n], score) for n in numbers]
        lows, highs = [low for low, _ in intervals], [high for _, high in intervals]
        axes.fill_between(numbers, lows, highs, color=line.get_color(), alpha=0.15)
        others = [c for c in report.conditions if c not in levels.values()]
        for place, condition in enumerate(others, start=1):
            at = (max(numbers, default=0) or 1) * (1 + 0.25 * place)
            axes.plot(at, report.mean(condition, score), marker="s", color=line.get_color())
            axes.annotate(condition, (at, 0), rotation=90, xytext=(3, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("distractors beside the gold passages")
    axes.set_ylabel(f"{_TITLES.get(score, score)}, %")
    axes.set_ylim(bottom=0)
    if any(reports):
        axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


@dataclass(frozen=True)
class RagComparison:
    """Reports of several models on the same questions.

    Attributes:
        reports: name -> report; the first is what the others are compared with.
        score: which one.
    """

    reports: Mapping[str, RagReport]
    score: str = "exact_match"

    def difference(self, name: str, condition: str) -> tuple[float, float]:
        """(difference to the first in percentage points, two-sided p of a paired permutation test)."""
        first = next(iter(self.reports.values())).values(condition, self.score)
        other = self.reports[name].values(condition, self.score)
        pairs = [(other[key], first[key]) for key in first]
        ours, theirs = zip(*pairs, strict=True)
        return 100 * (math.fsum(ours) - math.fsum(theirs)) / len(pairs), paired_permutation_test(ours, theirs)

    def table(self) -> str:
        """Markdown: one line per model, one column per condition."""
        first, *others = self.reports
        conditions = self.reports[first].conditions
        lines = [
            "| model | " + " | ".join(conditions) + " |",
            "| " + " | ".join(["---"] * (len(conditions) + 1)) + " |",
            f"| {first} | " + " | ".join(f"{self.reports[first].mean(c, self.score):.1f}" for c in conditions) + " |",
        ]
        for name in others:
            cells = []
            for condition in conditions:
                gain, p = self.difference(name, condition)
                cells.append(f"{self.reports[name].mean(condition, self.score):.1f} ({gain:+.1f}, p {p:.2f})")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        note = f"{_TITLES.get(self.score, self.score)} in percent (difference to {first}, p of a paired permutation test)."
        return "\n".join([*lines, "", note])

    def plot(self, path: str | Path) -> None:
        """Draw all robustness curves."""
        draw(self.reports, path, self.score)


def compare(reports: Mapping[str, RagReport], score: str = "exact_match") -> RagComparison:
    """Several models on the same questions, side by side.

    Raises:
        ValueError: fewer than two reports, or reports that were measured differently.
    """
    if len(reports) < 2:
        raise ValueError(f"reports: {list(reports)}; give at least two.")
    if score not in SCORES:
        raise ValueError(f"score={score!r}: choose among {SCORES}.")
    first_name, first = next(iter(reports.items()))
    for name, report in reports.items():
        same = report.settings == first.settings and report.conditions == first.conditions
        same = same and all(report.values(c, score).keys() == first.values(c, score).keys() for c in first.conditions)
        if not same:
            raise ValueError(
                f"reports {first_name!r} and {name!r} are of other questions, conditions or settings; evaluate both alike."
            )
    return RagComparison(reports, score)
