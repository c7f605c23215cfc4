"""DICE in formulas: how tokens are taken apart under noise, and put together again with another condition.

Shapes: B rows, N tokens, V values of a token, S states. Tokens and masks are `(B, N)`, logits `(B, N, V)`; all in the dtype of their arguments, which should be float32 or wider.
Source: https://huggingface.co/papers/2410.08207, Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Share of tokens that are noise, as a function of time in [0, 1].
MASK_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: 1 - math.cos(math.pi * t / 2),
    "late_cosine": lambda t: math.cos(math.pi * (t - 1) / 2),
    "root": lambda t: 1 - math.sqrt(1 - t),
    "early_root": lambda t: math.sqrt(t),
}
CONVENTIONS = ("paper", "paella")


@dataclass(frozen=True)
class State:
    """A state of the trajectory: the share of noise in it, the time that the model is told, and what its logits are divided by."""

    fraction: float
    time: float
    temperature: float = 1.0


def trajectory(
    steps: int,
    tau: float,
    schedule: str = "linear",
    temperatures: tuple[float, float] = (1.0, 1.0),
    convention: str = "paper",
    from_noise: bool = False,
) -> list[State]:
    """States from the least noise to the most.

    Args:
        from_noise: begin with the first state that has noise: S equal times up to tau, without 0.

    `"paper"`: S states at equal times from 0 to tau. `"paella"`: the S - 1 of the authors' image code, each of which the model is told to be one place later on a finer grid.
    """
    share = MASK_SCHEDULES[schedule]

    def between(first: float, last: float, count: int) -> list[float]:
        return torch.linspace(first, last, count, dtype=torch.float64).tolist()

    times, scales = between(0, tau, steps), between(*temperatures, steps)
    if from_noise:
        times = between(0, tau, steps + 1)[1:]
    if convention == "paper":
        return [State(share(time), time, scale) for time, scale in zip(times, scales, strict=True)]
    told = between(0, tau, steps + 1)
    return [State(share(times[k - 1]), told[k], scales[k]) for k in range(1, steps)]


def noised(tokens_BN: Tensor, noise_BN: Tensor, uniforms_BN: Tensor, fraction: float) -> Tensor:
    """Tokens of a state. A position that is noise once is noise in all later states, since its uniform number stays the same."""
    return torch.where(uniforms_BN <= fraction, noise_BN, tokens_BN)


def gumbel(uniforms: Tensor, tiny: float = 1e-20) -> Tensor:
    """Standard Gumbel noise."""
    return -torch.log(-torch.log(uniforms + tiny) + tiny)


# -- inversion ---------------------------------------------------------------------------------------------------------------


def anchor_logits(
    logits_BNV: Tensor, tokens_BN: Tensor, mode: str, floor: float = -10.0, margin: float = 1.0
) -> Tensor:
    """Logits whose largest are at the tokens: what full strength leads back to.

    Args:
        logits_BNV: of the model for the tokens without noise; `"onehot"` takes their shape alone.
        mode: `"model"`, these logits, as the authors; exact only where the model repeats what it sees. `"corrected"`, the same, but each token is at least `margin` above the rest. `"onehot"`, 0 at the token and
            `floor` elsewhere.
    """
    chosen_BN1 = tokens_BN[..., None]
    if mode == "onehot":
        return torch.full_like(logits_BNV, floor).scatter_(-1, chosen_BN1, 0.0)
    if mode == "model":
        return logits_BNV
    own_BN1 = logits_BNV.gather(-1, chosen_BN1)
    rest_BN1 = logits_BNV.scatter(-1, chosen_BN1, -math.inf).amax(-1, keepdim=True)
    return logits_BNV.scatter(-1, chosen_BN1, torch.maximum(own_BN1, rest_BN1 + margin))


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance; 1 is none."""
    return scale * conditional + (1 - scale) * unconditional


def residual(anchor_BNV: Tensor, logits_BNV: Tensor, temperature: float) -> Tensor:
    """z: what the anchor has beyond the prediction for a state."""
    return anchor_BNV - logits_BNV / temperature


# -- editing -----------------------------------------------------------------------------------------------------------------


def scheduled(value: float | Tensor, step: int, steps: int, kind: str = "constant") -> float | Tensor:
    """Strength of the residual in an editing step: constant, linear to 0, or exponential to 1 in the last."""
    left = 1.0 if steps == 1 else 1 - step / (steps - 1)
    return {"constant": value, "linear": value * left, "exp": value**left}[kind]


