"""Two or more methods on the same edits, side by side, with a paired test against the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_ext.metrics.editing.report import FINAL, EditingReport, Measurement
from hf_ext.metrics.statistics import paired_permutation_test


@dataclass(frozen=True)
class ComparedMetric:
    """One final score of all methods.

    Attributes:
        name: name of the measurement, with its protocol.
        measurements: method -> its measurement.
        p_values: method -> two-sided p of the paired sign-flip test against the first method (which has none).
    """

    name: str
    measurements: dict[str, Measurement]
    p_values: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`: `rows`, and `table()` for people."""

    rows: list[ComparedMetric]

    def table(self) -> str:
        """Markdown, one line per metric and protocol; p is the paired test against the first column."""
        methods = list(self.rows[0].measurements)
        lines = [f"| metric | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
        for row in self.rows:
            cells = []
            for method, item in row.measurements.items():
                p = f" p={row.p_values[method]:.3g}" if method in row.p_values else ""
                cells.append(f"{item.value:.3f} [{item.low:.3f}, {item.high:.3f}]{p}")
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
        n = max(item.n for row in self.rows for item in row.measurements.values())
        return "\n".join([*lines, "", f"Mean [95 % bootstrap interval], up to {n} edits; p against {methods[0]}."])


def compare(reports: Mapping[str, EditingReport]) -> Comparison:
    """Compares the final scores of several methods on the same edits.

    Args:
        reports: method name -> report; the first is the baseline of the paired tests.

    Raises:
        ValueError: fewer than two reports, or reports that differ in protocol, answer policy, decoding, setting or edits:
            such numbers measure different things and do not belong into one table.
    """
    if len(reports) < 2:
        raise ValueError(f"reports={list(reports)}: give two or more.")
    (baseline_name, baseline), *others = reports.items()
    for name, report in others:
        _check_alike(baseline_name, baseline, name, report)
    found = {
        name: {item.name: item for item in report.measurements if item.stage == FINAL}
        for name, report in reports.items()
    }
    rows = []
    for metric, first in found[baseline_name].items():
        if not all(metric in measured for measured in found.values()):
            continue
        values = {name: _per_edit(report, first) for name, report in reports.items()}
        p_values = {name: _paired(values[baseline_name], values[name]) for name, _ in others}
        rows.append(ComparedMetric(metric, {name: found[name][metric] for name in reports}, p_values))
    return Comparison(rows)


def _check_alike(name_a: str, a: EditingReport, name_b: str, b: EditingReport) -> None:
    differing = sorted(key for key in {*a.settings, *b.settings} if a.settings.get(key) != b.settings.get(key))
    if differing:
        details = "; ".join(f"{key}: {a.settings.get(key)!r} against {b.settings.get(key)!r}" for key in differing)
        raise ValueError(
            f"reports {name_a!r} and {name_b!r} were measured differently ({details}); evaluate both the same way."
        )
    ids_a, ids_b = ({row["id"] for row in report.records} for report in (a, b))
    if ids_a != ids_b:
        raise ValueError(
            f"reports {name_a!r} and {name_b!r} hold different edits, e.g. {sorted(ids_a ^ ids_b)[:3]}; "
            "a paired comparison needs the same ones."
        )


def _per_edit(report: EditingReport, like: Measurement) -> dict[str, float]:
    """The values behind a measurement: per record id, or per text number for drift of a model evaluated once."""
    if like.section == "fluency":
        return {row["id"]: row["fluency"][FINAL] for row in report.records}
    if like.section == "drift" and like.protocol in report.drift:
        return {str(index): value for index, value in enumerate(report.drift[like.protocol]["values"])}
    if like.section == "drift":
        return {
            row["id"]: row["drift"][like.protocol] for row in report.records if like.protocol in row.get("drift", {})
        }
    return report.values(FINAL, like.protocol, like.section, like.key)


def _paired(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    shared = [key for key in first if key in second]
    return paired_permutation_test([second[key] for key in shared], [first[key] for key in shared])
