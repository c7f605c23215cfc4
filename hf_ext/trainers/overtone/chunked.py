"""The OVERTONE loss as an operation on hidden states or logits, in chunks that keep the memory small.

The arithmetic of a token lives in `loss.py`; this module decides which rows exist at the same time. Paper:
https://huggingface.co/papers/2502.00602. No Hugging Face import.

Shape suffixes: N labelled tokens, M tokens, T tokens of one chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ext.trainers.overtone.loss import (
    BLOCK_ELEMENTS_CPU,
    IGNORE_INDEX,
    OvertoneSettings,
    TokenLosses,
    check_labels,
    score_rows_,
)
from hf_ext.trainers.projection import product_dtype, project, projection_gradients, times_weight

# Elements of the [T, V] buffer that holds one chunk of logits. 2^23 is 32 MiB in float32 and 32 tokens of a 262,144-word
# vocabulary. Larger chunks read the head's weight less often, smaller ones need less memory.
_CHUNK_ELEMENTS_CPU = 2**23
_CHUNK_ELEMENTS_GPU = 2**25
# A trained head has a gradient of its own size anyway, which every chunk reads and writes.
_CHUNK_GROWTH_FOR_TRAINED_HEAD = 2


class _HeadSpec(NamedTuple):
    settings: OvertoneSettings
    logit_scale: float
    softcap: float | None
    chunk_tokens: int | None
    gather: Callable[[], AbstractContextManager[Any]]


class _OvertoneHead(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], bias [V] or None, labels [N]) -> the fields of `TokenLosses`.

    The target is a constant, so the gradient of token i is known up to the upstream factor as soon as its logits are. If
    the head is frozen, the forward turns each chunk of logits into its gradient in place, multiplies it with the weight
    and keeps [N, H]: one projection and one product in all. If the head is trained, its gradient needs the upstream
    factors, so the backward projects once more.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_N: Tensor, spec: _HeadSpec
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        dtype = product_dtype(hidden_NH)
        head_is_trained = any(ctx.needs_input_grad[1:3])
        ahead = ctx.needs_input_grad[0] and not head_is_trained
        grad_NH = torch.empty_like(hidden_NH) if ahead else None
        parts = []
        for chunk, rows_TV in _projected_chunks(hidden_NH, weight_VH, bias_V, dtype, spec, head_is_trained):
            parts.append(score_rows_(rows_TV, labels_N[chunk], spec.settings, ahead, spec.logit_scale, spec.softcap))
            if grad_NH is not None:
                grad_NH[chunk] = times_weight(rows_TV, weight_VH)
        losses = TokenLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))
        ctx.spec, ctx.dtype = spec, dtype
        saved = (hidden_NH, weight_VH, bias_V, labels_N) if head_is_trained else (grad_NH,)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream_N = upstream[0]
        if upstream_N is None:
            return (None,) * 5
        if not any(ctx.needs_input_grad[1:3]):
            (grad_NH,) = ctx.saved_tensors
            # Multiplied in float32: a float16 loss scale alone can exceed the range of float16.
            return ((grad_NH * upstream_N[:, None]).to(grad_NH.dtype), None, None, None, None)
        hidden_NH, weight_VH, bias_V, labels_N = ctx.saved_tensors
        spec: _HeadSpec = ctx.spec

        def gradients() -> Iterator[tuple[slice, Tensor]]:
            for chunk, rows_TV in _projected_chunks(hidden_NH, weight_VH, bias_V, ctx.dtype, spec, True):
                score_rows_(
                    rows_TV, labels_N[chunk], spec.settings, True, spec.logit_scale, spec.softcap, upstream_N[chunk]
                )
                yield chunk, rows_TV

        with spec.gather():
            found = projection_gradients(
                ctx.needs_input_grad[:3], hidden_NH, weight_VH, bias_V, ctx.dtype, gradients()
            )
        return *found, None, None


def _projected_chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    dtype: torch.dtype,
    spec: _HeadSpec,
    head_is_trained: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of tokens with their head outputs [T, V] in one reused buffer, which the caller may overwrite."""
    tokens, vocab = len(hidden_NH), len(weight_VH[: spec.settings.valid_vocab_size])
    elements = _CHUNK_ELEMENTS_CPU if hidden_NH.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    elements *= _CHUNK_GROWTH_FOR_TRAINED_HEAD if head_is_trained else 1
    step = max(1, min(tokens, spec.chunk_tokens or max(1, elements // vocab)))
    buffer = torch.empty(step, vocab, dtype=dtype, device=hidden_NH.device)
    for start in range(0, max(tokens, 1), step):
        chunk = slice(start, min(start + step, tokens))
        chunk_TH = hidden_NH[chunk]
        yield chunk, project(chunk_TH, weight_VH, bias_V, buffer[: len(chunk_TH)])


class _OvertoneLogits(torch.autograd.Function):
    """(logits [M, V], labels [M] with ignored ones, settings) -> the fields of `TokenLosses`, each [labelled].

    Only blocks of labelled rows are ever copied. The backward recomputes them rather than keep [labelled, V] gradients,
    so that the one large tensor it allocates is the gradient that autograd asks for.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, labels_M: Tensor, settings: OvertoneSettings) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_MV, labels_M)
        ctx.settings = settings
        parts = [
            score_rows_(rows, labels, settings, gradient=False)
            for _, rows, labels in _labelled_rows(logits_MV, labels_M, settings)
        ]
        losses = TokenLosses(*(torch.cat(column) for column in zip(*parts, strict=True)))
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream[0] is None:
            return None, None, None
        logits_MV, labels_M = ctx.saved_tensors
        grad_MV = torch.zeros_like(logits_MV)
        done = 0
        for index, rows, labels in _labelled_rows(logits_MV, labels_M, ctx.settings):
            score_rows_(rows, labels, ctx.settings, True, upstream_T=upstream[0][done : done + len(index)])
            grad_MV[:, : rows.shape[1]].index_copy_(0, index, rows.to(grad_MV.dtype))
            done += len(index)
        return grad_MV, None, None


def _labelled_rows(
    logits_MV: Tensor, labels_M: Tensor, settings: OvertoneSettings
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(indices, a private float32 or float64 copy of their logits, their labels), a block at a time; at least one block."""
    labelled = (labels_M != IGNORE_INDEX).nonzero()[:, 0]
    dtype = torch.float64 if logits_MV.dtype == torch.float64 else torch.float32
    valid_MV = logits_MV[:, : settings.valid_vocab_size]
    elements = BLOCK_ELEMENTS_CPU if logits_MV.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    for index in labelled.split(max(1, elements // valid_MV.shape[1])):
        rows = valid_MV.index_select(0, index)
        yield index, rows.to(dtype), labels_M.index_select(0, index)


def _scatter(losses: tuple[Tensor, ...], mask: Tensor) -> TokenLosses:
    # `masked_scatter` keeps the graph connected when no label is valid: the loss is then a differentiable zero.
    full = TokenLosses(*(x.new_zeros(mask.shape).masked_scatter(mask, x) for x in losses))
    if not bool(full.kl.isfinite().all()):
        raise FloatingPointError(
            "non-finite logits: the model produced NaN or infinite values at a labelled position. Lower the learning "
            "rate or use bfloat16 instead of float16; for a vocabulary padded with -inf set valid_vocab_size."
        )
    return full


@torch.compiler.disable
def overtone_from_hidden(
    hidden: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels: Tensor,
    settings: OvertoneSettings,
    *,
    logit_scale: float = 1.0,
    final_logit_softcapping: float | None = None,
    chunk_tokens: int | None = None,
    gather: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TokenLosses:
    """The loss of `softcap(logit_scale * (hidden @ weight.T + bias))` without ever holding all logits.

    Args:
        hidden: [..., H], aligned with the labels: position i predicts label i.
        weight_VH, bias_V: the head. Gradients reach them if they require some.
        labels: [...], -100 where there is no loss. Only labelled positions are projected.
        settings: the numbers of the loss.
        logit_scale, final_logit_softcapping: what the model does to its head's output.
        chunk_tokens: tokens per chunk; the result does not depend on it. By default one that bounds the buffer.
        gather: context in which the head may be read again in the backward (ZeRO-3).

    Returns:
        `TokenLosses` in the shape of `labels`, float32 (float64 for float64 inputs).

    Raises:
        IndexError: a label is outside the vocabulary.
        FloatingPointError: a labelled position has a NaN or infinite logit.
    """
    check_labels(labels, min(len(weight_VH), settings.valid_vocab_size or len(weight_VH)))
    mask = labels != IGNORE_INDEX
    spec = _HeadSpec(settings, logit_scale, final_logit_softcapping, chunk_tokens, gather)
    return _scatter(_OvertoneHead.apply(hidden[mask], weight_VH, bias_V, labels[mask], spec), mask)


@torch.compiler.disable
def overtone_from_logits(logits: Tensor, labels: Tensor, settings: OvertoneSettings) -> TokenLosses:
    """The loss of given logits [..., V] and aligned labels [...]; returns and raises like `overtone_from_hidden`.

    Beyond the logits themselves and their gradient, only blocks of rows are allocated.
    """
    vocab = logits.shape[-1]
    check_labels(labels, min(vocab, settings.valid_vocab_size or vocab))
    mask = labels != IGNORE_INDEX
    return _scatter(_OvertoneLogits.apply(logits.reshape(-1, vocab), labels.reshape(-1), settings), mask)
