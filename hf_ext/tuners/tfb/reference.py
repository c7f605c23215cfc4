"""Training-free Bayesianization of LoRA (https://huggingface.co/papers/2412.05723): the noise, three ways to draw it, and the search for its size.

Shapes: LoRA adds `s B A x`, with `A` `(R, M)` and `B` `(N, R)`. With the thin singular value decomposition `B = U diag(d) V'`, the posterior of the update is
Gaussian with the mean `s B A` and the noise `s sigma U E`, `E` `(R, M)` of standard normals: isotropic in the column space of B. The paper rotates
the factors and puts standard deviations of `sigma / d` on the rotated A. The same distribution comes from leaving both as they are and adding
`sigma V diag(1 / d) E` to A, because `B V diag(1 / d) = U`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


def noise_map(b_NR: Tensor, rtol: float = 1e-5) -> Tensor:
    """`V diag(1 / d)` `(R, R)` in float64: what turns normals into noise on A.

    Directions with `d <= rtol * max(d)` get none, and with B = 0 none does: there the update could not move.
    """
    b_NR = b_NR.double()
    squares_R, v_RR = torch.linalg.eigh(b_NR.mT @ b_NR)
    d_R = squares_R.clamp(min=0).sqrt()
    kept_R = d_R > rtol * d_R[-1]
    return v_RR * torch.where(kept_R, 1 / d_R, 0.0)


def output_std(x_TM: Tensor, b_NR: Tensor, sigma: float, scaling: float, rtol: float = 1e-5) -> Tensor:
    """Standard deviation of the outputs of a layer for each token, `(T, N)`: `s sigma |x| |U_n|`, whichever way noise is drawn."""
    u_NR = b_NR.double() @ noise_map(b_NR, rtol)
    return scaling * sigma * x_TM.double().norm(dim=-1, keepdim=True) * u_NR.norm(dim=1)


def flipout(x_TM: Tensor, noise_RM: Tensor, signs_TM: Tensor, signs_TR: Tensor) -> Tensor:
    """What one draw of noise adds to `A x` with other signs for each token, `(T, R)` (https://huggingface.co/papers/1803.04386, eq. 4).

    Args:
        noise_RM: one draw in the rotated basis, `sigma / d_i * E_ij`.
        signs_TM, signs_TR: of 1 and -1.
    """
    return ((x_TM * signs_TM) @ noise_RM.mT) * signs_TR


@dataclass(frozen=True)
class Trial:
    """One size of noise: what the criterion was, and whether it was within the tolerance."""

    sigma: float
    change: float
    accepted: bool


@dataclass(frozen=True)
class Search:
    """What a search tried.

    Attributes:
        sigma: the largest size that was accepted; 0 if none was.
        trials: in the order they were made.
        bounded: whether a larger size was rejected: otherwise the upper end of the bracket stopped the search.
    """

    sigma: float
    trials: tuple[Trial, ...]
    bounded: bool

    @property
    def monotone(self) -> bool:
        """Whether the change grew with the size everywhere, which makes the answer the only one."""
        changes = [trial.change for trial in sorted(self.trials, key=lambda trial: trial.sigma)]
        return all(one <= other for one, other in pairwise(changes))


def largest_accepted(
    change: Callable[[float], float],
    tolerance: float,
    bracket: tuple[float, float] = (1e-4, 1.0),
    max_iters: int = 16,
    precision: float = 0.05,
) -> Search:
    """The largest size of noise whose change is within a tolerance (section 3.2 of the paper).

    From the lower end of the bracket the size is doubled until it is rejected; then bisected in its logarithm.

    Args:
        change: of the predictions, at a size of noise; at least 0, the smaller the better.
        tolerance: what is accepted, inclusive.
        bracket: smallest and largest size.
        max_iters: evaluations at most.
        precision: the search ends where rejected / accepted is at most 1 plus this.

    Raises:
        ValueError: the change is not finite somewhere.
    """
    low, high = bracket
    trials: list[Trial] = []

    def accepted(sigma: float) -> bool:
        value = change(sigma)
        if not math.isfinite(value):
            raise ValueError(f"criterion: it is {value} at sigma={sigma:g}; it has to be a finite number.")
        trials.append(Trial(sigma, value, value <= tolerance))
        return trials[-1].accepted

    best, rejected, sigma = 0.0, math.inf, low
    while len(trials) < max_iters:
        if accepted(sigma):
            best = sigma
        else:
            rejected = sigma
        if best == 0 or best == high or rejected <= best * (1 + precision):
            break
        sigma = min(2 * best, high) if rejected == math.inf else math.sqrt(best * rejected)
    return Search(best, tuple(trials), rejected < math.inf)


def reference_search(
    change: Callable[[float], float],
    threshold: float,
    bracket: tuple[float, float] = (1e-3, 1.5e-2),
    max_iters: int = 5,
    narrowest: float = 0.0,
) -> Search:
    """The search of the authors' code, for comparisons: bisection of the size itself, and **the smallest size that was rejected**, or the upper end.

    Args:
        narrowest: stop once the bracket is narrower; their criterion of changed predictions uses 5e-4.
    """
    low, high = bracket
    trials: list[Trial] = []
    while len(trials) < max_iters and high - low >= narrowest:
        middle = (low + high) / 2
        value = change(middle)
        trials.append(Trial(middle, value, value <= threshold))
        low, high = (middle, high) if trials[-1].accepted else (low, middle)
    return Search(high, tuple(trials), high < bracket[1])