def injected(
    logits_BNV: Tensor,
    residual_BNV: Tensor,
    gumbel_BNV: Tensor | float,
    lambda1: float | Tensor,
    lambda2: float | Tensor,
    how: str = "add",
) -> Tensor:
    """Logits with the residual and with noise: their sum, a sum whose variance is kept, or the larger of the two.

    Args:
        lambda1, lambda2: strengths of residual and noise; tensors are one per row or position, `(B, 1, 1)` or `(B, N, 1)`.
    """
    if how == "max":
        return logits_BNV + torch.maximum(lambda1 * residual_BNV, torch.as_tensor(lambda2 * gumbel_BNV))
    if how == "variance_preserving":
        lambda1, lambda2 = lambda1**0.5, lambda2**0.5
    return logits_BNV + lambda1 * residual_BNV + lambda2 * gumbel_BNV


# -- multinomial diffusion -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """The mask-and-replace kernel with K values and a mask, the last one, by time: `a` to stay, `b` to become each of the values, `c` to be masked; `aa`, `bb`, `cc` are those of all steps
    up to a time, with one more entry, for no step.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    aa: Tensor
    bb: Tensor
    cc: Tensor


LOG_FLOOR = math.log(1e-30)
LEAST = -70.0


def log_onehot(tokens_BN: Tensor, values: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`(B, N, values)`: 0 at the token, log(1e-30) elsewhere."""
    floor = torch.full((*tokens_BN.shape, values), LOG_FLOOR, dtype=dtype, device=tokens_BN.device)
    return floor.scatter_(-1, tokens_BN[..., None], 0.0)


def _spread(log_BNV: Tensor, stay: Tensor, replace: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities after the kernel, of values and mask."""
    values = torch.logaddexp(log_BNV[..., :-1] + stay.log(), replace.log())
    masked = torch.logaddexp(log_BNV[..., -1:] + torch.log1p(-mask), mask.log())
    return torch.cat([values, masked], -1)


def truncated(log_BNK: Tensor, rate: float) -> Tensor:
    """Log-probabilities of the likeliest values that make up `rate` of the probability, the first of them in any case; -70 for the others."""
    if rate == 1:
        return log_BNK.clamp(min=LEAST)
    ordered, places = log_BNK.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1).roll(1, -1)
    before[..., 0] = 0.0
    kept = torch.empty_like(before, dtype=torch.bool).scatter_(-1, places, before < rate)
    return torch.where(kept, log_BNK, LEAST).clamp(min=LEAST)


def log_noised(tokens_BN: Tensor, time: int, kernel: Kernel, values: int) -> Tensor:
    """log q(x_t | x_0), `(B, N, V)`, V = K + 1 with the mask."""
    return _spread(log_onehot(tokens_BN, values, kernel.a.dtype), kernel.aa[time], kernel.bb[time], kernel.cc[time])


def log_posterior(log_x0_BNK: Tensor, noisy_BN: Tensor, time: int, kernel: Kernel) -> Tensor:
    """log p(x_{t-1} | x_t), `(B, N, K + 1)`: the mean over x_0 of q(x_{t-1} | x_t, x_0), each at least -70.

    Args:
        log_x0_BNK: log p(x_0 | x_t) of the model.
    """
    values = log_x0_BNK.shape[-1] + 1
    masked_BN1 = (noisy_BN == values - 1)[..., None]
    seen_BNV = log_onehot(noisy_BN, values, log_x0_BNK.dtype)
    # Of the token that is seen, from each value: after all steps, and after the last one alone.
    from_x0_BNK = _spread(seen_BNV, kernel.aa[time], kernel.bb[time], kernel.cc[time])[..., :-1]
    from_x0_BNK = torch.where(masked_BN1, kernel.cc[time].log(), from_x0_BNK)
    last_BNV = _spread(seen_BNV, kernel.a[time], kernel.b[time], kernel.c[time])
    # A mask stays one, so that nothing but a mask can come of it.
    last_BNV = torch.where(masked_BN1, kernel.c[time].log(), last_BNV)
    last_BNV[..., -1:] = torch.where(masked_BN1, 0.0, LOG_FLOOR)
    scores_BNK = log_x0_BNK - from_x0_BNK
    total_BN1 = scores_BNK.logsumexp(-1, keepdim=True)
    share_BNV = torch.cat([scores_BNK - total_BN1, torch.full_like(total_BN1, LEAST)], -1)
    before_BNV = _spread(share_BNV, kernel.aa[time - 1], kernel.bb[time - 1], kernel.cc[time - 1])
    return (before_BNV + last_BNV + total_BN1).clamp(LEAST, 0.0)
