"""What `hf-ext card build|validate|verify` does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download

from hf_ext.model_cards.beside import replace_text
from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.facts.base_model import REPO_ID, file_digest
from hf_ext.model_cards.manifest import read_manifest
from hf_ext.model_cards.markers import is_ours, load_card, marked
from hf_ext.model_cards.merging import merge, update
from hf_ext.model_cards.validate import Report, validate
from hf_ext.model_cards.verify import verify
from hf_ext.registry import METHODS

# What a card is made from; weights only where they are few.
_DESCRIBING = ["*.json", "*.md", "*.txt", "adapter_model*.safetensors"]
_WORDS = (
    *("base_model", "license", "method", "language", "datasets", "evaluated_on", "intended_use", "out_of_scope"),
    *("factors", "ethics", "caveats", "developers", "contact", "title", "cost"),
)


def build(options: argparse.Namespace) -> int:
    """Write the card of a folder, or of a repository, into the one that is there; what is not said anew stays."""
    folder, repo_id = _located(options.target)
    place = Path(options.output or folder)
    there = next((readme for readme in (place / "README.md", folder / "README.md") if readme.is_file()), None)
    existing = load_card(there) if there else None
    given = {name: value for name in _WORDS if (value := vars(options)[name]) is not None}
    if options.metrics is not None:
        given["metrics"] = _metrics(Path(options.metrics))
    words = {**_stated(existing), **given} if existing else given
    card = marked(build_card(folder, repo_id=options.repo_id or repo_id, **words))
    for key in ("license_name", "license_link"):
        if (value := vars(options)[key]) is not None:
            card.data[key] = given[key] = value
    if existing:
        card = update(card, existing, given) if _is_as_described(folder, existing) else merge(card, existing)
    report = validate(card, repo_id=options.repo_id or repo_id)
    if report.errors:
        return _told(report)
    if repo_id is None or options.output is not None:
        replace_text(place / "README.md", str(card))
        print(place / "README.md")
    elif options.push:
        print(_push(card, repo_id))
    else:
        print(card)
    return _told(report)


def _stated(card: ModelCard) -> dict[str, Any]:
    """What an existing card's metadata say that our text repeats."""
    tags, base, license, datasets = (card.data.get(key) for key in ("tags", "base_model", "license", "datasets"))
    words: dict[str, Any] = {}
    if isinstance(base, str) and REPO_ID.fullmatch(base):
        words["base_model"] = base
    if isinstance(license, str):
        words["license"] = license
    if isinstance(datasets, list) and all(isinstance(name, str) for name in datasets):
        words["datasets"] = datasets
    if is_ours(card.text) and isinstance(tags, list):
        words["method"] = [method.slug for method in METHODS if method.slug in tags]
    return {name: value for name, value in words.items() if value}


def _is_as_described(folder: Path, card: ModelCard) -> bool:
    """Whether the files are those that `card` was written for, as far as that was recorded."""
    if not is_ours(card.text):
        return True
    try:
        files = read_manifest(folder)["files"]
    except ValueError:
        return True
    return all(file_digest(folder / name) == digest for name, digest in files.items() if (folder / name).is_file())


def check(options: argparse.Namespace) -> int:
    """Validate a folder or a repository."""
    return _told(validate(options.target))


def try_again(options: argparse.Namespace) -> int:
    """Verify a folder or a repository."""
    found = verify(options.target, base_model=options.base_model, run_snippet=options.run_snippet)
    print(found)
    return 0 if found.holds else 1


def _told(report: Report) -> int:
    for kind, findings in (("error", report.errors), ("warning", report.warnings)):
        for finding in findings:
            print(f"{kind}: {finding}")
    print(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    return 1 if report.errors else 0


def _located(target: str) -> tuple[Path, str | None]:
    """The folder, or what a repository has to describe itself, and its id."""
    if Path(target).is_dir():
        return Path(target), None
    if not REPO_ID.fullmatch(target):
        raise ValueError(f"{target!r} is neither a folder nor a Hub id of the form 'namespace/name'.")
    return Path(snapshot_download(target, allow_patterns=_DESCRIBING)), target


def _metrics(file: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--metrics {file}: {error}; give a JSON file with one object of name: number.") from None
    if not isinstance(metrics, dict):
        raise ValueError(f"--metrics {file} holds a {type(metrics).__name__}; it must be one object of name: number.")
    return metrics


def _push(card: ModelCard, repo_id: str) -> str:
    return HfApi().upload_file(
        path_or_fileobj=str(card).encode(),
        path_in_repo="README.md",
        repo_id=repo_id,
        commit_message="Model card by hf_ext",
    )
