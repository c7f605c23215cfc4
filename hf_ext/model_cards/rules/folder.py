"""Rules for the files beside a card: each yields (rule, message). Of a repository, only those that `is_read` names are at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_ext.model_cards.facts.tensors import headers
from hf_ext.model_cards.rules.leaks import LOCAL_PATH, TOKEN
from hf_ext.model_cards.rules.yaml_text import load, told

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
# Text that is read for tokens and paths; a vocabulary holds pieces of paths that are nobody's.
_TEXT = re.compile(r"\.(?:jsonl?|txt|md|ya?ml|toml|ini|cfg|csv|log|py|sh|env)$", re.IGNORECASE)
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"})
_TEXT_BYTES, _ADAPTER_BYTES = 2**20, 2**26
# The file of a library to its name, and to those of libraries that build on it; the first that is there decides.
LIBRARY_FILES = {
    "modules.json": ("sentence-transformers", "setfit", "pylate", "model2vec"),
    "adapter_config.json": ("peft",),
    "model_index.json": ("diffusers",),
}
ADAPTER = "adapter_model.safetensors"
STATED_PARAMETERS = re.compile(r"^\| Parameters of the adapter \| (\d[\d,]{0,30})\b", re.MULTILINE)

Findings = Iterator[tuple[str, str]]


def is_read(name: str, size: int) -> bool:
    """Whether the rules read this file of a repository, besides the card."""
    if name == ADAPTER:
        return size <= _ADAPTER_BYTES
    return _is_text(name) and size <= _TEXT_BYTES


def _is_text(name: str) -> bool:
    # What git and downloads keep there is not published, and the card has rules of its own.
    aside = name == "README.md" or name.startswith((".git/", ".cache/"))
    return _TEXT.search(name) is not None and Path(name).name not in _VOCABULARIES and not aside


def file_errors(folder: Path, files: list[str]) -> Findings:
    """Weights that do not load, results files that the Hub would not read, and access tokens."""
    for name, text in _texts(folder, files):
        tokens = sorted({f"{found[:6]}…" for found in TOKEN.findall(text)})
        if tokens:
            yield "token", f"{name} contains the access token {', '.join(tokens[:8])}; revoke it"
    for name in files:
        if name.endswith(".safetensors"):
            try:
                headers(folder, name)
            except ValueError as error:
                yield "weights-damaged", str(error)
        if name.startswith(".eval_results/") and name.endswith((".yaml", ".yml")) and (folder / name).is_file():
            yield from _eval_results(name, folder / name)


def file_warnings(folder: Path | None, files: list[str], data: dict[str, Any], text: str) -> Findings:
    for name in files:
        if name.lower().endswith(PICKLES):
            yield "pickle", f"{name} can run code when it is loaded; save weights as safetensors"
    yield from _library(files, data.get("library_name"))
    for name, content in _texts(folder, files) if folder else ():
        paths = sorted({found[0] for found in LOCAL_PATH.finditer(content)})
        if paths:
            yield "local-path", f"{name} contains {', '.join(map(told, paths[:8]))}: it exists on one machine only"
    stated = STATED_PARAMETERS.search(text)
    if folder is not None and (folder / ADAPTER).is_file() and stated:
        try:
            found, _ = headers(folder, ADAPTER)
        except ValueError:  # an error, which `file_errors` tells
            return
        if found != int(stated[1].replace(",", "")):
            yield "adapter-size", f"the card says {stated[1]} parameters, {ADAPTER} holds {found:,}"


def _texts(folder: Path, files: list[str]) -> Iterator[tuple[str, str]]:
    for name in files:
        file = folder / name
        if _is_text(name) and file.is_file() and file.stat().st_size <= _TEXT_BYTES:
            yield name, file.read_text(encoding="utf-8", errors="replace")


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
