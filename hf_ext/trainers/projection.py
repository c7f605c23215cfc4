"""Products with the output layer of a language model, which its vocabulary makes the largest of all. Needs torch alone.

A loss goes through its tokens in chunks and multiplies each with the layer's weight. Here this takes no second copy of
the weight, and gradients are summed in float32 at least.

Shapes: N tokens, T of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Rows of the weight converted at a time when it is stored in another dtype than the product is computed in.
WEIGHT_SLICE = 32768


def slices(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of `step` items, the last one shorter."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies these hidden states, also under autocast."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def weight_slices(weight_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the weight in `dtype`; in slices if they must be converted, to never hold a second copy of it."""
    for rows in slices(len(weight_VH), len(weight_VH) if weight_VH.dtype == dtype else WEIGHT_SLICE):
        yield rows, weight_VH[rows].to(dtype)


def project(hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, out_TV: Tensor) -> Tensor:
    """`hidden @ weight.T + bias`, written to `out_TV` in its dtype; as many rows of the weight as it has columns."""
    vocab, dtype = out_TV.shape[1], out_TV.dtype
    hidden_TH = hidden_TH.to(dtype)
    for columns, weight in weight_slices(weight_VH[:vocab], dtype):
        torch.mm(hidden_TH, weight.t(), out=out_TV[:, columns])
    if bias_V is not None:
        out_TV += bias_V[:vocab].to(dtype)
    return out_TV


def times_weight(rows_TV: Tensor, weight_VH: Tensor) -> Tensor:
    """[T, V] @ [V, H]; rounded once if the product is one matrix multiplication, summed in float32 over slices if not.

    The weight may have more rows than `rows_TV` has columns.
    """
    weight_VH = weight_VH[: rows_TV.shape[1]]
    if weight_VH.dtype == rows_TV.dtype:
        return rows_TV @ weight_VH
    dtype = torch.promote_types(rows_TV.dtype, torch.float32)
    total_TH = torch.zeros(len(rows_TV), weight_VH.shape[1], dtype=dtype, device=rows_TV.device)
    for columns, weight in weight_slices(weight_VH, rows_TV.dtype):
        accumulate_(total_TH, rows_TV[:, columns], weight)
    return total_TH


def accumulate_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in the dtype of `total` (float32 or float64), without rounding the product before the sum."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def projection_gradients(
    needed: Sequence[bool],
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    dtype: torch.dtype,
    chunks: Iterable[tuple[slice, Tensor]],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the hidden states, the weight and the bias through `project`.

    Args:
        needed: which of the three; the others are None.
        hidden_NH, weight_VH, bias_V: what was projected.
        dtype: of the products.
        chunks: (tokens, gradient [T, V] of their projections in `dtype`); V may be smaller than the weight's.
    """
    need_hidden, need_weight, need_bias = needed
    total_dtype = torch.promote_types(dtype, torch.float32)
    grad_NH = torch.empty_like(hidden_NH) if need_hidden else None
    grad_VH = torch.zeros_like(weight_VH, dtype=total_dtype) if need_weight else None
    grad_V = torch.zeros(len(weight_VH), dtype=total_dtype, device=weight_VH.device) if need_bias else None
    for chunk, rows_TV in chunks:
        vocab = rows_TV.shape[1]
        if grad_NH is not None:
            grad_NH[chunk] = times_weight(rows_TV, weight_VH)
        if grad_VH is not None:
            chunk_TH = hidden_NH[chunk].to(dtype)
            # In slices, because float32 copies of low-precision operands are made on some devices.
            for columns in slices(vocab, WEIGHT_SLICE):
                accumulate_(grad_VH[columns], rows_TV[:, columns].t(), chunk_TH)
        if grad_V is not None:
            grad_V[:vocab] += rows_TV.sum(0, dtype=total_dtype)
    return (
        grad_NH,
        None if grad_VH is None else grad_VH.to(weight_VH.dtype),
        None if grad_V is None or bias_V is None else grad_V.to(bias_V.dtype),
    )
