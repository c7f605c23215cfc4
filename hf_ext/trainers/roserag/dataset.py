"""Preference pairs as a `datasets.Dataset`, in memory or as a folder that is there as a whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk

from hf_ext.trainers.roserag.report import BuildReport

PROVENANCE_FILE = "roserag_build.json"
# Rows of a part, which is all that is in memory at once.
_PART = 1000


def in_memory(pairs: Iterator[dict[str, Any]], options: Mapping[str, Any], report: BuildReport) -> Dataset:
    """All pairs, with the report's description.

    Args:
        pairs: rows; `options` of the chat template, the same for all, are a column if there are any.
        report: of the build, which ends with the last pair.

    Raises:
        ValueError: there is none.
    """
    found = list(pairs)
    if not found:
        raise ValueError(report.advice())
    report.finish()
    data = _dataset(found, options)
    data.info.description = report.description()
    return data


def on_disk(pairs: Iterator[dict[str, Any]], options: Mapping[str, Any], report: BuildReport, target: Path) -> Dataset:
    """The same, written in parts, put together with the report beside it, and renamed to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        parts: list[Dataset] = []
        while part := list(islice(pairs, _PART)):
            folder = Path(scratch) / f"part-{len(parts)}"
            _dataset(part, options).save_to_disk(folder)
            parts.append(load_from_disk(folder))
        if not parts:
            raise ValueError(report.advice())
        report.finish()
        whole = concatenate_datasets(parts)
        whole.info.description = report.description()
        whole.save_to_disk(Path(scratch) / "whole")
        provenance = json.dumps(report.to_dict(), indent=1, ensure_ascii=False) + "\n"
        (Path(scratch) / "whole" / PROVENANCE_FILE).write_text(provenance, encoding="utf-8")
        (Path(scratch) / "whole").rename(target)
    return load_from_disk(target)


def _dataset(pairs: list[dict[str, Any]], options: Mapping[str, Any]) -> Dataset:
    features = _features(conversational=not isinstance(pairs[0]["prompt"], str))
    if options:
        told = Dataset.from_list([{"chat_template_kwargs": dict(options)}])
        features = Features({**told.features, **features})
    return Dataset.from_list(pairs, features=features)


def _features(conversational: bool) -> Features:
    text = Value("string")
    turn = List({"role": text, "content": text}) if conversational else text
    number, candidate = Value("float64"), {"text": text, "answer": text, "source": text, "correct": Value("bool")}
    return Features(
        {
            "prompt": turn,
            "chosen": turn,
            "rejected": turn,
            "margin": number,
            "chosen_score": number,
            "rejected_score": number,
            "question_id": text,
            "n_correct": Value("int64"),
            "n_incorrect": Value("int64"),
            "candidates": List({**candidate, "sum": number, "tokens": Value("int64")}),
        }
    )
