"""The mathematics of RoseLoRA (https://huggingface.co/papers/2406.10777): tensors in, tensors out.

Shapes: r rank, I input features, O output features. A is [r, I] and is pruned inside each row (dim 1); B is [O, r] and is
pruned inside each column (dim 0). The update is s * B @ A. "Line" means one row of A or one column of B.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def density_at(step: float, t_init: int, t_final: int, kept: float) -> float:
    """Fraction of entries that each line keeps after optimizer step `step`.

    1 while step <= t_init; kept + (1 - kept) * (1 - (step - t_init) / (t_final - t_init))**3 up to t_final; `kept` from
    there on.

    Args:
        step: optimizer step, counted from 1.
        t_init, t_final: last dense step and first step at full sparsity, t_init < t_final.
        kept: the paper's tau, the fraction of entries kept at the end, in (0, 1].
    """
    if step <= t_init:
        return 1.0
    if step >= t_final:
        return kept
    return kept + (1 - kept) * (1 - (step - t_init) / (t_final - t_init)) ** 3


def keep_count(length: int, density: float) -> int:
    """Entries that a line of `length` entries keeps at `density`: its ceiling, at least one."""
    return min(length, max(1, math.ceil(density * length - 1e-9)))


def sensitivity(weight: Tensor, grad: Tensor) -> Tensor:
    """|w * g| in float32 (float64 for float64 input): how much the loss would move if the entry were zero."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) * grad.to(dtype)).abs_()


def update_importance(importance: Tensor, sensitivity: Tensor, beta: float) -> Tensor:
    """Exponential average beta * importance + (1 - beta) * sensitivity, in place.

    An entry whose sensitivity is not finite (an overflown loss scale) leaves its average alone.
    """
    usable = torch.where(sensitivity.isfinite(), sensitivity, importance)
    return importance.mul_(beta).add_(usable, alpha=1 - beta)


def topk_mask(importance: Tensor, density: float, dim: int) -> Tensor:
    """Boolean mask that keeps the `keep_count` most important entries of every line; equal ones go to the lower index.

    A line without any importance is kept whole: there is nothing yet to choose by.

    Args:
        importance: [..., r, I] or [..., O, r], not negative, finite.
        density: fraction to keep.
        dim: the dimension that runs along a line, -1 for A and -2 for B.
    """
    keep = keep_count(importance.shape[dim], density)
    if keep == importance.shape[dim]:
        return torch.ones_like(importance, dtype=torch.bool)
    threshold = importance.topk(keep, dim=dim).values.amin(dim, keepdim=True)
    above = importance > threshold
    tied = importance == threshold
    room = keep - above.sum(dim, keepdim=True)
    mask = above | (tied & (tied.cumsum(dim) <= room))
    return mask | (importance.amax(dim, keepdim=True) == 0)


def threshold_mask(importance: Tensor, density: float, dim: int) -> Tensor:
    """The rule of the authors' code: drop what lies strictly below the floor(n * (1 - density))-th smallest importance.

    It keeps one entry more than `topk_mask`, and all ties. Only for comparison with that code.
    """
    length = importance.shape[dim]
    rank = int(length * (1 - density))
    if rank == 0:
        return torch.ones_like(importance, dtype=torch.bool)
    return importance >= importance.kthvalue(rank, dim=dim, keepdim=True).values


MASK_RULES = {"topk": topk_mask, "reference": threshold_mask}


def prune_(weight: Tensor, mask: Tensor, value_clip: float | None = None) -> Tensor:
    """Zero the entries of `weight` outside `mask` and clamp the rest to [-value_clip, value_clip], in place."""
    weight.masked_fill_(~mask, 0)
    return weight if value_clip is None else weight.clamp_(-value_clip, value_clip)


def product_nonzeros(a_RI: Tensor, b_OR: Tensor) -> int:
    """Entries of B @ A that some rank-1 component reaches, without forming the product.

    Rows of B with the same support reach the same columns, so each distinct support is counted once.
    """
    supports, counts = (b_OR != 0).unique(dim=0, return_counts=True)
    reached = (supports.float() @ (a_RI != 0).float() > 0).sum(1)
    return int((reached * counts).sum())


def product_density_bound(a_RI: Tensor, b_OR: Tensor) -> float:
    """Upper bound on the density of B @ A (Proposition 1): min(1, sum_i density(A[i]) * density(B[:, i]))."""
    per_component = (a_RI != 0).double().mean(1) * (b_OR != 0).double().mean(0)
    return min(1.0, float(per_component.sum()))
