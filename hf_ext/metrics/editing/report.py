"""What an evaluation found: numbers that carry their protocol, answer policy, sample size and interval."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_ext.metrics.editing.scoring import mean, section_score
from hf_ext.metrics.statistics import bootstrap_interval, short

SECTIONS = ("reliability", "generality", "portability", "locality")
FINAL, BEFORE, IMMEDIATE, FORGETTING = "final", "before", "immediate", "forgetting"
_STAGES = (FINAL, BEFORE, IMMEDIATE, FORGETTING)
# Kinds are worth a line of their own only where a section has several.
_KEYED = ("portability", "locality")
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        stage: `"final"` (after all edits), `"before"` (untouched model), `"immediate"` (right after the record's own edit)
            or `"forgetting"` (immediate minus final).
        section: reliability, generality, portability, locality, fluency or drift.
        key: kind within the section, or None for the section as a whole (KnowEdit's aggregation: mean over the kinds of a
            record, then over the records that have the section). With a key: mean over the records that have the kind.
        protocol: how a single answer is judged.
        answer_policy: how several accepted answers count; empty where predictions are compared with predictions.
        value: the mean.
        low, high: 95 % bootstrap interval over edits (over texts for drift).
        n: number of edits (texts) behind it.
    """

    stage: str
    section: str
    key: str | None
    protocol: str
    answer_policy: str
    value: float
    low: float
    high: float
    n: int

    @property
    def name(self) -> str:
        """`[stage/]section[:key]/protocol`; the stage is left out for final scores."""
        return f"{self.place}/{self.protocol}"

    @property
    def place(self) -> str:
        stage = "" if self.stage == FINAL else f"{self.stage}/"
        return stage + self.section + ("" if self.key is None else f":{self.key}")


@dataclass(frozen=True)
class EditingReport:
    """Scores of every edit by metric and protocol, with means, bootstrap intervals and tables.

    Attributes:
        settings: how it was measured: protocols, answer policy, decoding, setting; reports are comparable only if equal.
        records: one JSON-able row per edit: `id`, `scores[stage][protocol][section][key]` (lists over questions),
            `fluency[stage]`, `drift[name]` where measured per edit, and `texts` (prompts with what was generated).
        drift: name -> {"values": mean KL per text, "weights": tokens per text}, for a model evaluated once.
        curve: sequential editing: scores over the edits made so far, after every `eval_every` edits.
    """

    settings: dict[str, Any]
    records: list[dict[str, Any]]
    drift: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)

    @cached_property
    def measurements(self) -> list[Measurement]:
        """Every number of the report with its interval."""
        found = []
        for stage in _STAGES:
            for protocol in self.settings["protocols"]:
                for section, key in self._places(stage, protocol):
                    values = list(self.values(stage, protocol, section, key).values())
                    policy = "" if section == "locality" else self.settings["answer_policy"]
                    found.append(_measurement(stage, section, key, protocol, policy, values))
            fluency = [row["fluency"][stage] for row in self.records if stage in row.get("fluency", {})]
            if fluency:
                found.append(_measurement(stage, "fluency", None, "ngram_entropy", "", fluency))
        return found + list(self._drift_measurements())

    @property
    def metrics(self) -> dict[str, float]:
        """Flat dictionary, e.g. `{"reliability/generate_exact": 0.9}`; for logging and for model cards."""
        return {item.name: item.value for item in self.measurements}

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Edits (texts for drift) behind each metric, and its interval; for model cards."""
        return {item.name: {"n": item.n, "ci95": short((item.low, item.high))} for item in self.measurements}

    @property
    def uncertainty_note(self) -> str:
        """For model cards."""
        return "Intervals are 95 % bootstrap intervals over edits (over texts for drift)."

    def values(self, stage: str, protocol: str, section: str, key: str | None = None) -> dict[str, float]:
        """Score per record id, for the records that have the section (and the kind `key`)."""
        scores = {}
        for row in self.records:
            if stage == FORGETTING:
                immediate, final = (_score(row, name, protocol, section, key) for name in (IMMEDIATE, FINAL))
                value = immediate - final
            else:
                value = _score(row, stage, protocol, section, key)
            if not math.isnan(value):
                scores[row["id"]] = value
        return scores

    def table(self) -> str:
        """Markdown: one line per section, one column per protocol (never averaged together), then drift and fluency."""
        protocols = list(self.settings["protocols"])
        cells: dict[str, dict[str, str]] = {}
        other = []
        for item in self.measurements:
            if item.protocol in protocols:
                cells.setdefault(item.place, {})[item.protocol] = _cell(item)
            else:
                other.append(f"| {item.place} | {item.protocol} | {_cell(item)} |")
        lines = ["| metric | " + " | ".join(protocols) + " |", "|---" * (len(protocols) + 1) + "|"]
        lines += [
            f"| {place} | " + " | ".join(row.get(p, "–") for p in protocols) + " |" for place, row in cells.items()
        ]
        if other:
            lines += ["", "| metric | measure | value |", "|---|---|---|", *other]
        notes = f"Mean [95 % bootstrap interval] (number of edits). Answer policy: {self.settings['answer_policy']}."
        return "\n".join([*lines, "", notes, *(["KL in nats per token."] if other else [])])

    def to_dict(self) -> dict[str, Any]:
        """What `to_json` writes."""
        content = {"format_version": _FORMAT_VERSION, "settings": self.settings, "metrics": self.metrics}
        return content | {"records": self.records, "drift": self.drift, "curve": self.curve}

    def to_json(self, path: str | Path) -> None:
        """Write the whole report."""
        Path(path).write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> EditingReport:
        """What `to_json` wrote.

        Raises:
            ValueError: not a report, or one of another format version.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or content.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"{path} is not an editing report of format version {_FORMAT_VERSION}; give a file that to_json() wrote."
            )
        return cls(content["settings"], content["records"], content["drift"], content["curve"])

    def _places(self, stage: str, protocol: str) -> Iterator[tuple[str, str | None]]:
        source = IMMEDIATE if stage == FORGETTING else stage
        for section in SECTIONS:
            keys: dict[str, None] = {}
            for row in self.records:
                keys |= dict.fromkeys(row["scores"].get(source, {}).get(protocol, {}).get(section, {}))
            if keys:
                yield section, None
            if section in _KEYED:
                yield from ((section, key) for key in keys)

    def _drift_measurements(self) -> Iterator[Measurement]:
        for name, data in self.drift.items():
            yield _measurement(FINAL, "drift", None, name, "", data["values"], data["weights"])
        per_edit: dict[str, list[float]] = {}
        for row in self.records:
            for name, value in row.get("drift", {}).items():
                per_edit.setdefault(name, []).append(value)
        for name, values in per_edit.items():
            yield _measurement(FINAL, "drift", None, name, "", values)


def _score(row: Mapping[str, Any], stage: str, protocol: str, section: str, key: str | None) -> float:
    kinds = row["scores"].get(stage, {}).get(protocol, {}).get(section, {})
    if key is not None:
        return mean(kinds.get(key, []))
    return section_score(kinds)


def _measurement(stage, section, key, protocol, policy, values, weights=None) -> Measurement:
    weights = [1.0] * len(values) if weights is None else weights
    value = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)
    low, high = bootstrap_interval(values, weights)
    return Measurement(stage, section, key, protocol, policy, value, low, high, len(values))


def _cell(item: Measurement) -> str:
    return f"{item.value:.3f} [{item.low:.3f}, {item.high:.3f}] ({item.n})"
