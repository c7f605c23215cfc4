"""Facts about what is no trained model in memory: pipelines, caches, and folders that anybody may have saved."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import Cache

from hf_ext.model_cards.facts.base_model import BaseModel, config_of, identify
from hf_ext.model_cards.facts.records import SENTENCE_CLASSES, AdapterFacts, Facts, task_of
from hf_ext.model_cards.facts.settings import NOT_SETTINGS, SHOWN_SETTINGS, as_text, changed_fields, own_fields
from hf_ext.model_cards.facts.tensors import headers
from hf_ext.model_cards.rules.yaml_text import told
from hf_ext.registry import METHODS, SQUAT, Method
from hf_ext.registry import method as method_named

_REMEDY = "save or fetch the folder again"


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
        ValueError: the folder does not exist, holds none of the files that a library writes, or a damaged one.
    """
    if is_pipeline(thing):
        return _pipeline(thing, methods, base_model)
    if is_cache(thing):
        return _cache(thing, methods, base_model)
    folder = Path(thing)
    for file, read in (
        # First, since the other files may be those of a part of it.
        ("modules.json", _sentence_transformer),
        ("adapter_config.json", _adapter),
        ("model_index.json", _saved_pipeline),
        ("config.json", _model),
    ):
        if (folder / file).is_file():
            return read(folder, methods, base_model)
    raise ValueError(
        f"{str(thing)!r} is no folder with adapter_config.json, model_index.json, modules.json or config.json; give one, or the model itself."
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
    file = folder / "adapter_config.json"
    config = _json(file)
    name, revision, peft_type, task_type = (
        _text(config, key, file) for key in ("base_model_name_or_path", "revision", "peft_type", "task_type")
    )
    if peft_type is None or not peft_type.isidentifier():
        raise _damaged(file, "peft_type", peft_type, "the name of a PEFT type")
    base = identify(name, revision, base_model)
    parameters, size = headers(folder, "adapter_model*.safetensors")
    adapter = AdapterFacts(
        name="default",
        peft_type=peft_type,
        settings=_adapter_settings(config, peft_type, file),
        parameters=parameters,
        size=size,
        density=None,
    )
    found = tuple(method for method in METHODS if method.peft_type == peft_type)
    mapping = _mapping(config, "auto_mapping", file)
    return Facts(
        kind="adapter",
        base=base,
        architecture=_text(mapping, "base_model_class", file) or _base_architecture(base),
        methods=found if methods is None else methods,
        versions=versions_of("peft"),
        adapter=adapter,
        task_type=task_type,
        tokenizer=_tokenizer(folder) or ("base" if base.has_tokenizer else None),
    )


def _adapter_settings(config: dict[str, Any], peft_type: str, file: Path) -> dict[str, str]:
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        # Of a newer PEFT or of another package, whose defaults nobody knows here.
        stated = {key: value for key, value in config.items() if key.isidentifier() and key not in NOT_SETTINGS}
        return {key: as_text(value) for key, value in stated.items() if value not in (None, {}, [])}
    try:
        read = PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:  # whatever the class makes of values that it does not expect
        raise ValueError(f"{file.name} is no configuration of {peft_type} ({error}); {_REMEDY}.") from error
    return changed_fields(read, NOT_SETTINGS, (*SHOWN_SETTINGS, *own_fields(read)))


def _base_architecture(base: BaseModel) -> str:
    names = config_of(base.folder).get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _model(folder: Path, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    file = folder / "config.json"
    config = _json(file)
    parameters, _ = headers(folder, "*.safetensors")
    names = config.get("architectures") or [""]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise _damaged(file, "architectures", names, "a list of names")
    quantized = _mapping(config, "quantization_config", file)
    return Facts(
        base=identify(_text(config, "_name_or_path", file), None, base_model),
        architecture=names[0],
        methods=methods or (),
        versions=versions_of(),
        parameters=parameters or None,
        quantization=as_text(quantized["quant_method"]) if "quant_method" in quantized else None,
        task_type=task_of(names[0]),
        tokenizer=_tokenizer(folder),
    )


def _sentence_transformer(folder: Path, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    modules, settings = folder / "modules.json", folder / "config_sentence_transformers.json"
    parts = _json(modules, list)
    if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts):
        raise ValueError(f"{modules.name} must be a list of objects with a type; {_REMEDY}.")
    # Earlier versions name no class, and have this one only beside a folder of transformers.
    name = _text(_json(settings), "model_type", settings) if settings.is_file() else None
    cls = name or "SentenceTransformer"
    if cls not in SENTENCE_CLASSES:
        raise _damaged(settings, "model_type", cls, f"one of {', '.join(SENTENCE_CLASSES)}")
    kinds = [part["type"].rpartition(".")[2] for part in parts]
    labels = config_of(folder).get("id2label")
    classifies = cls == "CrossEncoder" and isinstance(labels, dict) and len(labels) > 1
    return Facts(
        base=identify(_origin(folder), None, base_model),
        architecture=cls,
        methods=methods or (),
        versions=versions_of("sentence-transformers"),
        parameters=headers(folder, "**/model*.safetensors")[0] or None,
        rows=_component_rows({str(number): kind for number, kind in enumerate(kinds)}, {}),
        task="text-classification" if classifies else SENTENCE_CLASSES[cls],
        tokenizer="here" if any(folder.rglob("tokenizer.json")) else None,
    )


def _origin(folder: Path) -> str | None:
    """What the part that comes from transformers was made from."""
    for file, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        if (folder / file).is_file():
            return _text(_json(folder / file), key, folder / file)
    return None


def _saved_pipeline(folder: Path, methods: tuple[Method, ...] | None, base_model: str | None) -> Facts:
    file = folder / "model_index.json"
    index = _json(file)
    name = index["_class_name"] if isinstance(index.get("_class_name"), str) else "DiffusionPipeline"
    # A component is [library, class], and [null, null] where there is none.
    pairs = {key: value for key, value in index.items() if isinstance(value, list) and len(value) == 2}
    components = {key: kind for key, (_, kind) in pairs.items() if isinstance(kind, str)}
    settings = {
        key: as_text(value)
        for key, value in index.items()
        if isinstance(value, bool | int | float | str) and not key.startswith("_")
    }
    found = tuple(method for method in METHODS if name in method.entry_points)
    return Facts(
        kind="pipeline",
        base=identify(_text(index, "_name_or_path", file), None, base_model),
        architecture=name,
        methods=found if methods is None else methods,
        versions=versions_of("diffusers"),
        parameters=headers(folder, "*/*.safetensors")[0] or None,
        rows=_component_rows(components, settings),
    )


def _tokenizer(folder: Path) -> str | None:
    return "here" if (folder / "tokenizer_config.json").is_file() else None


def _json(file: Path, kind: type = dict) -> Any:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} cannot be read ({error}); {_REMEDY}.") from None
    if not isinstance(data, kind):
        raise ValueError(f"{file.name} holds a {type(data).__name__}, not a {kind.__name__}; {_REMEDY}.")
    return data


def _text(config: dict[str, Any], key: str, file: Path) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _damaged(file, key, value, "text")
    return value


def _mapping(config: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise _damaged(file, key, value, "an object")
    return value


def _damaged(file: Path, key: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{file.name}: {key}={told(value)} must be {expected}; correct it, or {_REMEDY}.")
