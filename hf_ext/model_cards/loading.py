"""The code that loads what the card describes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_ext.model_cards.facts.base_model import BaseModel
from hf_ext.model_cards.facts.records import Facts
from hf_ext.model_cards.facts.settings import as_text
from hf_ext.registry import METHODS, Method

# Stands for the repository until `publish` knows its id: Python that works inside the saved folder.
HERE = '"."  # this folder'


def snippet(facts: Facts, repo_id: str | None) -> str:
    """Python that loads the model, and lets it write where that is what it does.

    Args:
        repo_id: where it is published; the snippet loads the current folder when absent.
    """
    name = HERE if repo_id is None else f'"{repo_id}"'
    if facts.kind == "pipeline":
        return _pipeline(facts, name)
    if facts.kind == "cache":
        return _cache(facts, name)
    if facts.library == "sentence-transformers":
        return _sentence_transformer(facts, name)
    auto_class = facts.auto_class
    writes = auto_class in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") and facts.tokenizer is not None
    classes = f"{auto_class}, AutoTokenizer" if writes else auto_class
    lines = [f"from transformers import {classes}", "", f"name = {name}"]
    base, loaded = _base(facts, auto_class)
    if facts.adapter is None:
        lines.append(f"model = {auto_class}.from_pretrained(name)")
    else:
        lines[:0] = ["from peft import PeftModel"]
        if own_peft_method(facts):
            lines[:0] = [f"import hf_ext  # makes the PEFT type {facts.adapter.peft_type} known"]
        if facts.base.id is None:
            lines.append('base_folder = "base"  # the folder of the base model described under "Model details"')
        lines += [f"base = {loaded}", "model = PeftModel.from_pretrained(base, name)"]
    if writes:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained({'name' if facts.tokenizer == 'here' else base})",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=20, do_sample=False)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    else:
        lines.append('print(f"{model.num_parameters():,} parameters")')
    return "\n".join(lines)


def _pipeline(facts: Facts, name: str) -> str:
    package = "hf_ext" if facts.methods else "diffusers"
    return "\n".join(
        [
            f"from {package} import {facts.architecture}",
            "",
            f"name = {name}",
            f"pipeline = {facts.architecture}.from_pretrained(name)",
            "print(type(pipeline).__name__, sorted(pipeline.components))",
        ]
    )


def _sentence_transformer(facts: Facts, name: str) -> str:
    scores = facts.architecture == "CrossEncoder"
    call = 'predict([("A question?", "Its answer.")])' if scores else 'encode(["Once upon a time"])[0].shape'
    return "\n".join(
        [
            f"from sentence_transformers import {facts.architecture}",
            "",
            f"name = {name}",
            f"model = {facts.architecture}(name)",
            # Models of images have no tokenizer.
            f"print(model.{call})" if facts.tokenizer else "print(model)",
        ]
    )


def without_us(facts: Facts, repo_id: str | None) -> str | None:
    """How to load a pipeline of ours where hf_ext is not installed; `None` for everything else."""
    if facts.kind != "pipeline" or not facts.methods:
        return None
    name = HERE if repo_id is None else f'"{repo_id}"'
    return "\n".join(
        [
            "from diffusers import DiffusionPipeline",
            "",
            f"name = {name}",
            'pipeline = DiffusionPipeline.from_pretrained(name, custom_pipeline="pipeline", trust_remote_code=True)',
        ]
    )


def _cache(facts: Facts, name: str) -> str:
    _, loaded = _base(facts, "AutoModelForCausalLM")
    lines = [f"from hf_ext import {facts.architecture}", "from transformers import AutoModelForCausalLM", ""]
    if facts.base.id is None:
        lines.append('base_folder = "base"  # the folder of the base model described under "Model details"')
    return "\n".join(
        [
            *lines,
            f"name = {name}",
            f"model = {loaded}",
            f"cache = {facts.architecture}.from_pretrained(name, model.config)  # copy.deepcopy(cache) for every continuation",
            'print(f"{cache.get_seq_length()} tokens")',
        ]
    )


def _base(facts: Facts, auto_class: str) -> tuple[str, str]:
    """The arguments that name the base model, and the call that loads it."""
    revision = f', revision="{facts.base.commit}"' if facts.base.commit else ""
    base = f'"{facts.base.id}"{revision}' if facts.base.id else "base_folder"
    # The classifier of the base may have another size; the adapter brings its own.
    classes = f", num_labels={facts.trained_classes}, ignore_mismatched_sizes=True" if facts.trained_classes else ""
    return base, f"{auto_class}.from_pretrained({base}{classes})"


def local_names(base: BaseModel, base_id: str | None, repo_id: str | None) -> dict[str, str]:
    """What the names in the snippet stand for on this machine, where that is not the local cache.

    Args:
        base_id: how the card calls the base model.
        repo_id: where the model will be published; its files are in the current folder so far.
    """
    names = {repo_id: "."} if repo_id else {}
    if base.folder is not None and base.commit is None:
        names[base_id or "base"] = str(base.folder.absolute())
    return names


def own_peft_method(facts: Facts) -> Method | None:
    """The method of this package that defines the adapter's PEFT type; `None` for PEFT's own types."""
    peft_type = facts.adapter.peft_type if facts.adapter else None
    return next((method for method in METHODS if peft_type is not None and method.peft_type == peft_type), None)


def load(
    folder: Path, recorded: Mapping[str, Any], dtype: torch.dtype, base_model: str | nn.Module | None
) -> nn.Module:
    """The model of a saved folder, by its own library; code that comes with it is not run.

    Args:
        recorded: `class` and `num_labels` of the model, from the manifest; `base_commit` of its base model, if that is known.
        dtype: of the weights.
        base_model: of an adapter: a folder, a Hub id or a loaded model, which stays as it is; what `adapter_config.json` names
            if absent.

    Raises:
        ValueError: the base model of an adapter is not known, or transformers has no such class.
    """
    cls = getattr(transformers, str(recorded["class"]), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(f"transformers has no model class {recorded['class']!r}; upgrade it")
    if not (folder / "adapter_config.json").is_file():
        return cls.from_pretrained(folder, dtype=dtype)
    if isinstance(base_model, nn.Module):
        return PeftModel.from_pretrained(_twin(base_model), str(folder))
    stated = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    named = base_model or stated
    if named is None:
        raise ValueError("the adapter does not name its base model; pass base_model=")
    settings: dict[str, Any] = {"dtype": dtype}
    if recorded["num_labels"]:
        settings |= {"num_labels": recorded["num_labels"], "ignore_mismatched_sizes": True}
    if named == stated and not Path(named).is_dir() and recorded.get("base_commit"):
        # Of another base model, which somebody chose, the commit says nothing.
        settings["revision"] = recorded["base_commit"]
    return PeftModel.from_pretrained(cls.from_pretrained(named, **settings), str(folder))


def outline(folder: Path, base_model: str | None) -> nn.Module:
    """The base model of a saved adapter, without its weights: modules and sizes as its configuration has them.

    Args:
        base_model: a folder or a Hub id; what `adapter_config.json` names if absent.

    Raises:
        ValueError: the base model is not known, or transformers has no such class.
    """
    adapter = PeftConfig.from_pretrained(str(folder))
    named = base_model or adapter.base_model_name_or_path
    if named is None:
        raise ValueError("the adapter does not name its base model; pass base_model=")
    config = AutoConfig.from_pretrained(named, trust_remote_code=False)
    architecture = (adapter.auto_mapping or {}).get("base_model_class")
    if architecture is None and adapter.task_type is None:
        architecture = (config.architectures or ["AutoModel"])[0]
    if architecture is not None and architecture not in dir(transformers):
        raise ValueError(f"transformers has no model class {architecture!r}; upgrade it")
    facts = Facts(BaseModel(), architecture or "", (), {}, task_type=as_text(adapter.task_type))
    cls = getattr(transformers, facts.auto_class)
    with torch.device("meta"):
        return cls(config) if issubclass(cls, PreTrainedModel) else cls.from_config(config)


def _twin(model: nn.Module) -> nn.Module:
    """A model with modules and parameters of its own, whose numbers are the same memory: PEFT replaces and freezes its parts."""
    shared: dict[int, Any] = {id(parameter): copy.copy(parameter) for parameter in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)
