"""Preference losses without a full vocabulary: RoseRAG's odds ratio, DPO with a margin, SimPO. Needs torch alone.

Paper: https://huggingface.co/papers/2502.10993, whose loss is ORPO's, https://huggingface.co/papers/2403.07691. With a_w, a_l the
mean token log-probabilities of the chosen and the rejected response,

    logodds(a) = a - log(1 - e^a),   z = logodds(a_w) - logodds(a_l),   L = nll(y_w) + lambda mean(-log sigmoid(z - gamma)).

The paper has no gamma. DPO (https://huggingface.co/papers/2305.18290) compares sums with those of a reference, SimPO
(https://huggingface.co/papers/2405.14734) means without one.

Shapes: B pairs, T token slots. Log-probabilities are 0 where the mask is; everything is computed in float32 or better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# A mean log-probability of 0 has infinite odds. In float32 this is the first step away from it.
_LARGEST = -torch.finfo(torch.float32).eps
# Names of `DPOTrainer`'s own; all but the last compare with a reference.
NATIVE_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "sft",
)
NLL_NORMALIZATIONS = ("sequence", "token", "full_token", "none")


@dataclass(frozen=True)
class Responses:
    """Token log-probabilities of one side of the pairs.

    Attributes:
        logps_BT: float32, 0 outside the mask.
        mask_BT: True at the tokens of the response.
        reference_B: their sums under the reference, if the loss reads one.
    """

    logps_BT: Tensor
    mask_BT: Tensor
    reference_B: Tensor | None = None

    @property
    def sums_B(self) -> Tensor:
        return self.logps_BT.sum(-1)

    @property
    def means_B(self) -> Tensor:
        return self.sums_B / self.mask_BT.sum(-1).clamp(min=1)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of negative numbers, exact near 0 and far from it, and so is its gradient."""
    near = x > -math.log(2)
    # Each branch is given harmless numbers where the other counts, so that no gradient is NaN.
    close = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, close, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def log_odds(means_B: Tensor) -> Tensor:
    """log(p / (1 - p)) with log p the mean token log-probability."""
    means_B = means_B.clamp(max=_LARGEST)
    return means_B - log1mexp(means_B)


def odds_ratio(chosen: Responses, rejected: Responses, gamma: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(z - gamma) of each pair `(B,)`, ORPO's equation 6 with a margin."""
    difference_B = log_odds(chosen.means_B) - log_odds(rejected.means_B)
    return torch.nn.functional.softplus(gamma - difference_B)


def margin_dpo(chosen: Responses, rejected: Responses, beta: float, gamma: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(beta ((s_w - ref_w) - (s_l - ref_l)) - gamma) of each pair `(B,)`: DPO with a margin."""
    assert chosen.reference_B is not None and rejected.reference_B is not None
    gain_B = (chosen.sums_B - chosen.reference_B) - (rejected.sums_B - rejected.reference_B)
    return torch.nn.functional.softplus(gamma - beta * gain_B)


def simpo(chosen: Responses, rejected: Responses, beta: float, gamma: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(beta (a_w - a_l) - gamma) of each pair `(B,)`, SimPO's equation 6."""
    return torch.nn.functional.softplus(gamma - beta * (chosen.means_B - rejected.means_B))


def negative_log_likelihood(responses: Responses, normalization: str) -> Tensor:
    """Of the chosen responses: the mean over pairs of -a_w ("sequence"), or the mean over all tokens ("token").

    The first does not depend on how a batch is split.
    """
    if normalization == "sequence":
        return -responses.means_B.mean()
    return -responses.logps_BT.sum() / responses.mask_BT.sum().clamp(min=1)


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss that `loss_type` can name, as a function of the log-probabilities of both responses.

    Attributes:
        function: `(chosen, rejected, beta, gamma) -> (B,)`.
        needs_reference: it reads `Responses.reference_B`.
        nll_weight: default weight of the negative log-likelihood of the chosen responses beside it.
    """

    function: Callable[[Responses, Responses, float, Tensor | float], Tensor]
    needs_reference: bool = False
    nll_weight: float = 0.0


PREFERENCE_LOSSES: dict[str, PreferenceLoss] = {
    "rose_rag": PreferenceLoss(lambda chosen, rejected, beta, gamma: odds_ratio(chosen, rejected, gamma), False, 1.0),
    # Without it, pairs that are nearly equal drive both responses down.
    "margin_dpo": PreferenceLoss(margin_dpo, True, 1.0),
    "simpo": PreferenceLoss(simpo),
}


def register_preference_loss(name: str, loss: PreferenceLoss) -> None:
    """Make a loss of your own known to `loss_type`.

    Raises:
        ValueError: the name is taken, by a loss of TRL's too.
    """
    if name in PREFERENCE_LOSSES or name in NATIVE_LOSSES:
        raise ValueError(f"name={name!r}: there is a loss of that name; choose another.")
    PREFERENCE_LOSSES[name] = loss
