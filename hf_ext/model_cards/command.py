"""What `hf-ext card build|validate|verify` does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download

from hf_ext.model_cards.beside import replace_text
from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.facts.base_model import REPO_ID
from hf_ext.model_cards.markers import load_card, merge
from hf_ext.model_cards.validate import Report, validate
from hf_ext.model_cards.verify import verify

# What a card is made from; weights only where they are few.
_DESCRIBING = ["*.json", "*.md", "*.txt", "adapter_model*.safetensors"]
_WORDS = (
    *("base_model", "license", "method", "language", "datasets", "evaluated_on", "intended_use", "out_of_scope"),
    *("factors", "ethics", "caveats", "developers", "contact", "title", "cost"),
)


def build(options: argparse.Namespace) -> int:
    """Write the card of a folder, or of a repository, united with the one that is there."""
    folder, repo_id = _located(options.target)
    words = {name: value for name in _WORDS if (value := vars(options)[name]) is not None}
    if options.metrics is not None:
        words["metrics"] = _metrics(Path(options.metrics))
    card = build_card(folder, repo_id=repo_id, **words)
    place = Path(options.output or folder)
    for known in (place, folder):
        if (known / "README.md").is_file():
            card = merge(card, load_card(known / "README.md"))
            break
    report = validate(card, repo_id=repo_id)
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
