"""160 questions of HotpotQA and MuSiQue with their passages, out of `benchmarks/data/rag/`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "rag"


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def corpus() -> dict[str, dict[str, str]]:
    """All passages by their id."""
    rows = _lines("passages_hotpotqa.jsonl") + _lines("passages_musique.jsonl")
    return {row["pid"]: {"id": row["pid"], "title": row["title"], "text": row["text"]} for row in rows}


@cache
def questions() -> list[dict[str, Any]]:
    """Rows as the builder and the evaluation take them, with the candidate passages of the original release."""
    rows = []
    for row in _lines("questions.jsonl"):
        documents = [{**corpus()[p["pid"]], "is_gold": p["is_gold"]} for p in row["passages"]]
        named = {name: row[name] for name in ("id", "question", "answers", "dataset", "type")}
        rows.append({**named, "documents": documents})
    return rows
