"""Facts about what is no trained model in memory: pipelines, caches, and folders that anybody may have saved."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peft import PeftConfig
from transformers import Cache

from hf_ext.model_cards.facts.base_model import BaseModel, identify
from hf_ext.model_cards.facts.records import AdapterFacts, Facts, task_of
from hf_ext.model_cards.facts.settings import NOT_SETTINGS, SHOWN_SETTINGS, as_text, changed_fields, own_fields
from hf_ext.model_cards.facts.tensors import headers
from hf_ext.registry import METHODS, SQUAT, Method
from hf_ext.registry import method as method_named


@runtime_checkable
class Outputs(Protocol):
    """A pipeline of ours, which says what it puts out."""

    _output_types: Any


def is_pipeline(thing: Any) -> bool:
    # A pipeline can only be here if its library has been imported; importing it to find out would cost seconds.
    diffusers = sys.modules.get("diffusers")
    return diffusers is not None and isinstance(thing, diffusers.DiffusionPipeline)


def is_cache(thing: Any) -> bool:
    if not isinstance(thing, Cache):
        return False
    from hf_ext.cache.squat import SQuatCache

    return isinstance(thing, SQuatCache)


def collect_artefact(thing: Any, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    """Facts of a pipeline, a cache or a folder.

    Raises:
        ValueError: the folder does not exist, or holds none of the files that a library writes.
    """
    if is_pipeline(thing):
        return _pipeline(thing, methods, base_model)
    if is_cache(thing):
        return _cache(thing, methods, base_model)
    folder = Path(thing)
    for file, read in (
        ("adapter_config.json", _adapter),
        ("model_index.json", _saved_pipeline),
        ("config.json", _model),
    ):
        if (folder / file).is_file():
            return read(folder, methods, base_model)
    raise ValueError(
        f"{str(thing)!r} is no folder with adapter_config.json, model_index.json or config.json; give one, or the model itself."
    )


def asked_methods(asked: str | list[str] | None) -> tuple[Method, ...] | None:
    """Entries of the registry for slugs; `None` for `None`.

    Raises:
        ValueError: a slug is unknown.
    """
    if asked is None:
        return None
    try:
        return tuple(method_named(slug) for slug in ([asked] if isinstance(asked, str) else asked))
    except KeyError as error:
        raise ValueError(f"method={asked!r}: {error.args[0]}.") from None


def versions_of(*names: str) -> dict[str, str]:
    """Versions of this package, of the libraries and of PyTorch, as far as they are installed."""
    found = {}
    for name in ("hf-ext", *names, "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _pipeline(pipeline: Any, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    cls = type(pipeline)
    components = {name: part for name, part in pipeline.components.items() if part is not None}
    parameters = sum(
        part.num_parameters() for part in components.values() if callable(vars(type(part)).get("forward"))
    )
    settings = {
        name: as_text(value)
        for name, value in pipeline.config.items()
        if isinstance(value, bool | int | float | str) and not name.startswith("_")
    }
    return Facts(
        kind="pipeline",
        base=identify(pipeline.config.get("_name_or_path"), None, base_model),
        architecture=cls.__name__,
        methods=_methods_of(cls) if methods is None else methods,
        versions=versions_of("diffusers"),
        parameters=parameters,
        rows=_component_rows({name: type(part).__name__ for name, part in components.items()}, settings),
        **_purpose(pipeline),
    )


def _purpose(pipeline: Any) -> dict[str, Any]:
    """Task and tags of a pipeline of ours."""
    if not isinstance(pipeline, Outputs):
        return {}
    if "text" in pipeline._output_types:
        return {"task": "fill-mask", "tags": ("text-editing",)}
    return {"task": "image-to-image", "tags": ("image-editing",)}


def _component_rows(components: dict[str, str], settings: dict[str, str]) -> dict[str, str]:
    parts = ", ".join(f"`{name}` ({kind})" for name, kind in components.items())
    return {"Components": parts} | {f"`{name}`": f"`{value}`" for name, value in settings.items()}


def _methods_of(cls: type) -> tuple[Method, ...]:
    names = {base.__name__ for base in cls.__mro__}
    return tuple(method for method in METHODS if names & method.entry_points.keys())


def _cache(cache: Any, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    settings = changed_fields(cache.settings, frozenset(), own_fields(cache.settings))
    tokens = cache.get_seq_length()
    rows = {"Tokens": f"{tokens:,}", "Bytes of the packed layers": f"{cache.nbytes:,}"}
    return Facts(
        kind="cache",
        base=identify(cache.model_config.name_or_path, None, base_model),
        architecture=type(cache).__name__,
        methods=(SQUAT,) if methods is None else methods,
        versions=versions_of(),
        rows=rows | {f"`{name}`": f"`{value}`" for name, value in settings.items()},
        task_type="CAUSAL_LM",
    )


def _adapter(folder: Path, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    config = PeftConfig.from_pretrained(str(folder))
    base = identify(config.base_model_name_or_path, config.revision, base_model)
    peft_type = as_text(config.peft_type)
    parameters, size = headers(folder, "adapter_model*.safetensors")
    adapter = AdapterFacts(
        name="default",
        peft_type=peft_type,
        settings=changed_fields(config, NOT_SETTINGS, (*SHOWN_SETTINGS, *own_fields(config))),
        parameters=parameters,
        size=size,
        density=None,
    )
    found = tuple(method for method in METHODS if method.peft_type == peft_type)
    return Facts(
        kind="adapter",
        base=base,
        architecture=(config.auto_mapping or {}).get("base_model_class") or _architecture(base),
        methods=found if methods is None else methods,
        versions=versions_of("peft"),
        adapter=adapter,
        task_type=as_text(config.task_type) if config.task_type else None,
        tokenizer=_tokenizer(folder) or ("base" if base.has_tokenizer else None),
    )


def _architecture(base: BaseModel) -> str:
    return _first_architecture(base.folder) if base.folder else ""


def _first_architecture(folder: Path) -> str:
    names = _json(folder / "config.json").get("architectures") or [""]
    return str(names[0])


def _model(folder: Path, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    config = _json(folder / "config.json")
    parameters, _ = headers(folder, "*.safetensors")
    quantized = config.get("quantization_config") or {}
    return Facts(
        base=identify(config.get("_name_or_path"), None, base_model),
        architecture=_first_architecture(folder),
        methods=methods or (),
        versions=versions_of(),
        parameters=parameters or None,
        quantization=as_text(quantized["quant_method"]) if "quant_method" in quantized else None,
        task_type=task_of(_first_architecture(folder)),
        tokenizer=_tokenizer(folder),
    )


def _saved_pipeline(folder: Path, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    index = _json(folder / "model_index.json")
    name = index["_class_name"] if isinstance(index.get("_class_name"), str) else "DiffusionPipeline"
    components = {key: str(value[1]) for key, value in index.items() if isinstance(value, list) and value[-1]}
    settings = {
        key: as_text(value)
        for key, value in index.items()
        if isinstance(value, bool | int | float | str) and not key.startswith("_")
    }
    found = tuple(method for method in METHODS if name in method.entry_points)
    return Facts(
        kind="pipeline",
        base=identify(index.get("_name_or_path"), None, base_model),
        architecture=name,
        methods=found if methods is None else methods,
        versions=versions_of("diffusers"),
        parameters=headers(folder, "*/*.safetensors")[0] or None,
        rows=_component_rows(components, settings),
    )


def _tokenizer(folder: Path) -> str | None:
    return "here" if (folder / "tokenizer_config.json").is_file() else None


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file.name} cannot be read ({error}); save or fetch the folder again.") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file.name} holds a {type(data).__name__}; it must be a JSON object.")
    return data
