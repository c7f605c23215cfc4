"""The settings of knowledge editing: one edit at a time, many at once, or one after another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from hf_ext.metrics.editing.evaluator import KnowledgeEditingEvaluator, Predictions
from hf_ext.metrics.editing.records import EditRecord
from hf_ext.metrics.editing.report import FINAL, IMMEDIATE, EditingReport
from hf_ext.metrics.editing.restore import ParameterSnapshot

SETTINGS = ("single", "batch", "sequential")
Editor = Callable[[PreTrainedModel | PeftModel, list[EditRecord]], None]


def run_editing(
    evaluator: KnowledgeEditingEvaluator,
    editor: Editor,
    setting: str = "single",
    *,
    chunk_size: int = 1,
    order_seed: int | None = None,
    eval_every: int | None = None,
    before: Predictions | None = None,
    restore: Callable[[], None] | None = None,
) -> EditingReport:
    """Edits the evaluator's model with `editor` and evaluates it.

    The reference for locality and drift is always the untouched model, predicted once, before the first edit.

    Args:
        evaluator: knows the model and the records.
        editor: `editor(model, records)` edits the model in place; it may train an adapter that the model already has.
        setting: `"single"`: each record is edited into the untouched model, evaluated, and undone. `"batch"`: all records
            in one call of the editor. `"sequential"`: `chunk_size` records per call, one call after another on the same
            model; each record is scored right after its own edit and again after the last one.
        chunk_size: sequential: records per call (larger than 1 is mini-batch editing).
        order_seed: sequential: shuffles the order of the edits; None keeps it.
        eval_every: sequential: adds a point to the report's `curve` after this many edits (rounded up to whole chunks),
            with the scores of all edits made so far.
        before: predictions of the untouched model, if they exist already.
        restore: single: undoes the last edit. By default a snapshot of the trainable parameters (of all, if none is
            trainable) and the buffers is written back bit by bit; see `ParameterSnapshot`.

    Returns:
        The report. After `"batch"` and `"sequential"` the model keeps the edits; after `"single"` it is untouched, also if
        the editor raises.

    Raises:
        ValueError: unknown setting, an option that the setting has no use for, or an edit that cannot be undone.
    """
    _check(setting, chunk_size, order_seed, eval_every, restore)
    before = evaluator.predict() if before is None else before
    if setting == "single":
        report = _single(evaluator, editor, before, restore or ParameterSnapshot(evaluator.model).restore)
    elif setting == "batch":
        editor(evaluator.model, list(evaluator.records))
        report = evaluator.evaluate(before)
    else:
        report = _sequential(evaluator, editor, before, chunk_size, order_seed, eval_every)
    settings = {**report.settings, "setting": setting}
    if setting == "sequential":
        settings |= {"chunk_size": chunk_size, "order_seed": order_seed}
    return EditingReport(settings, report.records, report.drift, report.curve)


def _single(
    evaluator: KnowledgeEditingEvaluator, editor: Editor, before: Predictions, restore: Callable[[], None]
) -> EditingReport:
    rows = []
    settings: dict[str, Any] = {}
    for record in evaluator.records:
        try:
            editor(evaluator.model, [record])
            alone = evaluator.evaluate(before, records=[record.id])
        finally:
            restore()
        settings, row = alone.settings, alone.records[0]
        # Each edit is a model of its own, so its drift on the texts is a value of the edit.
        for name, measured in alone.drift.items():
            weighted = sum(v * w for v, w in zip(measured["values"], measured["weights"], strict=True))
            row["drift"] = {**row.get("drift", {}), name: weighted / sum(measured["weights"])}
        rows.append(row)
    return EditingReport(settings, rows)


def _sequential(
    evaluator: KnowledgeEditingEvaluator,
    editor: Editor,
    before: Predictions,
    chunk_size: int,
    order_seed: int | None,
    eval_every: int | None,
) -> EditingReport:
    records = list(evaluator.records)
    if order_seed is not None:
        random.Random(order_seed).shuffle(records)
    immediate: dict[str, dict[str, Any]] = {}
    curve: list[dict[str, Any]] = []
    for start in range(0, len(records), chunk_size):
        chunk = records[start : start + chunk_size]
        editor(evaluator.model, chunk)
        report = evaluator.evaluate(before, records=[record.id for record in chunk], drift=False)
        immediate |= {row["id"]: row["scores"][FINAL] for row in report.records}
        done = start + len(chunk)
        if eval_every is not None and done // eval_every > start // eval_every and done < len(records):
            curve.append(_point(evaluator.evaluate(before, records=[record.id for record in records[:done]])))
    final = evaluator.evaluate(before)
    for row in final.records:
        row["scores"][IMMEDIATE] = immediate[row["id"]]
    if eval_every is not None:
        curve.append(_point(final))
    return EditingReport(final.settings, final.records, final.drift, curve)


def _point(report: EditingReport) -> dict[str, Any]:
    """Final scores over the edits made so far."""
    scores = {item.name: item.value for item in report.measurements if item.stage == FINAL}
    return {"edits": len(report.records), **scores}


def _check(setting: str, chunk_size: int, order_seed: int | None, eval_every: int | None, restore: object) -> None:
    if setting not in SETTINGS:
        raise ValueError(f"setting={setting!r}: choose one of {list(SETTINGS)}.")
    for name, value in (("chunk_size", chunk_size), ("eval_every", eval_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: give at least 1.")
    sequential_only = {"chunk_size": chunk_size != 1, "order_seed": order_seed is not None, "eval_every": eval_every}
    unused: Sequence[str] = [name for name, given in sequential_only.items() if given and setting != "sequential"]
    unused = [*unused, *(["restore"] if restore is not None and setting != "single" else [])]
    if unused:
        raise ValueError(f"{unused} has no meaning in setting={setting!r}; leave it out.")
