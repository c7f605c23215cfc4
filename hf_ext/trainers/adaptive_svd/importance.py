"""How much of each weight is protected: scores of layers from data, and ranks from scores. Needs torch alone.

Paper: https://huggingface.co/papers/2504.07097. A layer that changes the direction of its input little is taken to be
important: with x the input of a linear layer and y = W x its output without bias,

    I = mean over tokens of cos(x[:m], y[:m]),  m = min(N, M)        I_n = I / mean over layers of I
    rho = r_min + I_n (r_target - r_min)                               k = floor(rho m), between 0 and m

so that the mean of rho is the target. On trained models the cosines of many layers are near 0 and of both signs, and rho is
then arbitrary: `ranks_from_importance` takes their absolute values unless told otherwise, and `is_degenerate` says when even
that means little. The energy rule needs no such comparison of unrelated axes: k is the smallest rank with

    sum_{i<=k} s_i^2 v_i^T Sigma v_i >= tau sum_i s_i^2 v_i^T Sigma v_i,  Sigma = E[x x^T]

the share tau of what the layer really puts out on the data. On the short side both sums are plain: the energy of direction i
is E[(u_i^T y)^2] for a wide weight and s_i^2 E[(v_i^T x)^2] for a tall one, so that no second moment is ever stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

SCORES = ("absolute", "positive", "signed")
_TINY = 1e-8
# Mean absolute cosine below which the order of layers is noise.
_DEGENERATE = 0.05


class LayerStatistics:
    """Running means over the tokens that pass one linear layer: the cosine, and what each singular direction puts out.

    Args:
        short_outputs: the short side of the layer's `Subspace` is that of its outputs.
        basis_PP: its singular vectors, for the energy rule.
    """

    def __init__(self, short_outputs: bool, basis_PP: Tensor | None = None) -> None:
        self.short_outputs, self.basis_PP, self.tokens, self._cosines = short_outputs, basis_PP, 0, 0.0
        self._squares_P: Tensor | None = None

    def update(self, inputs_TM: Tensor, outputs_TN: Tensor) -> None:
        """Add tokens; `outputs` are without the bias."""
        inputs, outputs = inputs_TM.detach().float(), outputs_TN.detach().float()
        shared = min(inputs.shape[-1], outputs.shape[-1])
        x, y = inputs[:, :shared], outputs[:, :shared]
        cosines = (x * y).sum(-1) / ((x.norm(dim=-1) + _TINY) * (y.norm(dim=-1) + _TINY))
        self._cosines += float(cosines.double().sum())
        self.tokens += len(inputs)
        if self.basis_PP is not None:
            squares = (
                ((outputs if self.short_outputs else inputs) @ self.basis_PP).square().sum(0, dtype=torch.float64)
            )
            self._squares_P = squares if self._squares_P is None else self._squares_P + squares

    @property
    def cosine(self) -> float:
        """I of the paper."""
        return self._cosines / self.tokens

    def energies(self, values_P: Tensor) -> Tensor:
        """What each singular direction puts out per token, `(P,)`, float64, from the singular values."""
        assert self._squares_P is not None
        energies = self._squares_P / self.tokens
        return energies if self.short_outputs else energies * values_P.double().square()


def retained_ratios(
    importance: Mapping[str, float], minimum: float, target: float, score: str = "absolute"
) -> dict[str, float]:
    """rho of each layer, before it is cut to 0 and 1; their mean is `target`.

    Args:
        importance: I of each layer.
        minimum, target: r_min and r_target, between 0 and 1.
        score: "signed" is the paper's; "absolute" and "positive" take |I| and max(I, 0).

    Raises:
        ValueError: an unknown score, or no layer with a positive one.
    """
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown: choose one of {', '.join(SCORES)}.")
    change = {"absolute": abs, "positive": lambda value: max(value, 0.0), "signed": lambda value: value}[score]
    scores = {name: change(value) for name, value in importance.items()}
    mean = math.fsum(scores.values()) / len(scores)
    if score != "signed" and mean <= 0:
        raise ValueError(
            f"no layer has a positive importance (score={score!r}): use the energy rule or uniform ranks."
        )
    return {name: minimum + value / (mean + _TINY) * (target - minimum) for name, value in scores.items()}


def ranks_from_ratios(ratios: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, int]:
    """k = floor(rho m) of each layer with m singular values, between 0 and m."""
    return {name: min(max(math.floor(ratio * sizes[name] + 1e-9), 0), sizes[name]) for name, ratio in ratios.items()}


def rank_from_energy(energies_P: Tensor, share: float) -> int:
    """The smallest rank whose directions put out at least this share of all; 0 for a share of 0."""
    total = energies_P.sum()
    if share <= 0 or float(total) <= 0:
        return 0
    return int(torch.searchsorted(energies_P.cumsum(0) / total, share * (1 - 1e-12))) + 1


def is_degenerate(importance: Mapping[str, float], ratios: Mapping[str, float]) -> str | None:
    """Why these scores say little about the layers, or None: tiny cosines, or ratios that are mostly cut off."""
    size = math.fsum(map(abs, importance.values())) / len(importance)
    if size < _DEGENERATE:
        return f"the mean absolute cosine is {size:.3f}, below {_DEGENERATE}"
    cut = sum(not 0 <= ratio <= 1 for ratio in ratios.values())
    if 3 * cut > len(ratios):
        return f"{cut} of {len(ratios)} retained ratios are outside 0 to 1"
    return None
