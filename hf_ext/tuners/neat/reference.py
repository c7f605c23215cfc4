"""The mathematics of NEAT (https://huggingface.co/papers/2410.01870): tensors in, tensors out.

A frozen weight is given a small network that reads its rows and returns its update. With W the weight `(N, M)`, N outputs and M
inputs, the update of the paper is

    delta = s act(W T1) T2,        T1 (M, R), T2 (R, M),                                                        ("input")

and the authors' code for vision and language understanding, like PEFT, lets the network read the columns instead:

    delta^T = s act(W^T T1) T2,    T1 (N, R), T2 (R, N).                                                        ("output")

K pairs of R x R layers may stand between T1 and T2: encoders E_1..E_K, then decoders D_1..D_K, the k-th of which is followed by a
skip from the input of encoder K + 1 - k.

Since nothing follows T2, delta is a product of two thin matrices, of which one, H = act(...), depends on W: it has rank R and is
never needed as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]


def hidden_features(
    products_DR: Tensor, encoders: Sequence[Tensor], decoders: Sequence[Tensor], activation: Activation
) -> Tensor:
    """H, `(D, R)`: what the network has computed before T2.

    Args:
        products_DR: W T1 or W^T T1, a row for each row of what the network reads.
        encoders, decoders: K matrices `(R, R)` each, used as rows @ matrix^T.
        activation: element by element.
    """
    hidden_DR, skips = activation(products_DR), []
    for matrix_RR in encoders:
        skips.append(hidden_DR)
        hidden_DR = activation(hidden_DR @ matrix_RR.mT)
    for matrix_RR in decoders:
        hidden_DR = activation(hidden_DR @ matrix_RR.mT) + skips.pop()
    return hidden_DR


def delta_weight(
    weight_NM: Tensor,
    first_RD: Tensor,
    last_DR: Tensor,
    encoders: Sequence[Tensor] = (),
    decoders: Sequence[Tensor] = (),
    *,
    activation: Activation = torch.relu,
    scaling: float = 1.0,
    side: str = "input",
) -> Tensor:
    """The update `(N, M)` as a whole, for comparison; layers use its two factors.

    Args:
        weight_NM: frozen.
        first_RD, last_DR: T1^T and T2^T, with D = M for `side="input"` and D = N for `side="output"`.
        encoders, decoders: see `hidden_features`.
        activation, scaling: act and s.
        side: `"input"` or `"output"`.
    """
    rows = weight_NM if side == "input" else weight_NM.mT
    delta = scaling * hidden_features(rows @ first_RD.mT, encoders, decoders, activation) @ last_DR.mT
    return delta if side == "input" else delta.mT


def gain_of(features_DR: Tensor, fan_in: int) -> float:
    """The factor that gives features the root mean square of LoRA's random factor, 1 / sqrt(3 fan_in); 1 if all are 0.

    Entries of a weight are small, and so are their features: without it the learning rates of LoRA barely move the output.

    Args:
        features_DR: H at the start.
        fan_in: entries that each output of the factor sums over.
    """
    size = features_DR.float().square().mean().sqrt()
    return float(1 / (size * (3 * fan_in) ** 0.5)) if size > 0 else 1.0
