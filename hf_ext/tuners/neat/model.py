"""NEAT as a PEFT tuner: which layers it adapts, and the layer that it puts in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.peanut import PeanutModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_ext.tuners.neat.config import NeatConfig
from hf_ext.tuners.neat.layer import CONVOLUTIONS, NeatLayer
from hf_ext.tuners.rows import adapter_for_each_row


class NeatModel(PeanutModel):
    """Nonlinear, weight-aware adaptation (https://huggingface.co/papers/2410.01870).

    Keys of the checkpoints, default target modules and the way adapters are named are those of PEFT's type PEANUT.

    Example:
        ```python
        model = get_peft_model(base, NeatConfig(r=8, task_type="CAUSAL_LM"))
        ```
    """

    def _create_and_replace(  # type: ignore[override]
        self,
        peanut_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional_kwargs: Any,
    ) -> None:
        config = cast(NeatConfig, peanut_config)
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.r)
        if isinstance(target, NeatLayer):
            target.update_layer(adapter_name, r, config)
            return
        options = get_quantization_kwargs(self.model)
        _check_supported(target, current_key, options)
        layer = NeatLayer(target, adapter_name, config, r, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand every layer what `PeftModel` was called with as `adapter_names`: an adapter, or "__base__", for each row.

        Raises:
            ValueError: a name that the model does not have, or the model is in training mode.
        """
        with adapter_for_each_row(self, kwargs.get("adapter_names"), NeatLayer):
            yield


def _check_supported(target: nn.Module, name: str, options: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: the layer is no matrix of inputs and outputs that NEAT could read.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kind = f"{name!r} is a layer of type {type(base).__name__}"
    if any(isinstance(parameter, DTensor) for parameter in base.parameters()):
        raise ValueError(
            f"{kind} whose weight is distributed: NEAT reads whole rows or columns of it. Add the adapter before the model is sharded, or load "
            "the model without tensor parallelism."
        )
    if isinstance(base, CONVOLUTIONS):
        if base.groups != 1 or base.padding_mode != "zeros":
            raise ValueError(
                f"{kind} with groups={base.groups} and padding_mode={base.padding_mode!r}: NEAT supports groups=1 and "
                "padding_mode='zeros'; exclude it with exclude_modules."
            )
    elif not isinstance(base, (nn.Linear, Conv1D)) and resolve_quantization_backend(base, **options) is None:
        raise ValueError(
            f"{kind}: NEAT supports nn.Linear (quantised or not), Conv1D of transformers, nn.Conv1d, nn.Conv2d and nn.Conv3d; leave it "
            "out of target_modules."
        )
