"""Where LoR-VP stands in a model: the convolution that reads the pixels, the classifiers, and what a pixel is worth."""

from __future__ import annotations

import warnings
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from hf_ext.tuners.lorvp.config import LorVpConfig, scale_of

_COLOURS = 3


def base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def vision_fact(facts: dict[str, Any], name: str) -> Any:
    """A field of a model's configuration, or of the vision part of it."""
    return facts.get(name) or (facts.get("vision_config") or {}).get(name)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """By name, without what is inside of adapters."""
    found: dict[str, nn.Module] = {}
    wrappers: list[str] = []
    for name, module in model.named_modules():
        if not name.startswith(tuple(wrappers)):
            found[name] = module
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                wrappers.append(f"{name}.")
    return found


def convolution_of(model: nn.Module, config: LorVpConfig, facts: dict[str, Any]) -> str:
    """Name of the convolution that reads the pixels.

    Raises:
        ValueError: there is none, `target_modules` names several, or another kind of layer.
    """
    colours = vision_fact(facts, "num_channels") or _COLOURS
    layers = {name: base_of(module) for name, module in _modules(model).items()}
    readers = [name for name, layer in layers.items() if isinstance(layer, nn.Conv2d) and layer.in_channels == colours]
    if config.target_modules is None:
        if not readers:
            raise ValueError(
                f"target_modules: {type(model).__name__} has no nn.Conv2d that reads pictures of {colours} channels. Models of videos, and models that get patches instead of "
                "pictures, cannot be prompted in pixels."
            )
        return readers[0]
    named = [name for name in layers if name and check_target_module_exists(config, name)]
    # A configuration that has been used names the classifier as well, if its outputs are mapped.
    convolutions = [name for name in named if not isinstance(layers[name], nn.Linear)]
    if len(convolutions) != 1:
        raise ValueError(
            f"target_modules={config.target_modules!r} matches {convolutions or 'nothing'} in {type(model).__name__}; name the one convolution that reads the pixels, such as "
            f"{readers[:1]}."
        )
    (name,), layer = convolutions, layers[convolutions[0]]
    if not isinstance(layer, nn.Conv2d) or layer.in_channels != colours:
        what = (
            f"reads {layer.in_channels} channels"
            if isinstance(layer, nn.Conv2d)
            else f"is a layer of type {type(layer).__name__}"
        )
        raise ValueError(
            f"target_modules: {name!r} {what}: LoR-VP adapts the nn.Conv2d that reads pictures of {colours} channels, such as {readers[:1]}."
        )
    return name


def classifiers_of(model: nn.Module, convolution: str, head: str, model_type: str | None) -> list[str]:
    """Names of the linear layers that name classes: outside of the part of the model that reads the pixels, as many outputs as classes.

    Raises:
        ValueError: there is none, one is quantised, or its outputs are mapped by an adapter with another head.
    """
    # A model of timm has both in one.
    parts = 2 if model_type == "timm_wrapper" else 1
    backbone, found = convolution.split(".")[:parts], []
    classes = cast(int, model.config.num_labels) if isinstance(model, PreTrainedModel) else 0
    for name, module in _modules(model).items():
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else base_of(module)
        if name.split(".")[:parts] == backbone or not isinstance(inner, nn.Linear):
            continue
        # One that is mapped has the classes of the source.
        if isinstance(module, BaseTunerLayer) or inner.out_features == classes:
            if not inner.weight.is_floating_point():
                raise ValueError(
                    f"the classifier {name!r} is quantised and cannot be trained: load the base with llm_int8_skip_modules=[{name.split('.')[0]!r}], which serves 4 and 8 bits."
                )
            found.append(name)
    if head == "linear" and any(isinstance(model.get_submodule(name), BaseTunerLayer) for name in found):
        raise ValueError(
            f"head='linear': {found[0]!r} is mapped by another adapter; use its head, or another copy of the model."
        )
    if not found:
        raise ValueError(
            f"head: {type(model).__name__} has no linear classifier outside of {'.'.join(backbone)!r}. Set head='none', and name what is to be trained with the prompt, if anything, "
            "in modules_to_save."
        )
    return found


def one_classifier(model: nn.Module, names: list[str], config: LorVpConfig) -> str:
    """The classifier whose outputs can be mapped.

    Raises:
        ValueError: there are several, PEFT trains it, or it has fewer classes than the new task.
    """
    name = names[0]
    module = model.get_submodule(name)
    if len(names) > 1 or isinstance(module, AuxiliaryTrainingWrapper):
        what = "is trained by another adapter" if len(names) == 1 else "is not the only classifier"
        raise ValueError(f"head={config.head!r}: {name!r} {what}; use head='linear'.")
    source = cast(nn.Linear, base_of(module)).out_features
    if config.head == "label_map" and cast(int, config.num_labels) > source:
        raise ValueError(
            f"num_labels={config.num_labels}: the model has {source} classes, and each class of the new task needs one of its own; use head='linear' or 'output_map'."
        )
    return name


def scales_of(config: LorVpConfig, model: nn.Module, colours: int) -> list[float]:
    """`pixel_scale` as a number for each colour.

    Raises:
        ValueError: it has another number of them.
    """
    scales = config.pixel_scale
    if scales == "auto":
        scales = _beside(model)
    found = list(scales) if isinstance(scales, list) else [float(scales)] * colours
    if len(found) != colours:
        raise ValueError(f"pixel_scale={scales!r}: the model reads {colours} channels; give one number for each.")
    return found


def _beside(model: nn.Module) -> float | list[float]:
    """From the image processor that lies beside a model, on this machine."""
    place = str(cast(Any, model).name_or_path) if isinstance(model, PreTrainedModel) else ""
    try:
        if place:
            return scale_of(AutoImageProcessor.from_pretrained(place, local_files_only=True))
    except (OSError, ValueError):
        pass  # there is none, or none for this kind of model
    warnings.warn(
        f"pixel_scale='auto': no image processor lies beside the model ({place or 'which has no name'}), so that the prompt is one for normalised pixels; give "
        "LorVpConfig.from_processor the one you use.",
        stacklevel=2,
    )
    return 1.0
