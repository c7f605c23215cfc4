"""Losses that draw the model's distribution of the next token to a constant one, without ever holding all logits.

They take hidden states and the output layer, and go through the positions in chunks, whose logits exist for a moment.

Shapes: N positions, T of them in a chunk, H hidden size, V vocabulary. Everything but the products with the layer's weight
is computed in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_ext.trainers.flat.divergences import full_precision
from hf_ext.trainers.projection import product_dtype, project, projection_gradients, slices, times_weight

# Elements of the `(T, V)` tensors of one chunk, of which about six are alive: 16 MiB each in float32.
_CHUNK_ELEMENTS = 2**22


class Head(NamedTuple):
    """The output layer: `z = logit_scale * (hidden @ weight_VH.T + bias_V)`, then `softcap * tanh(z / softcap)`."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_TH: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits `(T, V)`, multiplied in `dtype` and returned in full precision."""
        rows_TV = torch.empty(len(hidden_TH), len(self.weight_VH), dtype=dtype, device=hidden_TH.device)
        z_TV = full_precision(project(hidden_TH, self.weight_VH, self.bias_V, rows_TV))
        if self.logit_scale != 1.0:
            z_TV *= self.logit_scale
        if self.softcap is not None:
            z_TV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_TV


class Target(NamedTuple):
    """The distribution that the model is drawn to.

    `adjust_` turns the logits `(T, V)` of a chunk of positions into those of the target, in place; they are the
    reference's, or the model's own if there is none. `relative` takes the target's entropy off the cross-entropy: the
    loss is then KL(target || model).
    """

    adjust_: Callable[[Tensor, slice], Any]
    reference: tuple[Tensor, Head] | None = None
    relative: bool = False


def check_labels(labels_N: Tensor, head: Head) -> None:
    """Raises `IndexError` naming the first label that is outside the vocabulary; -100 is too."""
    vocab = len(head.weight_VH)
    wrong = (labels_N < 0) | (labels_N >= vocab)
    if bool(wrong.any()):
        raise IndexError(
            f"label {int(labels_N[wrong][0])} is outside the vocabulary of {vocab} tokens: pass answer positions "
            "alone, and check that the tokenizer belongs to the model."
        )


@torch.compiler.disable
def soft_target_loss(hidden_NH: Tensor, head: Head, target: Target, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy (or KL divergence) of the model to the target at each position, `(N,)`.

    Gradients reach the hidden states, and the head's weight and bias if they require some. The result does not depend
    on `chunk_tokens`, the number of positions whose logits exist at the same time.
    """
    step = chunk_tokens or max(1, _CHUNK_ELEMENTS // len(head.weight_VH))
    return _SoftTargetLoss.apply(hidden_NH, head.weight_VH, head.bias_V, head, target, step)


def _score(
    logits_TV: Tensor, target_logits_TV: Tensor, relative: bool, head: Head, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Loss `(T,)` and, on request, its gradient `(T, V)` with respect to `hidden @ weight.T + bias`."""
    log_p_TV = logits_TV.log_softmax(-1)
    log_target_TV = target_logits_TV.log_softmax(-1)
    target_TV = log_target_TV.exp()
    if relative:
        loss_T = log_target_TV.sub_(log_p_TV).mul_(target_TV).sum(-1)
    else:
        loss_T = -torch.mul(log_p_TV, target_TV, out=log_target_TV).sum(-1)
    if not gradient:
        return loss_T, loss_T.new_empty(0)
    grad_TV = log_p_TV.exp_().sub_(target_TV)
    if head.softcap is not None:
        grad_TV.mul_(1 - (logits_TV / head.softcap).square_())
    if head.logit_scale != 1.0:
        grad_TV.mul_(head.logit_scale)
    return loss_T, grad_TV


def _scored_chunks(
    hidden_NH: Tensor, head: Head, target: Target, dtype: torch.dtype, step: int, gradient: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(positions, loss, gradient or nothing) of `_score`, `step` tokens at a time."""
    for chunk in slices(len(hidden_NH), step):
        logits_TV = head.logits(hidden_NH[chunk], dtype)
        if target.reference is None:
            target_logits_TV = logits_TV.clone()
        else:
            ref_hidden_NH, ref_head = target.reference
            target_logits_TV = ref_head.logits(ref_hidden_NH[chunk], dtype)
        target.adjust_(target_logits_TV, chunk)
        yield chunk, *_score(logits_TV, target_logits_TV, target.relative, head, gradient)


class _SoftTargetLoss(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias [V] or None, the head they are of, target, tokens of a chunk) -> loss [N].

    The target is a constant, so d loss / d logits = p - target is known as soon as a chunk's logits are. If the head
    is frozen, the forward multiplies it with the weight and keeps [N, H]; if the head is trained, its gradient needs
    the upstream factors, and the backward projects once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        target: Target,
        step: int,
    ) -> Tensor:
        dtype = product_dtype(hidden_NH)
        head_is_trained = any(ctx.needs_input_grad[1:3])
        ahead = ctx.needs_input_grad[0] and not head_is_trained
        grad_NH = torch.empty_like(hidden_NH) if ahead else None
        loss_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.promote_types(dtype, torch.float32))
        for chunk, loss_T, grad_TV in _scored_chunks(hidden_NH, head, target, dtype, step, ahead):
            loss_N[chunk] = loss_T
            if grad_NH is not None:
                grad_NH[chunk] = times_weight(grad_TV.to(dtype), weight_VH)
        ctx.head, ctx.target, ctx.dtype, ctx.step = head, target, dtype, step
        ctx.save_for_backward(hidden_NH if head_is_trained else grad_NH)
        return loss_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        if not any(ctx.needs_input_grad[1:3]):
            (grad_NH,) = ctx.saved_tensors
            return (grad_NH * upstream_N[:, None]).to(grad_NH.dtype), *(None,) * 5
        (hidden_NH,) = ctx.saved_tensors
        chunks = _scored_chunks(hidden_NH, ctx.head, ctx.target, ctx.dtype, ctx.step, True)
        gradients = ((chunk, grad_TV.mul_(upstream_N[chunk, None]).to(ctx.dtype)) for chunk, _, grad_TV in chunks)
        found = projection_gradients(
            ctx.needs_input_grad[:3], hidden_NH, ctx.head.weight_VH, ctx.head.bias_V, ctx.dtype, gradients
        )
        return *found, *(None,) * 3
