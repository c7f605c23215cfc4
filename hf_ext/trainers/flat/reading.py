"""What the unlearning losses read of a model besides log-probabilities: hidden states, layers, the output layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_ext.trainers.flat.distributions import Head
from hf_ext.trainers.output_layer import logit_transform


def decoder_layers(base: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks of the language model, in order."""
    return [module for module in base.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]


def freeze_above(model: nn.Module, base: PreTrainedModel, layer: int) -> list[nn.Parameter]:
    """Freeze what no gradient from the output of `layer` reaches: later blocks, the final norm, an output layer of its own.

    Returns:
        The parameters that were trainable.

    Raises:
        ValueError: there is no such layer, or nothing else of the model is trainable.
    """
    layers = decoder_layers(base)
    if layer >= len(layers):
        raise ValueError(
            f"loss_kwargs['layer']={layer}: the model has the layers 0 to {len(layers) - 1}; a layer in the first half "
            "is usual."
        )
    kept = {id(p) for module in (base.get_input_embeddings(), *layers[: layer + 1]) for p in module.parameters()}
    children = list(base.get_decoder().children())
    blocks = next(i for i, child in enumerate(children) if any(module is layers[0] for module in child.modules()))
    above = (*layers[layer + 1 :], *children[blocks + 1 :], base.get_output_embeddings())
    frozen = {id(p): p for module in above for p in module.parameters() if p.requires_grad and id(p) not in kept}
    if not any(p.requires_grad and id(p) not in frozen for p in model.parameters()):
        raise ValueError(
            f"loss_kwargs['layer']={layer}: nothing at or below this layer is trainable; let the adapter target it, or "
            "choose a higher layer."
        )
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    return list(frozen.values())


def head_of(base: PreTrainedModel) -> Head:
    """The output layer, with the scale and the soft cap that the model's configuration adds to it."""
    layer = base.get_output_embeddings()
    scale, softcap = logit_transform(base.config)
    return Head(layer.weight, layer.bias, scale, softcap)


@contextlib.contextmanager
def recorded(base: PreTrainedModel, hidden: bool = False, layer: int | None = None) -> Iterator[dict[str, Tensor]]:
    """What the next forward of `base` shows: the last hidden states `hidden`, and `activations` of one layer.

    Both are `(B, S, H)`, with gradient, and cost no memory beyond what the backward keeps anyway.
    """
    seen: dict[str, Tensor] = {}

    def keep_hidden(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state

    def keep_activations(module: nn.Module, args: Any, output: Any) -> None:
        seen["activations"] = output if isinstance(output, Tensor) else output[0]

    handles = [base.base_model.register_forward_hook(keep_hidden)] if hidden else []
    if layer is not None:
        # Gradient checkpointing wraps the forward of a layer, so that its hooks run once.
        handles.append(decoder_layers(base)[layer].register_forward_hook(keep_activations))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# These initialisations move a part of the base weights into the adapter, which is not undone by switching it off.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_adapter_leaves_the_base(config: PeftConfig | None) -> None:
    """Raises `ValueError` if switching the adapter off would not give the model before unlearning."""
    if not isinstance(config, LoraConfig) or not isinstance(config.init_lora_weights, str):
        return
    # PEFT takes some of the names in any case.
    if config.init_lora_weights.lower().startswith(_CHANGES_THE_BASE):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base weights, so they are no reference: pass "
            "a ref_model, or use another initialisation."
        )
