"""What became of the questions while preference data were built."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BUILT = "Preference pairs built with hf_ext: "

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
    _started: float = field(default_factory=time.perf_counter, repr=False, compare=False)

    def finish(self) -> None:
        """Note how long the build took."""
        self.seconds = time.perf_counter() - self._started

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

    def description(self) -> str:
        """For the dataset itself, which keeps it through `map` and `save_to_disk`."""
        told = {
            name: value for name, value in self.to_dict().items() if name in ("outcomes", "candidates", "settings")
        }
        return _BUILT + json.dumps(told, ensure_ascii=False)

    @classmethod
    def from_description(cls, text: str | None) -> BuildReport | None:
        """The report of a dataset that was built here; None of any other."""
        if not text or not text.startswith(_BUILT):
            return None
        told = json.loads(text.removeprefix(_BUILT))
        candidates = {source: Counter(counts) for source, counts in told["candidates"].items()}
        return cls(Counter(told["outcomes"]), candidates, settings=told["settings"])

    def sentences(self) -> tuple[str, ...]:
        """How the pairs were made, for model cards; without the folders that models were in."""
        chosen, drawn = self.settings, self.settings["sampling"]
        writer, scorer = (
            Path(chosen[role]).name if Path(chosen[role]).is_absolute() else chosen[role]
            for role in ("writer", "scorer")
        )
        lost = [
            f"{text.removeprefix('dropped: ')}: {self.outcomes[name]:,}"
            for name, text in REASONS.items()
            if self.outcomes[name]
        ]
        accepted = [
            f"{counts['accepted']:,} of {counts['written']:,} {source} responses were right"
            for source, counts in self.candidates.items()
            if counts["written"]
        ]
        return (
            f"Preference pairs by `RoseRAGDatasetBuilder` from {self.questions:,} questions ({'; '.join(lost)}).",
            f"Responses by `{writer}` at temperature {drawn['temperature']:g} and top_p {drawn['top_p']:g}, at most {drawn['max_new_tokens']} tokens: "
            f"{chosen['n_hinted']} per question with the answer known, {chosen['n_unhinted']} without; {'; '.join(accepted)} (match: {chosen['match']}).",
            f"Selection `{chosen['selection']}` by the {chosen['selection_score']} of log-probabilities under `{scorer}`.",
        )

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
