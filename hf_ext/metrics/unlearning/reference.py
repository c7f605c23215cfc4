"""Reads the results of a retrained model, our own or those of OpenUnlearning, and refuses what cannot be compared."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_ext.metrics.unlearning.logs import Log, Logs
from hf_ext.metrics.unlearning.rows import Row

# Parts of a saved report that are no measurements of its model alone.
_NO_LOGS = (
    "format_version",
    "settings",
    "findings",
    "retrained",
    "forget_quality",
    "privleak",
    "rel_diff",
    "mia_reference",
    "relearning_gap",
)
# Logs of the forget rows that are read row by row -> the number that is read.
_READ = {"forget_truth_ratio": "score", "forget_Q_A_PARA_Prob": "avg_loss", "forget_Q_A_PERT_Prob": "avg_loss"}


def read_reference(
    retrained: Mapping[str, Any] | str | Path,
    rows: Mapping[str, Sequence[Row]],
    settings: Mapping[str, Any],
) -> Logs:
    """Logs of a retrained model, their rows in the order of the splits.

    Raises:
        ValueError: no such log, one of other questions or settings, or one with a gap.
    """
    content: Any = retrained
    if isinstance(retrained, (str, Path)):
        if not Path(retrained).is_file():
            raise ValueError(
                f"retrained={str(retrained)!r} is no file; pass the path of a report or of a log, or load the model "
                "with AutoModelForCausalLM.from_pretrained and pass that."
            )
        content = json.loads(Path(retrained).read_text(encoding="utf-8"))
    if not isinstance(content, Mapping):
        raise ValueError(f"retrained is {type(content).__name__}; pass a model, a report, or a log of metrics.")
    own = content.get("settings")
    logs = {name: dict(log) for name, log in content.items() if name not in _NO_LOGS and isinstance(log, Mapping)}
    if not logs:
        raise ValueError("retrained holds no metric; pass a report that to_json() wrote, or a TOFU_EVAL.json.")
    for name, log in logs.items():
        # A metric of ours that could not be measured says why.
        if "reason" not in log and "agg_value" in log and not _is_number(log["agg_value"]):
            raise ValueError(
                f"retrained: {name} has the agg_value {log['agg_value']!r}; measure it again, or drop it."
            )
    if own is not None:
        _check_settings(own, settings)
    else:
        # Whose steps nobody knows.
        logs.pop("relearning", None)
    _read_rows(logs, rows)
    if own is None and "forget_truth_ratio" in logs:
        _check_score(logs)
    return logs


def _read_rows(logs: Logs, rows: Mapping[str, Sequence[Row]]) -> None:
    """Brings the rows of all logs that are read by row into the order of the splits, under the ids of the splits."""
    spoken = logs.get("forget_Q_A_ROUGE", {})
    if "value_by_index" in spoken:
        spoken["value_by_index"] = _in_order(spoken, "forget_Q_A_ROUGE", "forget", rows["forget"])
        _check_questions(spoken, rows["forget"])
    for name, field in _READ.items():
        if "value_by_index" in logs.get(name, {}):
            logs[name]["value_by_index"] = _in_order(logs[name], name, "forget", rows["forget"], field)
    membership = logs.get("mia_loss", {})
    for split in ("forget", "holdout"):
        part = membership.get(split, {})
        if split in rows and "value_by_index" in part:
            name = f"mia_loss, part {split!r},"
            membership[split] = {**part, "value_by_index": _in_order(part, name, split, rows[split], "score")}


def _in_order(
    log: Log, name: str, split: str, rows: Sequence[Row], field: str | None = None
) -> dict[str, dict[str, Any]]:
    """Records by row id. OpenUnlearning numbers rows instead, whatever order it writes them in."""
    records = {str(key): record for key, record in log["value_by_index"].items()}
    ids = [row.id for row in rows]
    numbers = [str(index) for index in range(len(rows))]
    if len(records) != len(rows):
        raise ValueError(
            f"retrained was evaluated on other questions: {name} has {len(records)} rows, split {split!r} {len(rows)}; "
            "evaluate the retrained model on the same rows."
        )
    keys = next((keys for keys in (ids, numbers) if set(records) == set(keys)), None)
    if keys is None:
        strange = sorted(set(records) - set(ids), key=lambda key: key in numbers)[0]
        raise ValueError(
            f"retrained was evaluated on other questions: {name} has the row {strange!r}, which is neither an id of "
            f"split {split!r} nor all its rows numbered from 0; evaluate the retrained model on the same rows."
        )
    found = {row_id: records[key] for row_id, key in zip(ids, keys, strict=True)}
    for key, record in zip(keys, found.values(), strict=True) if field is not None else ():
        if not isinstance(record, Mapping) or not all(map(_is_number, _values(record.get(field)))):
            raise ValueError(
                f"retrained: {name} row {key!r} has no number {field!r} in {record!r}; measure it again, or drop {name}."
            )
    lengths = {len(list(_values(record[field]))) for record in found.values()} if field is not None else set()
    if len(lengths) > 1:
        raise ValueError(f"retrained: the rows of {name} have {sorted(lengths)} values of {field!r}; use one number.")
    return found


def _values(value: Any) -> Iterator[Any]:
    """A number as one, a list one by one."""
    yield from value if isinstance(value, list) and value else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _check_questions(log: Log, rows: Sequence[Row]) -> None:
    for row, record in zip(rows, log["value_by_index"].values(), strict=True):
        truth = record.get("ground_truth", row.answer)
        if not isinstance(truth, str) or truth.strip() != row.answer:
            raise ValueError(
                f"retrained was evaluated on other questions: it has the answer {str(truth)[:60]!r} where split "
                f"'forget', row {row.id!r} has {row.answer[:60]!r}; evaluate the retrained model on the same rows in "
                "the same order."
            )


def _check_settings(own: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    for split, mine in settings["rows"].items():
        theirs = own["rows"].get(split, mine)
        if theirs["digest"] != mine["digest"]:
            raise ValueError(
                f"retrained was evaluated on other rows of split {split!r} ({theirs['rows']} rows, here "
                f"{mine['rows']}); evaluate the retrained model on the same rows in the same order."
            )
    for name in ("format", "max_new_tokens", "stop_strings", "seed"):
        if own[name] != settings[name]:
            raise ValueError(
                f"retrained was evaluated with {name}={own[name]!r}, not {settings[name]!r}; use the same."
            )
    for name, options in settings["attacks"].items():
        if own["attacks"].get(name, options) != options:
            raise ValueError(
                f"retrained was attacked with {name}={own['attacks'][name]}, not {options}; use the same."
            )


def _check_score(logs: Logs) -> None:
    """Refuses foreign truth ratios that may be 1/(1+R): such logs use one name for both."""
    if "forget_Q_A_PARA_Prob" in logs and "forget_Q_A_PERT_Prob" in logs:
        return
    if max(record["score"] for record in logs["forget_truth_ratio"]["value_by_index"].values()) <= 1:
        raise ValueError(
            "retrained: every forget_truth_ratio score is at most 1, so it may be P(correct)/(P(correct)+P(wrong)) "
            "instead of the ratio; use a log that also holds forget_Q_A_PARA_Prob and forget_Q_A_PERT_Prob."
        )
