"""The eight f-divergences of FLAT, each as functions of one probability v in [0, 1].

Paper: https://huggingface.co/papers/2410.11143; activations after f-GAN, https://huggingface.co/papers/1606.00709.
Tensors in, tensors out.

A divergence is a convex generator f with f(1) = 0. Its conjugate is f*(t) = max over u > 0 of (u t - f(u)), and g* is
the increasing function that maps a critic's output into the domain of f*. FLAT uses the probability of an answer as
that output, so on [0, 1] every function below is finite and smooth, and f*(g*(v)) is written in the form that cancels
nothing.

The authors' code has the opposite sign in reverse KL and squared Hellinger, which raises the probability it should
lower, and leaves out the activation of Neyman; here they follow the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

# Halley's iteration triples the correct digits; six steps reach float64 from the starting point for every x >= 0.
_HALLEY_STEPS = 6


class _LambertW(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        w = x.log1p()
        for _ in range(_HALLEY_STEPS):
            residual = w - x * (-w).exp()
            w = w - residual / (w + 1 - (w + 2) * residual / (2 * w + 2))
        ctx.save_for_backward(w)
        return w

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return upstream * (-w).exp() / (1 + w)


def lambert_w(x: Tensor) -> Tensor:
    """The principal branch W0 for x >= 0: the w with w e^w = x. Its derivative is e^-w / (1 + w)."""
    return _LambertW.apply(x)


class Divergence(NamedTuple):
    """One divergence; every field maps a tensor to a tensor of the same shape.

    Attributes:
        activation: g*(v).
        activation_slope: its derivative, the pull towards the template answer.
        conjugate: f*(g*(v)).
        conjugate_slope: its derivative, the push away from the answer to forget.
        generator: f(u) for u > 0.
    """

    activation: Callable[[Tensor], Tensor]
    activation_slope: Callable[[Tensor], Tensor]
    conjugate: Callable[[Tensor], Tensor]
    conjugate_slope: Callable[[Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def _half_tanh(v: Tensor) -> Tensor:
    return v.tanh() / 2


def _half_tanh_slope(v: Tensor) -> Tensor:
    return (1 - v.tanh().square()) / 2


def _one_minus_exp(v: Tensor) -> Tensor:
    return -torch.expm1(-v)


def _exp_minus(v: Tensor) -> Tensor:
    return (-v).exp()


def _identity(v: Tensor) -> Tensor:
    return v


def _jeffrey_conjugate(v: Tensor) -> Tensor:
    # W + 1/W + v - 2 with W = W0(e^(1-v)), less v = 1 - W - log W.
    w = lambert_w((1 - v).exp())
    return 1 / w - 1 - w.log()


def _jeffrey_conjugate_slope(v: Tensor) -> Tensor:
    return 1 / lambert_w((1 - v).exp())


DIVERGENCES: dict[str, Divergence] = {
    "kl": Divergence(
        _identity, torch.ones_like, lambda v: (v - 1).exp(), lambda v: (v - 1).exp(), lambda u: u * u.log()
    ),
    "js": Divergence(
        lambda v: math.log(2) - softplus(-v),
        lambda v: (-v).sigmoid(),
        lambda v: softplus(v) - math.log(2),
        torch.sigmoid,
        lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    ),
    "tv": Divergence(_half_tanh, _half_tanh_slope, _half_tanh, _half_tanh_slope, lambda u: (u - 1).abs() / 2),
    "pearson": Divergence(
        _identity, torch.ones_like, lambda v: v.square() / 4 + v, lambda v: v / 2 + 1, lambda u: (u - 1).square()
    ),
    "jeffrey": Divergence(
        _identity, torch.ones_like, _jeffrey_conjugate, _jeffrey_conjugate_slope, lambda u: (u - 1) * u.log()
    ),
    "reverse_kl": Divergence(lambda v: -(-v).exp(), _exp_minus, lambda v: v - 1, torch.ones_like, lambda u: -u.log()),
    "squared_hellinger": Divergence(
        _one_minus_exp, _exp_minus, torch.expm1, torch.exp, lambda u: (u.sqrt() - 1).square()
    ),
    "neyman": Divergence(
        _one_minus_exp,
        _exp_minus,
        lambda v: -2 * torch.expm1(-v / 2),
        lambda v: (-v / 2).exp(),
        lambda u: (1 - u).square() / u,
    ),
}


def get_divergence(name: str) -> Divergence:
    """The divergence of that name; raises `ValueError` listing the names for another."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence={name!r} is unknown: choose one of {', '.join(DIVERGENCES)}.")
    return DIVERGENCES[name]


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def flat_weights(p_template: Tensor, p_forget: Tensor, divergence: str) -> tuple[Tensor, Tensor]:
    """(lambda_e, lambda_f) = (-dL/dP_template, dL/dP_forget) of `flat_loss` with both coefficients 1; no gradient.

    A divergence acts through these two bounded numbers alone.
    """
    chosen = get_divergence(divergence)
    return chosen.activation_slope(full_precision(p_template)), chosen.conjugate_slope(full_precision(p_forget))
