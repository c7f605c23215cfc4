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

# Elements of the [T, V] buffer that holds one chunk of logits. 2^23 is 32 MiB in float32 and 32 tokens of a 262,144-word
# vocabulary. Larger chunks read the head's weight less often, smaller ones need less memory.
_CHUNK_ELEMENTS_CPU = 2**23
_CHUNK_ELEMENTS_GPU = 2**25
# A trained head has a gradient of its own size anyway, which every chunk reads and writes.
_CHUNK_GROWTH_FOR_TRAINED_HEAD = 2
# Rows of the head's weight converted at a time when it is stored in another dtype than the product is computed in.
_WEIGHT_SLICE = 32768


def _weight_slices(weight_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the head in `dtype`; in slices if they must be converted, to never hold a second copy of the head."""
    step = len(weight_VH) if weight_VH.dtype == dtype else _WEIGHT_SLICE
    for start in range(0, len(weight_VH), step):
        rows = slice(start, min(start + step, len(weight_VH)))
        yield rows, weight_VH[rows].to(dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in the dtype of `total` (float32 or float64), without rounding the product before the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


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
        device = hidden_NH.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        head_is_trained = any(ctx.needs_input_grad[1:3])
        ahead = ctx.needs_input_grad[0] and not head_is_trained
        grad_NH = torch.empty_like(hidden_NH) if ahead else None
        parts = []
        for chunk, rows_TV in _projected_chunks(hidden_NH, weight_VH, bias_V, dtype, spec, head_is_trained):
            parts.append(score_rows_(rows_TV, labels_N[chunk], spec.settings, ahead, spec.logit_scale, spec.softcap))
            if grad_NH is not None:
                grad_NH[chunk] = _times_weight(rows_TV, weight_VH)
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
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total_dtype = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        spec: _HeadSpec = ctx.spec
        with spec.gather():
            grad_NH = torch.empty_like(hidden_NH) if need_hidden else None
            grad_VH = torch.zeros_like(weight_VH, dtype=total_dtype) if need_weight else None
            grad_V = torch.zeros(len(weight_VH), dtype=total_dtype, device=weight_VH.device) if need_bias else None
            for chunk, rows_TV in _projected_chunks(hidden_NH, weight_VH, bias_V, ctx.dtype, spec, True):
                score_rows_(
                    rows_TV, labels_N[chunk], spec.settings, True, spec.logit_scale, spec.softcap, upstream_N[chunk]
                )
                if grad_NH is not None:
                    grad_NH[chunk] = _times_weight(rows_TV, weight_VH)
                if grad_VH is not None:
                    chunk_TH = hidden_NH[chunk].to(ctx.dtype)
                    # In slices, because float32 copies of low-precision operands are made on some devices.
                    for start in range(0, rows_TV.shape[1], _WEIGHT_SLICE):
                        columns = slice(start, min(start + _WEIGHT_SLICE, rows_TV.shape[1]))
                        _accumulate(grad_VH[columns], rows_TV[:, columns].t(), chunk_TH)
                if grad_V is not None:
                    grad_V[: rows_TV.shape[1]] += rows_TV.sum(0, dtype=total_dtype)
        return (
            grad_NH,
            None if grad_VH is None else grad_VH.to(weight_VH.dtype),
            None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
            None,
            None,
        )


def _projected_chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    dtype: torch.dtype,
    spec: _HeadSpec,
    head_is_trained: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of tokens with their head outputs [T, V] in one reused buffer, which the caller may overwrite."""
    weight_VH = weight_VH[: spec.settings.valid_vocab_size]
    tokens, vocab = len(hidden_NH), len(weight_VH)
    elements = _CHUNK_ELEMENTS_CPU if hidden_NH.device.type == "cpu" else _CHUNK_ELEMENTS_GPU
    elements *= _CHUNK_GROWTH_FOR_TRAINED_HEAD if head_is_trained else 1
    step = max(1, min(tokens, spec.chunk_tokens or max(1, elements // vocab)))
    buffer = torch.empty(step, vocab, dtype=dtype, device=hidden_NH.device)
    for start in range(0, max(tokens, 1), step):
        chunk = slice(start, min(start + step, tokens))
        chunk_TH = hidden_NH[chunk].to(dtype)
        rows_TV = buffer[: len(chunk_TH)]
        for columns, weight in _weight_slices(weight_VH, dtype):
            torch.mm(chunk_TH, weight.t(), out=rows_TV[:, columns])
        if bias_V is not None:
            rows_TV += bias_V[:vocab].to(dtype)
        yield chunk, rows_TV


def _times_weight(rows_TV: Tensor, weight_VH: Tensor) -> Tensor:
    """[T, V] @ [V, H]; rounded once if the product is one matrix multiplication, summed in float32 over slices if not."""
    if weight_VH.dtype == rows_TV.dtype:
        return rows_TV @ weight_VH[: rows_TV.shape[1]]
    dtype = torch.float64 if rows_TV.dtype == torch.float64 else torch.float32
    total_TH = torch.zeros(len(rows_TV), weight_VH.shape[1], dtype=dtype, device=rows_TV.device)
    for columns, weight in _weight_slices(weight_VH[: rows_TV.shape[1]], rows_TV.dtype):
        _accumulate(total_TH, rows_TV[:, columns], weight)
    return total_TH


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
