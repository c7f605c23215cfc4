"""The protected part of a weight, and coordinates in which nothing else can be changed. Needs torch alone.

Paper: https://huggingface.co/papers/2504.07097. The weight W = U diag(s) V^T (N x M) of a linear layer is split after its k
largest singular values. With U_h, V_h the first k singular vectors, an update is confined to

    dW = (I - U_h U_h^T) D (I - V_h V_h^T),                                                                ("double")

so that W' V_h = U_h S_h and U_h^T W' = S_h V_h^T hold for every later W': the first k triplets stay singular triplets. The
paper prints

    dW = D - U_h U_h^T D V_h V_h^T,                                                                        ("joint")

which leaves the blocks between protected and free directions open; the authors' code does what is called "double" here, with
factors in the place of the weight.

Everything is computed on the short side. Its singular vectors are the eigenvectors of the smaller Gram matrix, in float64;
those of the long side are never stored, since V_h S_h = W^T U_h holds for the weight as it is at any time.

Shapes: N outputs, M inputs of the layer, k the protected rank; in `Subspace` the short side has P = min(N, M) entries and
the long one Q = max(N, M). Leading dimensions, such as experts, are not supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Singular values below this share of the largest are noise of float32: their directions cannot be told from each other.
_NOISE = 1e-6


@dataclass(frozen=True)
class Subspace:
    """What is protected of one weight.

    Attributes:
        basis_PP: singular vectors of the short side, the first `rank` of them protected, float32, orthonormal columns.
        values_P: singular values, falling, float32.
        rank: k.
        wide: rows are the short side (N <= M); else the weight is used transposed.
    """

    basis_PP: Tensor
    values_P: Tensor
    rank: int
    wide: bool

    @property
    def free_PF(self) -> Tensor:
        """Basis of what may change on the short side, `(P, P - k)`."""
        return self.basis_PP[:, self.rank :]

    @property
    def kept_PK(self) -> Tensor:
        """Basis of what is protected on the short side, `(P, k)`."""
        return self.basis_PP[:, : self.rank]

    @cached_property
    def sure_rank(self) -> int:
        """How many of the protected directions have a singular value above the noise, so that W^T U_h / s_h = V_h."""
        return min(self.rank, int((self.values_P > _NOISE * self.values_P[:1]).sum()))

    @property
    def cuts_between_equals(self) -> bool:
        """Whether the last protected singular value and the first free one are equal but for rounding."""
        if not 0 < self.rank < len(self.values_P):
            return False
        last, following = self.values_P[self.rank - 1], self.values_P[self.rank]
        return bool(following > _NOISE * self.values_P[0]) and bool(last - following <= _NOISE * self.values_P[0])

    def oriented(self, matrix_NM: Tensor) -> Tensor:
        """The matrix with its short side first, `(P, Q)`; a view, and its own inverse."""
        return matrix_NM if self.wide else matrix_NM.mT


def singular_basis(weight_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(singular vectors of the short side `(P, P)`, singular values `(P,)`), largest first, float32.

    From the eigenvectors of W W^T or W^T W in float64, which are closer to the exact ones than a float32 SVD. The sign of each vector is that which makes its largest entry positive.

    Raises:
        ValueError: the weight is not a matrix, or has entries that are not finite.
    """
    if weight_NM.ndim != 2:
        raise ValueError(
            f"a weight of shape {tuple(weight_NM.shape)} is no matrix: leave this module out of the targets."
        )
    if not bool(weight_NM.isfinite().all()):
        raise ValueError(
            "the weight has entries that are NaN or infinite, so it has no singular values: check the model."
        )
    exact = weight_NM.detach().double()
    short = exact if exact.shape[0] <= exact.shape[1] else exact.mT
    squares, vectors = torch.linalg.eigh(short @ short.mT)
    vectors, values = vectors.flip(-1), squares.flip(-1).clamp(min=0).sqrt()
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    # A basis that is saved and loaded is contiguous, and products with it are to be the same to the last bit.
    return (vectors * largest.sign()).float().contiguous(), values.float()


def protect(weight_NM: Tensor, basis: tuple[Tensor, Tensor], rank: int) -> Subspace:
    """The subspace of a weight whose `singular_basis` is known.

    Raises:
        ValueError: `rank` is outside 0 to min(N, M).
    """
    if not 0 <= rank <= len(basis[1]):
        raise ValueError(
            f"rank={rank}: a weight of shape {tuple(weight_NM.shape)} has {len(basis[1])} singular directions."
        )
    return Subspace(*basis, rank, weight_NM.shape[0] <= weight_NM.shape[1])


