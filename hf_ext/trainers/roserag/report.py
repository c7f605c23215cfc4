"""What became of the questions while preference data were built."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

REASONS = {
    "pair": "made a pair",
    "no_correct": "dropped: no candidate was right",
    "no_incorrect": "dropped: no candidate was wrong",
    "failed": "failed, to be tried again by the next `build`",
    "too_long": "dropped: prompt and response do not fit into the model",
    "no_passages": "dropped: nothing was retrieved",
    "no_condition": "left out: too few passages for a condition of noise",
}


@dataclass
class BuildReport:
    """Counts of a build.

    "Without an answer" are responses without an answer line, and hinted ones without reasoning; they are no candidates.

    Attributes:
        outcomes: questions by outcome, see `REASONS`.
        candidates: (written by the hinted prompt, or without the hint) -> responses written, accepted, without an answer, refusals left out.
        failures: id of a question -> why no response could be had.
        settings: of the build.
        seconds: of this run.
        reused: results of stages that were there already.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    candidates: dict[str, Counter[str]] = field(default_factory=lambda: {"hinted": Counter(), "unhinted": Counter()})
    failures: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    reused: int = 0

    @property
    def questions(self) -> int:
        return sum(self.outcomes.values())

    def acceptance(self, source: str) -> float:
        """Share of the responses of "hinted" or "unhinted" prompts that were right."""
        counts = self.candidates[source]
        return counts["accepted"] / counts["written"] if counts["written"] else 0.0

    def table(self) -> str:
        """Markdown."""
        lines = ["| questions | number |", "| --- | --- |"]
        lines += [f"| {text} | {self.outcomes[name]} |" for name, text in REASONS.items() if self.outcomes[name]]
        lines += [
            "",
            "| responses | written | right | without an answer | refusals left out |",
            "| --- | --- | --- | --- | --- |",
        ]
        for source, counts in self.candidates.items():
            if counts["written"]:
                right = f"{counts['accepted']} ({self.acceptance(source):.0%})"
                lines.append(
                    f"| {source} | {counts['written']} | {right} | {counts['unanswered']} | {counts['refusals']} |"
                )
        return "\n".join(lines)

    def advice(self) -> str:
        """What to change if no question made a pair."""
        counts = {name: number for name, number in self.outcomes.items() if number}
        named = {
            "too_long": "give fewer or shorter passages",
            "no_passages": "look at what the retriever finds",
            "no_condition": "give questions with more passages, or other conditions",
            "failed": "see `report.failures`, and call build again",
        }
        most = max(counts, key=lambda name: counts[name], default="")
        if most in named:
            remedy = named[most]
        elif most == "no_correct":
            remedy = "raise n_hinted or n_unhinted, give better passages, or take match='contains'"
        else:
            remedy = "raise n_unhinted or the temperature, or add distractors with noise="
        return f"no question made a pair ({counts}): {remedy}."

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {
            "outcomes": dict(self.outcomes),
            "candidates": {source: dict(counts) for source, counts in self.candidates.items()},
            "failures": self.failures,
            "settings": self.settings,
            "seconds": self.seconds,
            "reused": self.reused,
        }
