"""Gradients in reduced coordinates, computed in the backward pass of a linear layer without those of the whole weight.

With x `(T, M)` and dy `(T, N)` the inputs and the gradient of the outputs for T tokens, the gradient of a wide weight is
dy^T x, and what an optimizer inside a subspace needs of it is Q^T dy^T x = (dy Q)^T x: Q `(N, F)` has as many columns as there
are free directions, so that time and memory shrink with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from hf_ext.trainers.adaptive_svd.subspace import Subspace
from hf_ext.trainers.adaptive_svd.targets import Layer, short_outputs


class _Tap(torch.autograd.Function):
    """(outputs, inputs, a scalar that requires a gradient, sink) -> the outputs; the backward calls sink(inputs, gradient)."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, inputs: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Any:
        ctx.save_for_backward(inputs)
        ctx.sink = sink
        # Not a view: models may change what they get in place.
        ctx.mark_dirty(outputs)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        ctx.sink(inputs.flatten(0, -2), gradient.flatten(0, -2))
        return gradient, None, None, None


def tap(layer: Layer, subspace: Subspace, receive: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `receive` with two factors of the gradient of a layer's weight, in every backward pass through the layer.

    Args:
        layer: its weight needs no gradient of its own then.
        subspace: of the weight.
        receive: adds up the products a^T b of what it is given, a `(T, F)` and b `(T, Q)`: gradients in coordinates `(F, Q)`.
    """
    outputs_first = short_outputs(layer)
    # Keeps the outputs differentiable if nothing before them is.
    anchor = torch.zeros((), requires_grad=True)

    def sink(inputs_TM: Tensor, gradient_TN: Tensor) -> None:
        # Under autocast the inputs are as the layer got them, in float32.
        inputs_TM = inputs_TM.to(gradient_TN.dtype)
        short, long = (gradient_TN, inputs_TM) if outputs_first else (inputs_TM, gradient_TN)
        receive(short @ subspace.free_PF.to(short.dtype), long)

    def hook(module: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        return _Tap.apply(outputs, args[0], anchor, sink) if torch.is_grad_enabled() else outputs

    return layer.register_forward_hook(hook)
