"""Write a model with its card into a folder, in one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_ext.model_cards.facts.records import Artefact
from hf_ext.model_cards.manifest import files_of, read_manifest
from hf_ext.model_cards.markers import is_ours, load_card
from hf_ext.model_cards.merging import merge
from hf_ext.model_cards.package import finished_card, is_first_process, refuse_errors, tell_warnings, write_package


def save(
    model_or_trainer: Artefact,
    folder: str | os.PathLike[str],
    card: ModelCard | None = None,
    *,
    merged: bool = False,
    overwrite: bool = False,
    run_snippet: bool = False,
    probe: bool | Sequence[str] = True,
    benchmarks: Mapping[str, str] | None = None,
    **card_arguments: Any,
) -> Path:
    """Write what `publish` would upload into `folder`: all of it or nothing, even if the process is killed.

    The content is written into a hidden folder beside the target and then renamed. A folder written by `save` is
    replaced, and text outside the markers of its README.md is kept. In a distributed run the first process writes, and the others return at once.

    Args:
        merged: write plain weights with the adapter merged into them. The model itself stays as it is; its weights are
            in memory twice meanwhile.
        overwrite: replace a folder that `save` did not write, or that has got other files; text around our part of its README.md is kept all the same.
        run_snippet: run the code of the card in the new folder, in a process of its own that is told to work offline; what it prints goes into
            the card.
        probe: record in `hf_ext_card.json` what the model answers to 32 inputs, for `verify`: drawn from its vocabulary, or
            texts that may be published; `False` for none.
        benchmarks: task id of a benchmark of the Hub -> name of the metric, measured on that data set (`evaluated_on=`), that its leaderboard
            shows; written to `.eval_results/`.
        card_arguments: arguments of `build_card`.

    Raises:
        ValueError: the card breaks a rule, its code fails, or `folder` holds something else and `overwrite` is not set.
    """
    if not is_first_process():
        return Path(folder)
    # A link stays a link: what it points to is replaced.
    target = Path(folder).resolve()
    partial, previous = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.previous")
    if previous.exists() and not target.exists():
        # A process was killed between the two renames below.
        previous.rename(target)
    existing, manifest = _found(target)
    ours = manifest is not None and set(files_of(target)) <= set(manifest["files"])
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not ours and not (overwrite and target.is_dir()):
        raise ValueError(
            f"folder={str(folder)!r} holds something that `save` did not write; choose another, or pass overwrite=True to "
            "replace the folder and everything in it."
        )
    card = finished_card(model_or_trainer, card, merged, card_arguments)
    before = manifest["card"] if manifest else None
    refuse_errors(merge(card, existing, before) if existing else card)
    for leftover in (partial, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        card = write_package(
            model_or_trainer,
            partial,
            card,
            merged=merged,
            repo_id=None,
            run_code=run_snippet,
            probe=probe,
            benchmarks=benchmarks,
        )
        if existing:
            card = merge(card, existing, before)
        card.save(partial / "README.md")
    except BaseException:
        shutil.rmtree(partial)
        raise
    if target.exists():
        target.rename(previous)
    partial.rename(target)
    shutil.rmtree(previous, ignore_errors=True)
    tell_warnings(card, None)
    return Path(folder)


def _found(folder: Path) -> tuple[ModelCard | None, Mapping[str, Any] | None]:
    """The card in a folder, if it has our part, and what was recorded with it; nothing of what cannot be read."""
    try:
        card = load_card(folder / "README.md")
    except (OSError, ValueError):
        return None, None
    if not is_ours(card.text):
        return None, None
    try:
        return card, read_manifest(folder)
    except ValueError:
        return card, None
