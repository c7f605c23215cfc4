"""What the network of NEAT reads of a frozen weight, without keeping a copy of the weight in another dtype for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Entries of a weight that are converted at a time.
_CHUNK = 2**22


class _Product(torch.autograd.Function):
    """(factor (R, D), a function that returns a frozen matrix (N, D)) -> matrix @ factor^T, with a gradient for the factor alone.

    Autograd would keep the matrix as it was multiplied, which is a copy in the dtype of the factor, or what a quantised weight unpacks to.
    """

    @staticmethod
    def forward(ctx: Any, factor_RD: Tensor, read: Callable[[], Tensor]) -> Tensor:
        ctx.read, ctx.dtype = read, factor_RD.dtype
        return torch.cat([rows_ND @ factor_RD.mT for rows_ND in _converted(read(), factor_RD.dtype)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NR: Tensor) -> tuple[Tensor, None]:
        start, total = 0, None
        for rows_ND in _converted(ctx.read(), gradient_NR.dtype):
            part = gradient_NR[start : start + len(rows_ND)].mT @ rows_ND
            total = part if total is None else total.add_(part)
            start += len(rows_ND)
        assert total is not None
        return total.to(ctx.dtype), None


def _converted(matrix_ND: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrix in pieces of rows, each in another dtype while it is needed."""
    rows = len(matrix_ND) if matrix_ND.dtype == dtype else max(1, _CHUNK // max(1, matrix_ND.shape[1]))
    return (piece.to(dtype) for piece in matrix_ND.split(rows))


def product(factor_RD: Tensor, read: Callable[[], Tensor], kept: bool) -> Tensor:
    """`read()` @ factor^T, `(N, R)`, in the dtype of the factor.

    Args:
        factor_RD: needs a gradient, perhaps.
        read: returns the matrix `(N, D)`; called again in the backward pass unless `kept`.
        kept: whether what it returns is held anyway, so that nothing is lost if autograd keeps it.
    """
    if kept:
        matrix_ND = read()
        if matrix_ND.dtype == factor_RD.dtype:
            return matrix_ND @ factor_RD.mT
    return _Product.apply(factor_RD, read)
