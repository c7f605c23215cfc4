"""`hf_ext_card.json`: what the card says, for programs, and what lets others check it."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any

from huggingface_hub import ModelCard

from hf_ext.model_cards.facts.base_model import file_digest
from hf_ext.model_cards.facts.records import Facts
from hf_ext.model_cards.probe import Probe
from hf_ext.model_cards.running import SnippetRun

FILE = "hf_ext_card.json"
SCHEMA = 1
_NOT_LISTED = frozenset({FILE, "README.md", ".gitattributes"})


def write_manifest(folder: Path, card: ModelCard, facts: Facts, probe: Probe | None, run: SnippetRun | None) -> None:
    """Write the manifest of everything in `folder`. The same content gives the same bytes."""
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "card": card.data.to_dict(),
        "model": {
            "class": facts.architecture,
            "num_labels": facts.trained_classes,
            "base_commit": facts.base.commit,
            "quantization": facts.quantization,
        },
        "files": {name: file_digest(folder / name) for name in files_of(folder)},
        "probe": probe.to_dict() if probe else None,
        "snippet": {"output_sha256": run.digest} if run else None,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: there is none, it is no JSON, of a later schema, or lacks a part; the message names the key.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{FILE} is missing: `save` and `publish` of hf_ext write it.")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{FILE} is not a manifest ({error!r}); fetch it again.") from None
    if schema != SCHEMA:
        raise ValueError(f"{FILE} has schema {schema!r}, this version of hf_ext reads {SCHEMA}; upgrade hf_ext.")
    files, model, snippet = (manifest.get(key) for key in ("files", "model", "snippet"))
    sound = {
        "card": isinstance(manifest.get("card"), dict),
        "files": isinstance(files, dict) and all(isinstance(digest, str) for digest in files.values()),
        "model": isinstance(model, dict)
        and isinstance(model.get("class", 0), str | NoneType)
        and isinstance(model.get("num_labels"), int | NoneType),
        "probe": "probe" in manifest and isinstance(manifest["probe"], dict | NoneType),
        "snippet": "snippet" in manifest
        and (snippet is None or (isinstance(snippet, dict) and isinstance(snippet.get("output_sha256"), str))),
    }
    for key, is_sound in sound.items():
        if not is_sound:
            given = repr(manifest[key])[:80] if key in manifest else "missing"
            raise ValueError(f"{FILE} is damaged: {key!r} is {given}; fetch it again.")
    return manifest


def files_of(folder: Path) -> list[str]:
    """What a manifest lists: all files but the card and itself, as paths with slashes; nothing of what a download leaves in hidden folders."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in found if path.name not in _NOT_LISTED and path.parts[0] != ".cache")
