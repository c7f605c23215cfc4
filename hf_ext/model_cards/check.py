"""Check an adapter before it is loaded: intact files, a possible configuration, and made for this base model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_ext.model_cards.rules.folder import PICKLES
from hf_ext.registry import METHODS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}

Shapes = dict[str, tuple[int, ...]]


def check_adapter(
    folder_or_repo: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Raise if the adapter cannot be loaded as what it claims to be. Only headers are read, never a tensor.

    Args:
        folder_or_repo: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a Hub id.
        model: the base model (or a `PeftModel` of it) that the adapter is meant for. Module names are compared for every
            PEFT type, and shapes for adapters with LoRA's tensors.

    Raises:
        ValueError: names the file, the field, the value and what to do.
    """
    folder = _folder(folder_or_repo, revision, token)
    config = _read_config(folder / CONFIG)
    config_class = _config_class(config, folder / CONFIG)
    is_lora = issubclass(config_class, LoraConfig)
    if is_lora:
        _check_ranks(config, folder / CONFIG)
    shapes = _read_shapes(folder)
    if is_lora:
        _check_factors(config, shapes, folder / WEIGHTS)
    if model is not None:
        _check_base(shapes, model, config)


def _folder(folder_or_repo: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    folder = Path(folder_or_repo)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(folder_or_repo).count("/") != 1:
        raise ValueError(f"{str(folder_or_repo)!r} is neither a folder nor a Hub id of the form 'namespace/name'.")
    patterns = [CONFIG, "adapter_model*"]
    return Path(snapshot_download(str(folder_or_repo), revision=revision, token=token, allow_patterns=patterns))


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing: this is not an adapter folder; save one with `model.save_pretrained`.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); restore it from where the adapter was saved.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; it must be a JSON object.")
    return config


def _config_class(config: dict[str, Any], file: Path) -> type:
    name = config.get("peft_type")
    if name in PEFT_TYPE_TO_CONFIG_MAPPING:
        return PEFT_TYPE_TO_CONFIG_MAPPING[name]
    if any(method.peft_type == name for method in METHODS):
        raise ValueError(f"{file}: peft_type={name!r} is not registered with PEFT; `import hf_ext` first.")
    raise ValueError(f"{file}: peft_type={name!r} is unknown; import the package that defines it, or upgrade peft.")


def _check_ranks(config: dict[str, Any], file: Path) -> None:
    pattern = config.get("rank_pattern") or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{file}: rank_pattern={pattern!r} must map module names to ranks.")
    for name, rank in {"r": config.get("r"), **{f"rank_pattern[{k!r}]": v for k, v in pattern.items()}}.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
            raise ValueError(f"{file}: {name}={rank!r} must be a positive integer, the rank of the update.")


def _read_shapes(folder: Path) -> Shapes:
    """Shapes of the tensors, from the header; a truncated file is noticed because the header gives its length."""
    file = folder / WEIGHTS
    if not file.is_file():
        unsafe = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLES)
        if unsafe:
            raise ValueError(
                f"{folder} holds its weights as {', '.join(unsafe)}, which can run code when loaded; ask for the adapter "
                "as safetensors, or convert it where you trust it with `save_pretrained(..., safe_serialization=True)`."
            )
        raise ValueError(f"{file} is missing: the adapter has no weights; save it again with `model.save_pretrained`.")
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short ({error}); fetch it again."
        ) from None
    if not shapes:
        raise ValueError(f"{file} contains no tensors; save the adapter again.")
    return shapes


def _check_factors(config: dict[str, Any], shapes: Shapes, file: Path) -> None:
    """Every A has its B, and both have the rank that the configuration gives."""
    patterns = config.get("rank_pattern") or {}
    # Adapters of a parameter with several expert weights stack the ranks of all experts.
    stacked = bool(config.get("target_parameters"))
    for module, factor, key in _factor_keys(shapes):
        partner = _partner(key, factor)
        if partner not in shapes:
            raise ValueError(f"{file}: {key} has no counterpart {partner}; the file is incomplete, save it again.")
        rank: int = patterns.get(get_pattern_key(list(patterns), module), config["r"])
        for name, found in ((key, shapes[key][0]), (partner, shapes[partner][1])):
            if found != rank and not (stacked and found % rank == 0):
                raise ValueError(
                    f"{file}: {name} has shape {list(shapes[name])}, rank {found}, but {CONFIG} gives r={rank}; the two "
                    "files do not belong together."
                )
    if not any(True for _ in _factor_keys(shapes)):
        raise ValueError(f"{file} has no tensor named lora_A: it does not hold a {config['peft_type']} adapter.")


def _partner(key: str, factor: str) -> str:
    return key.replace(f".{factor}", f".{_FACTORS[factor]}")


def _factor_keys(shapes: Shapes) -> Iterator[tuple[str, str, str]]:
    """(module name, factor name, key) of every first factor."""
    for key in shapes:
        for factor in _FACTORS:
            if f".{factor}" in key:
                yield key.removeprefix(_PREFIX).split(f".{factor}")[0], factor, key


def _check_base(shapes: Shapes, model: nn.Module, config: dict[str, Any]) -> None:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # In a model that carries adapters already, the layers sit inside wrappers of the same name.
    modules = {_plain(name): module for name, module in base.named_modules()}
    made_for, prefix = config.get("base_model_name_or_path"), PEFT_TYPE_TO_PREFIX_MAPPING.get(config["peft_type"])
    remedy = f"the adapter was made for {made_for!r}" if made_for else "the adapter was made for another base model"
    for key in shapes:
        if key.startswith(_PREFIX):
            # "<module>.weight", "<module>.lora_A.weight", or deeper below the name that the type gives its own modules.
            module, own, _ = _plain(key.removeprefix(_PREFIX)).partition(f".{prefix}")
            parent = module.rpartition(".")[0]
            if not ({module} if prefix and own else {parent, parent.rpartition(".")[0]}) & modules.keys():
                raise ValueError(f"{WEIGHTS}: {type(base).__name__} has no module for {key!r}; {remedy}.")
    for name, factor, key in _factor_keys(shapes):
        expected = _features(modules[_plain(name)])
        found = (shapes[key][1], shapes[_partner(key, factor)][0])
        if expected is not None and found != expected:
            raise ValueError(
                f"{WEIGHTS}: the update of {name} maps {found[0]} to {found[1]} features, but this "
                f"{type(base).__name__} has {expected[0]} to {expected[1]}; {remedy}."
            )


def _plain(name: str) -> str:
    return name.replace(".base_layer", "")


def _features(module: nn.Module) -> tuple[int, int] | None:
    """Input and output size of a layer that declares them; `None` for other layers."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None
