"""A card beside a model that a trainer or another program has written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import Trainer

from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.facts.records import Artefact
from hf_ext.model_cards.markers import load_card, merge


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
        before: the card to unite ours with; the one in the folder if absent.
        model_name, tags: added to the metadata.
        card_arguments: of `build_card`.
    """
    repo_id = card_arguments.pop("repo_id", trainer.hub_model_id)
    card = build_card(trainer, repo_id=repo_id, **card_arguments)
    if model_name is not None:
        card.data["model_name"] = model_name
    added = [tags] if isinstance(tags, str) else list(tags or ())
    card.data["tags"] = list(dict.fromkeys([*card.data.get("tags"), *added]))
    readme = folder / "README.md"
    if before is None and readme.is_file():
        before = str(load_card(readme))
    replace_text(readme, str(united(card, before) if before else card))


def write_remote_card(
    artefact: Artefact, folder: Path, repo_id: str, token: str | None, **card_arguments: Any
) -> None:
    """Write the card of `artefact`, united with the one that `repo_id` has, into a folder that will be uploaded there."""
    card = build_card(artefact, repo_id=repo_id, **card_arguments)
    try:
        existing = ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    except EntryNotFoundError:
        existing = None
    replace_text(folder / "README.md", str(merge(card, existing) if existing else card))


def united(card: ModelCard, existing: str) -> ModelCard:
    """`card` with what people wrote around it in the text of an existing one."""
    return merge(card, ModelCard(existing, ignore_metadata_errors=True))


def replace_text(file: Path, text: str) -> None:
    """Write all of `text`, or leave the file as it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(scratch, file)
    except BaseException:
        os.unlink(scratch)
        raise
