"""`GroupReport`: the results as rows, a flat dictionary and a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hf_ext.metrics.disaggregation.measures import HIGHER_IS_BETTER


@dataclass(frozen=True)
class GroupResult:
    """One metric of one group.

    Attributes:
        group: factor -> label; empty for all items.
        n: items in the group.
        metric: its name.
        value: `None` if the group is too small or the metric is not defined in it.
        low, high: interval of the value; `None` if there is none.
        gap: the value less that of all items outside the group; `None` if there are too few.
        gap_low, gap_high: its interval.
        p_value: that the gap is 0, adjusted (Holm) for all tested groups of the metric; `None` if it was not tested.
        note: why something is `None`, or is to be read with care.
    """

    group: dict[str, str]
    n: int
    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    p_value: float | None = None
    note: str = ""

    @property
    def group_name(self) -> str:
        """Such as `language=sw, age=60+`."""
        return ", ".join(f"{factor}={label}" for factor, label in self.group.items()) or "all"

    @property
    def name(self) -> str:
        """Of the metric in this group, such as `accuracy (language=sw)`."""
        return f"{self.metric} ({self.group_name})" if self.group else self.metric


@dataclass(frozen=True)
class GroupReport:
    """Results of all items, of each group and of their combinations.

    Attributes:
        rows: all items first, then groups of one factor, then of combinations.
        factors: factor -> label -> items.
        confidence: of the intervals.
        uncertainty_note: how the intervals were computed, in words.
    """

    rows: tuple[GroupResult, ...]
    factors: Mapping[str, Mapping[str, int]]
    confidence: float
    uncertainty_note: str

    @property
    def metrics(self) -> dict[str, float]:
        """Name of metric and group -> value, for what has one."""
        return {row.name: row.value for row in self.rows if row.value is not None}

    @property
    def arguments(self) -> dict[str, dict]:
        """For the names of [`metrics`]: group, n and interval, as the `args` of an entry in a model index."""
        level = f"ci{100 * self.confidence:g}"
        return {
            row.name: {
                "group": dict(row.group),
                "n": row.n,
                **({} if row.low is None else {level: [row.low, row.high]}),
            }
            for row in self.rows
            if row.value is not None
        }

    def worst(self, metric: str, higher_is_better: bool | None = None) -> GroupResult | None:
        """The group with the worst value, whether or not its gap is significant; `None` if no group is large enough.

        Args:
            higher_is_better: needed for metrics that are not built in, and for means.

        Raises:
            ValueError: the report has no such metric, or it is not known which end is bad.
        """
        known = list(dict.fromkeys(row.metric for row in self.rows))
        if metric not in known:
            raise ValueError(f"metric={metric!r} is not in the report; give one of {', '.join(known)}.")
        better = HIGHER_IS_BETTER.get(metric) if higher_is_better is None else higher_is_better
        if better is None:
            raise ValueError(f"higher_is_better=None: say whether a high {metric} is good (True) or bad (False).")
        found = [(row.value, row) for row in self.rows if row.metric == metric and row.group and row.value is not None]
        return min(found, key=lambda pair: pair[0] if better else -pair[0], default=(None, None))[1]

    def table(self, kind: Literal["unitary", "intersectional"] | None = None) -> str:
        """Markdown, a line per group and metric; empty if there are none.

        Args:
            kind: all items and groups of one factor only, or combinations of factors only; default: both.

        Raises:
            ValueError: another kind.
        """
        if kind not in ("unitary", "intersectional", None):
            raise ValueError(f"kind={kind!r}: give 'unitary', 'intersectional' or None.")
        rows = [row for row in self.rows if kind is None or (len(row.group) > 1) == (kind == "intersectional")]
        header = ["group", "n", "metric", "value", f"{100 * self.confidence:g} % interval", "gap to the rest"]
        lines = [header, ["---"] * len(header), *map(_cells, rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) if rows else ""


def _cells(row: GroupResult) -> list[str]:
    value = row.note if row.value is None else f"{row.value:.4g}"
    gap = "" if row.gap is None else f"{row.gap:+.3g}"
    if row.gap_low is not None:
        gap += f" [{row.gap_low:+.3g}, {row.gap_high:+.3g}]"
    if row.p_value is not None:
        gap += ", p < 0.001" if row.p_value < 0.001 else f", p = {row.p_value:.2g}"
    if row.value is not None and row.note:
        gap += f" ({row.note})" if gap else row.note
    interval = "" if row.low is None else f"{row.low:.4g} to {row.high:.4g}"
    return [_escaped(row.group_name), str(row.n), _escaped(row.metric), value, interval, gap]


def _escaped(label: str) -> str:
    return " ".join(label.replace("|", "\\|").replace("<!--", "&lt;!--").split())