def split_weight(weight_NM: Tensor, rank: int) -> Subspace:
    """Protect the `rank` largest singular directions of a weight; raises what `singular_basis` and `protect` raise."""
    return protect(weight_NM, singular_basis(weight_NM), rank)


def long_basis(weight_PQ: Tensor, subspace: Subspace, rows: int, times: int = 1) -> Tensor | None:
    """V_h = W^T U_h / s_h, `(Q, k)`, if `times` projections of that many rows are faster with it; else None.

    Args:
        weight_PQ: oriented, in the dtype of the rows.
        subspace: of the weight.
        rows, times: of what will be projected.
    """
    rank, short = subspace.sure_rank, len(weight_PQ)
    if rank * short + 2 * times * rows * rank > 2 * times * rows * short:
        return None
    return weight_PQ.mT @ (subspace.basis_PP[:, :rank] / subspace.values_P[:rank]).to(weight_PQ.dtype)


def without_long_side(rows_FQ: Tensor, weight_PQ: Tensor, subspace: Subspace, long_QK: Tensor | None) -> Tensor:
    """`rows (I - V_h V_h^T)` on the long side, of the same shape and dtype.

    Args:
        rows_FQ: what is projected, with the long side last.
        weight_PQ: the weight, oriented, in the dtype of the rows; its protected directions are as when it was split.
        subspace: of the weight.
        long_QK: what `long_basis` gave for it.
    """
    if long_QK is not None:
        return torch.addmm(rows_FQ, rows_FQ @ long_QK, long_QK.mT, alpha=-1)
    # rows V_h V_h^T = rows W^T U_h s_h^-2 U_h^T W, with the scale where it is smallest.
    basis_PK = subspace.basis_PP[:, : subspace.sure_rank].to(rows_FQ.dtype)
    inside_FK = rows_FQ @ weight_PQ.mT @ basis_PK / subspace.values_P[: subspace.sure_rank].square().to(rows_FQ.dtype)
    return torch.addmm(rows_FQ, inside_FK @ basis_PK.mT, weight_PQ, alpha=-1)


def project(matrix_NM: Tensor, weight_NM: Tensor, subspace: Subspace, joint: bool = False) -> Tensor:
    """The part of a matrix inside the subspace, `(N, M)`: "double", or the paper's "joint"."""
    matrix_PQ, weight_PQ = subspace.oriented(matrix_NM), subspace.oriented(weight_NM).to(matrix_NM.dtype)
    kept_PK = subspace.kept_PK.to(matrix_NM.dtype)
    long_QK = long_basis(weight_PQ, subspace, subspace.rank if joint else len(matrix_PQ))
    if not joint:
        left_PQ = torch.addmm(matrix_PQ, kept_PK, kept_PK.mT @ matrix_PQ, alpha=-1)
        return subspace.oriented(without_long_side(left_PQ, weight_PQ, subspace, long_QK))
    rows_KQ = kept_PK.mT @ matrix_PQ
    protected_KQ = rows_KQ - without_long_side(rows_KQ, weight_PQ, subspace, long_QK)
    return subspace.oriented(torch.addmm(matrix_PQ, kept_PK, protected_KQ, alpha=-1))


def reduce(gradient_NM: Tensor, subspace: Subspace) -> Tensor:
    """A gradient in coordinates of the free directions of the short side, `(P - k, Q)`."""
    return subspace.free_PF.mT.to(gradient_NM.dtype) @ subspace.oriented(gradient_NM)


def add_expanded(matrix_NM: Tensor, change_FQ: Tensor, subspace: Subspace) -> None:
    """Add the change `(P - k, Q)` of the coordinates to a matrix `(N, M)` in place."""
    subspace.oriented(matrix_NM).addmm_(subspace.free_PF.to(matrix_NM.dtype), change_FQ)


def drift(weight_NM: Tensor, subspace: Subspace) -> float:
    """How much of what is protected has moved: |W W^T U_h - U_h S_h^2| / |S_h^2|; 0 while both invariants hold."""
    weight_PQ, kept_PK = subspace.oriented(weight_NM).double(), subspace.kept_PK.double()
    squares_K = subspace.values_P[: subspace.rank].double().square()
    moved_PK = weight_PQ @ (weight_PQ.mT @ kept_PK) - kept_PK * squares_K
    return float(moved_PK.norm() / squares_K.norm().clamp(min=torch.finfo(torch.float64).tiny))
