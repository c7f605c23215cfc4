"""`UnlearningReport`: the results as a table, JSON and a plot."""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_ext._lazy import optional_import
from hf_ext.metrics.statistics import short
from hf_ext.metrics.unlearning.compare import LEAKS
from hf_ext.metrics.unlearning.logs import Log, Logs, curve_of, log_ratios

_FORMAT_VERSION = 1
_HEADLINE = ("forget_quality", "model_utility")


@dataclass(frozen=True)
class UnlearningReport:
    """What `evaluate_unlearning` found: forgetting, utility, memorisation, privacy and attacks, with intervals and the retrained model beside.

    Attributes:
        settings: format, decoding, seed, attacks, and a digest of the rows of each split.
        logs: metric -> {"agg_value", "value_by_index", ...} as in the logs of OpenUnlearning, with a 95 % bootstrap
            `interval` over rows. What could not be measured has the value None and a `reason`.
        retrained: the same of the retrained model, without most values by index; empty if there is none.
        findings: sentences about what the numbers do not show at first sight.
    """

    settings: dict[str, Any]
    logs: Logs
    retrained: Logs = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float]:
        """Metric -> value, of all that could be measured."""
        return {name: log["agg_value"] for name, log in self.logs.items() if log["agg_value"] is not None}

    @property
    def arguments(self) -> dict[str, dict[str, Any]]:
        """Rows behind each metric, and its interval where there is one; for model cards."""
        found = {}
        for name in self.metrics:
            log = self.logs[name]
            interval = short(log["interval"]) if "interval" in log else None
            found[name] = {"n": rows_of(log) or self.settings["rows"]["forget"]["rows"]} | (
                {"ci95": interval} if interval else {}
            )
        return found

    @property
    def uncertainty_note(self) -> str:
        """For model cards."""
        return "Intervals are 95 % bootstrap intervals over rows; forget quality is a p-value and falls with the rows."

    def table(self) -> str:
        """Markdown: forget quality and utility in one row, all metrics beside the retrained model's, then attacks."""
        lines = ["| metric | model | retrained | rows | aim |", "|---|---|---|---|---|", self._headline()]
        for name, log in self.logs.items():
            if name not in _HEADLINE and "/" not in name and log["agg_value"] is not None:
                cells = [_cell(log), _cell(self.retrained.get(name)), _count(log), _aim(name)]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        attacks = list(dict.fromkeys(name.rpartition("/")[0] for name in self.logs))
        if len(attacks) > 1:
            lines += ["", f"| attack: model / retrained | {' | '.join(LEAKS)} |", "|---" * (len(LEAKS) + 1) + "|"]
            lines += [f"| {attack or 'none'} | {self._attacked(attack)} |" for attack in attacks]
        lines += ["", "Mean [95 % bootstrap interval over rows]. Forget quality is a p-value and falls with the rows."]
        missing: dict[str, list[str]] = {}
        for name, log in self.logs.items():
            if log["agg_value"] is None:
                missing.setdefault(log["reason"], []).append(name)
        notes = [f"- Not measured: {', '.join(names)} ({reason})." for reason, names in missing.items()]
        notes += [f"- {finding}" for finding in self.findings]
        return "\n".join([*lines, *(["", *notes] if notes else [])])

    def _headline(self) -> str:
        quality, utility = (self.logs[name] for name in _HEADLINE)
        p = (
            f"p = {quality['agg_value']:.2g} (D = {quality['statistic']:.2f})"
            if "p_value" in quality
            else "unavailable"
        )
        beside = f"utility {_cell(self.retrained.get('model_utility'))}" if self.retrained else "–"
        rows = self.settings["rows"]["forget"]["rows"]
        return f"| forget quality · model utility | {p} · utility {_cell(utility)} | {beside} | {rows} | both high |"

    def _attacked(self, attack: str) -> str:
        names = [f"{attack}/{measure}" if attack else measure for measure in LEAKS]
        pairs = [(self.logs.get(name), self.retrained.get(name)) for name in names]
        return " | ".join(" / ".join(_cell(log).partition(" ")[0] for log in pair) for pair in pairs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; each metric is a key of its own, as OpenUnlearning writes and reads it."""
        head = {"format_version": _FORMAT_VERSION, "settings": self.settings, "findings": self.findings}
        return {**head, "retrained": self.retrained, **self.logs}

    def to_json(self, path: str | Path) -> None:
        """Writes `to_dict()` as JSON; a killed process leaves the old file or the new one, never half of it.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {str(path.parent)!r} does not exist; create it first.")
        content = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        # Opened like any other file, so that the mode is the usual one.
        new = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
        try:
            with new.open("x", encoding="utf-8") as file:
                file.write(content)
            if path.exists():
                shutil.copymode(path, new)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    @classmethod
    def from_json(cls, path: str | Path) -> UnlearningReport:
        """What `to_json` wrote.

        Raises:
            ValueError: not a report, or one of another format version.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format_version", None) != _FORMAT_VERSION:
            raise ValueError(
                f"{path} is not an unlearning report of format version {_FORMAT_VERSION}; give a file that to_json() wrote."
            )
        settings, findings, retrained = (content.pop(name) for name in ("settings", "findings", "retrained"))
        return cls(settings, content, retrained, findings)

    def plot(self, path: str | Path) -> None:
        """Draws four panels, in any format matplotlib writes: knowledge, truth ratios, membership and relearning."""
        figure = optional_import("matplotlib.figure", "unlearning").Figure(figsize=(11, 7.5), layout="constrained")
        panels = figure.subplots(2, 2)
        _bars(panels[0, 0], self, [name for name in self.logs if name.endswith(LEAKS)], "what is still known", None)
        _bars(panels[1, 0], self, [name for name in self.logs if name.startswith("mia_")], "membership (AUC)", 0.5)
        for colour, label, logs in self._models():
            ratios = log_ratios(logs) / math.log(10)
            if ratios.size:
                panels[0, 1].ecdf(ratios, color=colour, label=label)
            curve = curve_of(logs.get("relearning"))
            if curve is not None:
                panels[1, 1].plot(curve.steps, curve.values[curve.measure], marker="o", color=colour, label=label)
                panels[1, 1].set_ylabel(curve.measure)
        quality, utility = (self.logs[name] for name in _HEADLINE)
        panels[0, 1].set(xlabel="log10 truth ratio", ylabel="share of forget rows")
        panels[0, 1].set_title(f"forget quality {_short(quality)}, utility {_short(utility)}")
        panels[1, 1].set(xlabel="relearning steps", title="relearning of unseen forget rows", ylim=(-0.03, 1.03))
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
        figure.savefig(path)

    def _models(self) -> list[tuple[str, str, Logs]]:
        """Colour, label and logs of each model."""
        return [("C0", "model", self.logs), *([("C1", "retrained", self.retrained)] if self.retrained else [])]


def rows_of(log: Log) -> int:
    """Rows behind a value; those of both splits for a membership attack."""
    parts = [log, *(log[split] for split in ("forget", "holdout") if split in log)]
    return sum(len(part.get("value_by_index", ())) for part in parts)


def _count(log: Log) -> str:
    rows = rows_of(log)
    return str(rows) if rows and "steps_to_half" not in log else "–"


def _cell(log: Log | None) -> str:
    if log is None or log.get("agg_value") is None:
        return "–"
    interval = f" [{log['interval'][0]:.3f}, {log['interval'][1]:.3f}]" if "interval" in log else ""
    half = "" if "steps_to_half" not in log else f" (50 % after {_steps(log['steps_to_half'])})"
    p = f" (p = {log['p_value']:.2g})" if "p_value" in log else ""
    return f"{log['agg_value']:.3f}{interval}{half}{p}"


def _steps(steps: float | None) -> str:
    return "more steps" if steps is None else f"{steps:.1f} steps"


def _short(log: Log) -> str:
    return "unavailable" if log["agg_value"] is None else f"{log['agg_value']:.2g}"


def _aim(name: str) -> str:
    if name.startswith("mia_"):
        return "0.5"
    if name in ("privleak", "rel_diff", "relearning_gap", "holdout_truth_ratio"):
        return "0"
    forgotten = ("forget_", "exact_", "extraction_", "verbmem_", "relearning")
    return "as retrained" if name.startswith(forgotten) else "high"


def _bars(panel: Any, report: UnlearningReport, names: Sequence[str], title: str, line: float | None) -> None:
    shown = [name for name in names if report.logs[name]["agg_value"] is not None]
    for offset, (colour, label, logs) in enumerate(report._models()):
        there = [index for index, name in enumerate(shown) if logs.get(name, {}).get("agg_value") is not None]
        values = [logs[shown[index]]["agg_value"] for index in there]
        if values:
            panel.barh([index + 0.4 * offset for index in there], values, height=0.4, color=colour, label=label)
    panel.set_yticks([index + 0.2 for index in range(len(shown))], shown, fontsize=7)
    panel.invert_yaxis()
    panel.set(title=title, xlim=(0, 1))
    if line is not None:
        panel.axvline(line, color="black", linewidth=0.8)
