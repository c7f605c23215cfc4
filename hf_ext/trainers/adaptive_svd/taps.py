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


class _Tap(torch.autograd.Function):
    """(outputs, inputs, a scalar that requires a gradient, sink) -> the outputs; the backward calls sink(inputs, gradient)."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, inputs: Tensor, anchor: Tensor, sink: Callable[[Tensor, Tensor], None]
    ) -> Any:
        ctx.save_for_backward(inputs)
        ctx.sink = sink
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,) = ctx.saved_tensors
        ctx.sink(inputs.flatten(0, -2), gradient.flatten(0, -2))
        return gradient, None, None, None


def tap(layer: nn.Module, sink: Callable[[Tensor, Tensor], None]) -> RemovableHandle:
    """Call `sink(inputs (T, M), gradient of the outputs (T, N))` in every backward pass through the layer.

    The weight itself needs no gradient then; the anchor keeps the outputs differentiable if nothing before them is.
    """
    anchor = torch.zeros((), requires_grad=True)

    def hook(module: nn.Module, args: tuple[Tensor, ...], outputs: Tensor) -> Tensor:
        return _Tap.apply(outputs, args[0], anchor, sink) if torch.is_grad_enabled() else outputs

    return layer.register_forward_hook(hook)
