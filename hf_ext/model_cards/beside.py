"""A card beside a model that a trainer or another program has written."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from transformers import Trainer

from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.facts.records import Artefact
from hf_ext.model_cards.markers import load_card, marked, read_card
from hf_ext.model_cards.merging import merge


def write_card(
    trainer: Trainer,
    folder: Path,
    *,
    before: str | None = None,
    model_name: str | None = None,
    tags: str | list[str] | None = None,
    **card_arguments: Any,
) -> None:
    """Write the card of `trainer` to `folder/README.md`, through a temporary name.

    Args:
        before: the text of the card to unite ours with; the one in the folder if absent.
        model_name, tags: added to the metadata.
        card_arguments: of `build_card`.

    Raises:
        ValueError: the card that is there cannot be read.
    """
    repo_id = card_arguments.pop("repo_id", trainer.hub_model_id)
    card = marked(build_card(trainer, repo_id=repo_id, **card_arguments))
    if model_name is not None:
        card.data["model_name"] = model_name
    added = [tags] if isinstance(tags, str) else list(tags or ())
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or ()), *added]))
    readme = folder / "README.md"
    existing = None
    if before:
        existing = read_card(before)
    elif before is None and readme.is_file():
        existing = load_card(readme)
    replace_text(readme, str(merge(card, existing) if existing else card))


def write_remote_card(
    artefact: Artefact, folder: Path, repo_id: str, token: str | None, **card_arguments: Any
) -> None:
    """Write the card of `artefact`, united with the one that `repo_id` has, into a folder that will be uploaded there."""
    card = marked(build_card(artefact, repo_id=repo_id, **card_arguments))
    try:
        existing = load_card(Path(hf_hub_download(repo_id, "README.md", token=token)))
    except RemoteEntryNotFoundError:
        existing = None
    replace_text(folder / "README.md", str(merge(card, existing) if existing else card))


def replace_text(file: Path, text: str) -> None:
    """Write all of `text`, or leave the file as it is; a link stays a link, and permissions stay."""
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        scratch.write_text(text, encoding="utf-8")
        if file.exists():
            shutil.copymode(file, scratch)
        os.replace(scratch, file)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
