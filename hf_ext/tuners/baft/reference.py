"""The mathematics of BaFT (https://huggingface.co/papers/2503.00306): tensors in, tensors out.

A hidden state h `(D,)`, the output of a block at one token, is moved inside a learnt subspace with orthonormal basis vectors r_k, the rows
of R `(K, D)`, and each basis vector has a weight of its own that depends on h:

    h' = h + sum_k w_k(h) r_k (a_k . h + b_k - r_k . h) = h + R^T diag(w(h)) (A h + b - R h)

with A `(K, D)` and b `(K,)`. Constant weights of 1 are LoReFT, whose update is linear in h and so reaches every input alike; a weight of 0 leaves
an input alone. The paper's weight network is not public; here w(h) = sigmoid(U h + c) unless another gate is named.

R is kept orthonormal by what it is computed from: with W `(K, D)` free and W W^T = L L^T its Cholesky factorisation, R = L^-1 W. R itself is never
formed: R h = L^-1 (W h), and R^T v = W^T (L^-T v).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def factorise(free_KD: Tensor) -> Tensor:
    """L, `(K, K)`, lower triangular, with L L^T = W W^T.

    Raises:
        ValueError: rows of W are linearly dependent, or not finite.
    """
    try:
        return torch.linalg.cholesky(free_KD @ free_KD.mT)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            "the basis of a BaFT adapter has collapsed: its vectors are linearly dependent or not finite. Lower the learning rate, or r."
        ) from error


def in_basis(products: Tensor, lower_KK: Tensor) -> Tensor:
    """R h from W h, `(..., K)`: L^-1 applied to the last dimension."""
    return torch.linalg.solve_triangular(lower_KK.mT, products, upper=True, left=False)


def before_basis(coordinates: Tensor, lower_KK: Tensor) -> Tensor:
    """What W^T is to be applied to for R^T v, `(..., K)`: L^-T v."""
    return torch.linalg.solve_triangular(lower_KK, coordinates, upper=False, left=False)


def orthonormal_basis(free_KD: Tensor) -> Tensor:
    """R itself, `(K, D)`."""
    return torch.linalg.solve_triangular(factorise(free_KD), free_KD, upper=False)


def intervene(
    hidden: Tensor,
    free_KD: Tensor,
    targets_KD: Tensor,
    bias_K: Tensor,
    gate: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(update of the hidden states `(..., D)`, weights of the basis vectors `(..., K)`).

    Args:
        hidden: h, `(..., D)`, in the dtype of the parameters.
        free_KD: W.
        targets_KD, bias_K: A and b.
        gate: h -> w(h); None: all 1, which is LoReFT.
    """
    lower_KK = factorise(free_KD)
    inner = hidden @ targets_KD.mT + bias_K - in_basis(hidden @ free_KD.mT, lower_KK)
    weights = torch.ones_like(inner) if gate is None else gate(hidden)
    return before_basis(weights * inner, lower_KK) @ free_KD, weights


def load_balance(past_K: Tensor, mean_K: Tensor) -> Tensor:
    """How much the weights of this edit fall on basis vectors that earlier edits use: K <past / sum past, mean / sum mean>.

    1 if either is spread evenly, K if both are on one vector, 0 before the first edit and where no token is edited.

    Args:
        past_K: sums of the mean weights of earlier edits.
        mean_K: mean weights of this one.
    """
    if not bool(past_K.any()):
        return mean_K.sum() * 0
    least = torch.finfo(mean_K.dtype).tiny
    return len(mean_K) * (past_K / past_K.sum() * mean_K / mean_K.sum().clamp(min=least)).sum()


def unevenness(usage_K: Tensor) -> Tensor:
    """The squared coefficient of variation of the use of the basis vectors: another form of load balancing."""
    return usage_K.var(correction=0) / usage_K.mean().square()


def gate_penalty(weights: Tensor) -> Tensor:
    """Mean square of the weights `(..., K)`, for text that an edit is to leave alone."""
    return weights.square().mean()
