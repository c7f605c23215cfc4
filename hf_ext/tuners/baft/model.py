"""BaFT as a PEFT tuner: which blocks it edits, and how its layers come to them and go."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from hf_ext.tuners.baft.calls import Calls
from hf_ext.tuners.baft.config import BaftConfig
from hf_ext.tuners.baft.layer import UNMERGEABLE, BaftLayer
from hf_ext.tuners.ranges import is_count
from hf_ext.tuners.rows import adapter_for_each_row

# No prefix of a name may be in it, or PEFT would take the layer for a part of an adapter.
_ATTACHED = "basis_edit"
_DEPTH = 0.6


class BaftModel(BaseTuner):
    """Basis-level representation fine-tuning (https://huggingface.co/papers/2503.00306).

    Blocks keep their place, type and name; a layer is attached to each edited block as its child `basis_edit`, with a hook.

    Example:
        ```python
        model = get_peft_model(base, BaftConfig(layers=[10], task_type="CAUSAL_LM"))
        ```
    """

    prefix = "baft_"
    tuner_layer_cls = BaftLayer
    target_module_mapping = {}  # noqa: RUF012

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # A configuration holds the ledger of one adapter, and would be shared by all that are made with it.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # `_prepare_model` says which blocks, since it has the model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        config = cast(BaftConfig, peft_config)
        _check_supported(model)
        names = blocks_of(cast(PreTrainedModel, model))
        if config.layers is None and config.target_modules is not None:
            return
        if not names:
            raise ValueError(
                f"layers: the blocks of {type(model).__name__} are not found; give their names as target_modules instead."
            )
        layers = _chosen(config.layers, len(names))
        chosen = {names[layer] for layer in layers}
        if config.target_modules is not None and config.target_modules != chosen:
            raise ValueError(
                f"layers={config.layers!r} and target_modules={config.target_modules!r} name different blocks; give one of the two."
            )
        config.layers, config.target_modules = layers, chosen

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        names = blocks_of(cast(PreTrainedModel, self.model))
        if names and current_key not in names:
            raise ValueError(
                f"target_modules: {current_key!r} is no block of the model, whose output BaFT could edit; its blocks are {names[0]!r} to {names[-1]!r}."
            )
        layer = target.get_submodule(_ATTACHED) if _ATTACHED in dict(target.named_children()) else None
        if not isinstance(layer, BaftLayer):
            calls = next((each.calls for each in _layers(self.model)), None) or Calls()
            calls.attach(self.model)
            layer = BaftLayer(current_key, calls, _width(self.model))
            target.add_module(_ATTACHED, layer)
            # Before other hooks, so that the hidden states that a model returns are the edited ones.
            layer.hook = target.register_forward_hook(layer.edit, prepend=True)
        device = next((p.device for p in target.parameters() if not p.is_meta), torch.device("cpu"))
        layer.add_adapter(adapter_name, cast(BaftConfig, peft_config), device)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are made in float32, which their start needs; they become as narrow as their block if PEFT is asked for that."""
        if autocast_adapter_dtype:
            return
        for block in self.model.modules():
            for layer in block.children():
                if isinstance(layer, BaftLayer):
                    dtype = next(p.dtype for p in block.parameters() if p.is_floating_point())
                    for key in layer.adapter_layer_names:
                        tensors = getattr(layer, key)
                        if adapter_name in tensors:
                            tensors[adapter_name].data = tensors[adapter_name].data.to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tell the layers what `PeftModel` was called with: `adapter_names`, and the prompt that `generate` continues.

        Raises:
            ValueError: an adapter that the model does not have, or names in training mode.
        """
        names = kwargs.get("adapter_names")
        layer = next(_layers(self.model), None)
        with ExitStack() as stack:
            stack.enter_context(adapter_for_each_row(self, names))
            if layer is not None:
                mask = kwargs.get("attention_mask")
                stack.enter_context(layer.calls.generating(_prompt_tokens(args, kwargs), mask, names))
            yield

    # -- going -----------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise NotImplementedError(UNMERGEABLE)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        raise NotImplementedError(UNMERGEABLE)

    def unload(self) -> nn.Module:
        """The base model, with the layers and hooks of all adapters removed."""
        for block in list(self.model.modules()):
            if _ATTACHED in dict(block.named_children()):
                layer = cast(BaftLayer, block.get_submodule(_ATTACHED))
                layer.hook.remove()
                layer.calls.detach()
                delattr(block, _ATTACHED)
        return super().unload()


def _layers(model: nn.Module) -> Iterator[BaftLayer]:
    return (module for module in model.modules() if isinstance(module, BaftLayer))


def _prompt_tokens(args: Any, kwargs: dict[str, Any]) -> int | None:
    """Of the prompt that `generate` was given, those that a cache has already included; None if it is not known."""
    given = [kwargs.get("inputs_embeds"), *args[:1], kwargs.get("input_ids"), kwargs.get("inputs")]
    prompt = next((each for each in given if isinstance(each, Tensor) and each.dim() > 1), None)
    if prompt is None:
        return None
    # A conversation may be continued with its new tokens alone; the mask has those of the cache, too.
    mask = kwargs.get("attention_mask")
    return max(prompt.shape[1], mask.shape[1]) if isinstance(mask, Tensor) else prompt.shape[1]


def _width(model: Any) -> int:
    return model.config.get_text_config().hidden_size


def _check_supported(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model has no blocks of tokens that BaFT could read.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is no model of transformers: BaFT edits hidden states at tokens, and reads from the arguments of the model "
            "which tokens are a prompt."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder: the positions of BaFT are those of prompt and answer in one sequence."
        )
    if isinstance(model, GenerationMixin) and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} keeps a state that does not say how many tokens it has read, so that BaFT cannot tell prompt and answer apart."
        )


def blocks_of(model: PreTrainedModel) -> list[str]:
    """Names of the blocks of a model, first to last; none if they are not found, or several lists may be meant."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    # Experts of a block may be as many as the blocks are.
    lists = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(lists) > 1:
        decoder = model.get_decoder()
        inside = {name for name, module in model.named_modules() if module is decoder}
        lists = [name for name in lists if any(name.startswith(f"{other}.") for other in inside)]
    return [f"{name}.{number}" for name in lists for number in range(count)] if len(lists) == 1 else []


def _chosen(layers: Any, count: int) -> list[int]:
    """
    Raises:
        ValueError: the model has no such block.
    """
    if layers is None:
        return [min(int(_DEPTH * count), count - 1)]
    if layers == "all":
        return list(range(count))
    chosen = [layers] if is_count(layers) else sorted(set(layers))
    if beyond := [layer for layer in chosen if layer >= count]:
        raise ValueError(
            f"layers={layers!r}: the model has {count} blocks, 0 to {count - 1}; there is no {beyond[0]}."
        )
    return chosen
