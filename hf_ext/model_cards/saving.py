"""Write a model with its card into a folder, in one rename."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from huggingface_hub import ModelCard
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_ext.model_cards.base_model import identify
from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.collect import (
    adapter_config,
    adapter_name,
    check_mergeable,
    saves_embeddings,
    unwrapped_model,
)
from hf_ext.model_cards.loading import HERE
from hf_ext.model_cards.markers import BEGIN, END, is_ours, merge
from hf_ext.model_cards.validate import validate
from hf_ext.tuners.merging import merged_copy

# What models, adapters, tokenizers and cards consist of.
_WRITTEN = {".md", ".json", ".safetensors", ".txt", ".jinja", ".model"}


@runtime_checkable
class Accompanied(Protocol):
    """A trainer whose model needs a file more than weights, configuration and tokenizer."""

    def save_companions(self, folder: str | Path) -> None: ...


def save(
    model_or_trainer: nn.Module | Trainer,
    folder: str | os.PathLike[str],
    card: ModelCard | None = None,
    *,
    merged: bool = False,
    overwrite: bool = False,
    **card_arguments: Any,
) -> Path:
    """Write what `publish` would upload into `folder`: all of it or nothing, even if the process is killed.

    The content is written into a hidden folder beside the target and then renamed. A folder written by `save` is
    replaced, and text outside the markers of its README.md is kept.

    Args:
        merged: write plain weights with the adapter merged into them. The model itself stays as it is; its weights are
            in memory twice meanwhile.

    Raises:
        ValueError: the card breaks a rule, or `folder` holds something else and `overwrite` is not set.
    """
    target = Path(folder).absolute()
    partial, previous = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        # A process was killed between the two renames below.
        previous.rename(target)
    ours = _is_ours(target)
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not ours and not (overwrite and target.is_dir()):
        raise ValueError(
            f"folder={str(folder)!r} holds something that `save` did not write; choose another, or pass overwrite=True to "
            "replace the folder and everything in it."
        )
    card = finished_card(model_or_trainer, card, merged, card_arguments)
    if ours:
        card = merge(card, ModelCard.load(target / "README.md", ignore_metadata_errors=True))
    accept(card)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_model(model_or_trainer, partial, card, merged)
        card.save(partial / "README.md")
    except BaseException:
        shutil.rmtree(partial)
        raise
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous, ignore_errors=True)
    return Path(folder)


def _is_ours(folder: Path) -> bool:
    """Whether `save` wrote the folder and nobody put other kinds of files into it."""
    readme = folder / "README.md"
    if not readme.is_file() or not is_ours(readme.read_text(encoding="utf-8")):
        return False
    return all(path.is_file() and path.suffix in _WRITTEN for path in folder.iterdir())


def finished_card(
    model_or_trainer: nn.Module | Trainer, card: ModelCard | None, merged: bool, arguments: dict[str, Any]
) -> ModelCard:
    """The given card, or one built from `arguments`; with markers, and with the repository's id in its code."""
    if card is None:
        return build_card(model_or_trainer, merged=merged, **arguments)
    repo_id = arguments.pop("repo_id", None)
    if arguments:
        raise ValueError(f"{', '.join(arguments)}: give these to `build_card`, since a finished card was passed.")
    text = str(card) if repo_id is None else str(card).replace(HERE, f'"{repo_id}"')
    card = ModelCard(text)
    if not is_ours(card.text):
        # Written by hand from beginning to end; with markers it can be replaced when the model is published again.
        card.text = f"\n{BEGIN}\n{card.text}\n{END}\n"
    return card


def accept(card: ModelCard) -> None:
    """Refuse a card with errors, and pass its warnings on."""
    report = validate(card)
    if report.errors:
        raise ValueError(
            "the model card breaks these rules; nothing was published:\n" + "\n".join(map(str, report.errors))
        )
    for finding in report.warnings:
        warnings.warn(f"model card: {finding}", stacklevel=3)


def write_model(model_or_trainer: nn.Module | Trainer, folder: Path, card: ModelCard, merged: bool) -> None:
    """Weights as safetensors and configuration; the tokenizer too if a trainer has one."""
    if isinstance(model_or_trainer, Trainer):
        if model_or_trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "the parameters of this trainer are sharded over processes; call `trainer.save_model(folder)` on all "
                "of them, load the result in one process and publish that."
            )
        tokenizer = model_or_trainer.processing_class
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(folder)
    if isinstance(model_or_trainer, Accompanied):
        model_or_trainer.save_companions(folder)
    model: Any = unwrapped_model(model_or_trainer)
    if merged:
        check_mergeable(model)
        model = merged_copy(model)
    config = None if merged else adapter_config(model)
    if config is None:
        model.save_pretrained(str(folder))
        return
    base = identify(config.base_model_name_or_path, config.revision)
    name = str(adapter_name(model))
    if isinstance(model, PeftModel):
        written = folder if name == "default" else folder / name
        model.save_pretrained(
            str(folder), selected_adapters=[name], save_embedding_layers=saves_embeddings(model, config, base)
        )
        if written != folder:
            for file in written.iterdir():
                file.rename(folder / file.name)
            written.rmdir()
    else:
        # A transformers model that an adapter was injected into.
        model.save_pretrained(str(folder))
    _rewrite_adapter_config(folder / "adapter_config.json", card.data.get("base_model"))


def _rewrite_adapter_config(file: Path, base_model: str | None) -> None:
    """Name the base model by its Hub id, never by a local path, and make the bytes the same at every save."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model
    # PEFT keeps these as sets, whose order changes from process to process.
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
