"""Rules for the files beside a card: each yields (rule, message)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_ext.model_cards.facts.tensors import headers
from hf_ext.model_cards.rules.yaml_text import load, told

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# The file of a library to its name, and to those of libraries that build on it; the first that is there decides.
LIBRARY_FILES = {
    "modules.json": ("sentence-transformers", "setfit", "pylate", "model2vec"),
    "adapter_config.json": ("peft",),
    "model_index.json": ("diffusers",),
}
ADAPTER = "adapter_model.safetensors"
STATED_PARAMETERS = re.compile(r"^\| Parameters of the adapter \| (\d[\d,]{0,30})\b", re.MULTILINE)

Findings = Iterator[tuple[str, str]]


def file_errors(folder: Path, files: list[str]) -> Findings:
    """Weights that do not load, and results files that the Hub would not read."""
    for name in files:
        if name.endswith(".safetensors"):
            try:
                headers(folder, name)
            except ValueError as error:
                yield "weights-damaged", str(error)
        if name.startswith(".eval_results/") and name.endswith((".yaml", ".yml")):
            yield from _eval_results(name, folder / name)


def file_warnings(folder: Path | None, files: list[str], data: dict[str, Any], text: str) -> Findings:
    for name in files:
        if name.endswith(PICKLES):
            yield "pickle", f"{name} can run code when it is loaded; save weights as safetensors"
    yield from _library(files, data.get("library_name"))
    stated = STATED_PARAMETERS.search(text)
    if folder is not None and ADAPTER in files and stated:
        try:
            found, _ = headers(folder, ADAPTER)
        except ValueError:  # an error, which `file_errors` tells
            return
        if found != int(stated[1].replace(",", "")):
            yield "adapter-size", f"the card says {stated[1]} parameters, {ADAPTER} holds {found:,}"


def _library(files: list[str], stated: Any) -> Findings:
    present = next((name for name in LIBRARY_FILES if name in files), None)
    if present is not None and str(stated).lower() not in LIBRARY_FILES[present]:
        library = LIBRARY_FILES[present][0]
        yield "library-name", f"{present} is present, so library_name should be {library!r}, not {told(stated)}"


def _eval_results(name: str, file: Path) -> Findings:
    try:
        entries = load(file.read_text(encoding="utf-8"))
    except ValueError as error:
        yield "eval-results", f"{name} is not YAML: {error}"
        return
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        dataset = entry.get("dataset") if isinstance(entry, dict) else None
        if not isinstance(dataset, dict) or not dataset.get("id") or not dataset.get("task_id"):
            yield "eval-results", f"{name}, entry {number}, lacks dataset.id or dataset.task_id"
        elif entry.get("value") is None:
            yield "eval-results", f"{name}, entry {number}, lacks value"
