"""What is published together: weights, configuration, tokenizer, card, manifest, and results that the Hub lists."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from hf_ext.model_cards.card import build_card
from hf_ext.model_cards.facts.artefacts import is_cache, is_pipeline
from hf_ext.model_cards.facts.base_model import REPO_ID, identify
from hf_ext.model_cards.facts.collect import (
    adapter_config,
    adapter_name,
    check_mergeable,
    collect,
    saves_embeddings,
    tokenizer_of,
    unwrapped_model,
)
from hf_ext.model_cards.facts.records import Artefact
from hf_ext.model_cards.loading import HERE, local_names
from hf_ext.model_cards.manifest import write_manifest
from hf_ext.model_cards.markers import marked, our_part, with_run_note
from hf_ext.model_cards.probe import record, tokenized
from hf_ext.model_cards.running import NOT_RUN, SnippetError, code_of, run_snippet
from hf_ext.model_cards.validate import validate
from hf_ext.tuners.merging import merged_copy


@runtime_checkable
class Accompanied(Protocol):
    """A trainer whose model needs a file more than weights, configuration and tokenizer."""

    def save_companions(self, folder: str | Path) -> None: ...


def is_first_process() -> bool:
    """Whether it is for this process to write. In a distributed run it is the first, as in `Trainer.push_to_hub`; the others do nothing, wait for nothing."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def finished_card(
    model_or_trainer: Artefact, card: ModelCard | None, merged: bool, arguments: dict[str, Any]
) -> ModelCard:
    """The given card, or one built from `arguments`; with markers, and with the repository's id in its code."""
    if card is None:
        return marked(build_card(model_or_trainer, merged=merged, **arguments))
    repo_id = arguments.pop("repo_id", None)
    if arguments:
        raise ValueError(f"{', '.join(arguments)}: give these to `build_card`, since a finished card was passed.")
    text = str(card) if repo_id is None else str(card).replace(HERE, f'"{repo_id}"')
    # A card that was published before tells of another run.
    return marked(ModelCard(with_run_note(text, NOT_RUN)))


def refuse_errors(card: ModelCard) -> None:
    """Raises `ValueError` for a card that the Hub would reject or misread."""
    errors = validate(card).errors
    if errors:
        raise ValueError("the model card breaks these rules; nothing was published:\n" + "\n".join(map(str, errors)))


def tell_warnings(card: ModelCard, repo_id: str | None) -> None:
    """One warning with all that a reader would miss."""
    found = validate(card, repo_id=repo_id).warnings
    if found:
        warnings.warn("model card:\n" + "\n".join(f"- {finding}" for finding in found), stacklevel=3)


def write_package(
    model_or_trainer: Artefact,
    folder: Path,
    card: ModelCard,
    *,
    merged: bool,
    repo_id: str | None,
    run_code: bool,
    probe: bool | Sequence[str],
    benchmarks: Mapping[str, str] | None,
) -> ModelCard:
    """Write everything but the card into `folder`; the card with what its code printed.

    Raises:
        SnippetError: the code of the card fails.
        ValueError: `benchmarks` or `probe` does not fit the card or the model.
    """
    facts = collect(model_or_trainer, merged=merged)
    results = _eval_results(card, benchmarks or {})
    questions = None if isinstance(probe, bool) else tokenized(probe, tokenizer_of(model_or_trainer))
    written = write_model(model_or_trainer, folder, card, merged)
    if results:
        (folder / ".eval_results").mkdir()
        text = yaml.safe_dump(eval_result_entries_to_yaml(results), sort_keys=False)
        (folder / ".eval_results" / "results.yaml").write_text(text, encoding="utf-8")
    run = None
    if run_code:
        code = code_of(our_part(card.text))
        if code is None:
            raise SnippetError("the card has no Python code that loads the model; add it, or pass run_snippet=False.")
        run = run_snippet(code, folder, local_names(facts.base, card.data.get("base_model"), repo_id))
        card = ModelCard(with_run_note(str(card), run.note))
    asked = record(written, questions) if probe is not False and isinstance(written, nn.Module) else None
    write_manifest(folder, card, facts, asked, run)
    return card


def _eval_results(card: ModelCard, benchmarks: Mapping[str, str]) -> list[EvalResultEntry]:
    stated: list[EvalResult] = card.data.get("eval_results") or []
    entries = []
    for task, metric in benchmarks.items():
        found = [
            result for result in stated if result.metric_name == metric and REPO_ID.fullmatch(result.dataset_type)
        ]
        if not found:
            known = sorted(str(result.metric_name) for result in stated)
            raise ValueError(
                f"benchmarks[{task!r}]={metric!r} is no result of the card on a data set of the Hub; it has {known}. Pass evaluated_on= "
                "with the benchmark's Hub id."
            )
        (result, *_) = found
        arguments = result.metric_args or {}
        notes = ", ".join(f"{name} {value}" for name, value in arguments.items()) or None
        entries.append(
            EvalResultEntry(
                dataset_id=result.dataset_type,
                task_id=task,
                value=result.metric_value,
                dataset_revision=result.dataset_revision,
                notes=notes,
            )
        )
    return entries


def write_model(model_or_trainer: Artefact, folder: Path, card: ModelCard, merged: bool) -> Any:
    """Weights as safetensors and configuration; the tokenizer too if a trainer has one. Returns the model that was written.

    Pipelines and caches are written by their own `save_pretrained`. A folder is there already.

    Raises:
        ValueError: a folder is given, or the parameters of a trainer are sharded.
    """
    if isinstance(model_or_trainer, str | os.PathLike):
        raise ValueError(
            f"model_or_trainer={str(model_or_trainer)!r}: a folder is written already; `write_card` puts a card into it."
        )
    if is_pipeline(model_or_trainer) or is_cache(model_or_trainer):
        written: Any = model_or_trainer
        written.save_pretrained(str(folder))
        return written
    if isinstance(model_or_trainer, Trainer):
        if model_or_trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise ValueError(
                "the parameters of this trainer are sharded over processes; call `trainer.save_model(folder)` on all "
                "of them, load the result in one process and publish that."
            )
        tokenizer = tokenizer_of(model_or_trainer)
        if tokenizer is not None:
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
        return model
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
    return model


def _rewrite_adapter_config(file: Path, base_model: str | None) -> None:
    """Name the base model by its Hub id, never by a local path, and make the bytes the same at every save."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model
    # PEFT keeps these as sets, whose order changes from process to process.
    for key in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
