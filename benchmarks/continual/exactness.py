"""How exact adaptive SVD is on the weights of Gemma 3 270M.

Singular directions: the protected ones from the Gram matrix in float64, and from an SVD in float32, against an SVD in float64; the error is the
largest sine of an angle between the two spaces. Leak: what 25 steps of AdamW move inside the protected space, as a share of the weight's norm.

    python -m benchmarks.continual.exactness
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.common import markdown, write
from benchmarks.continual import cost
from hf_ext.trainers.adaptive_svd.subspace import singular_basis
from hf_ext.trainers.adaptive_svd.targets import find_targets

NAME, RETENTION, STEPS, TOKENS = "continual_exactness", 0.8, 25, 64


def sine(found_PK: Tensor, exact_PK: Tensor) -> float:
    """Of the largest angle between the spaces of two orthonormal bases."""
    found_PK = torch.linalg.qr(found_PK.double()).Q
    return float(torch.linalg.matrix_norm(found_PK - exact_PK @ (exact_PK.mT @ found_PK), 2))


def main() -> None:
    weights = {name: layer.weight.detach().clone() for name, layer in find_targets(cost.load(), None).items()}
    bases = {name: singular_basis(weight) for name, weight in weights.items()}
    step = cost.our_step(RETENTION, bases)
    step.draw(1, 1, TOKENS)
    for _ in range(STEPS):
        step()
    trained = {name: step.model.get_submodule(name).weight.detach() for name in weights}
    columns: dict[str, list[float]] = {"gram": [], "svd": [], "left": [], "right": [], "change": []}
    for name, weight in weights.items():
        short = weight if weight.shape[0] <= weight.shape[1] else weight.mT
        moved = (trained[name] if short is weight else trained[name].mT).double() - short.double()
        rank = math.floor(RETENTION * len(short))
        left, _, right = torch.linalg.svd(short.double(), full_matrices=False)
        kept, norm = left[:, :rank], short.double().norm()
        columns["gram"].append(sine(bases[name][0][:, :rank], kept))
        columns["svd"].append(sine(torch.linalg.svd(short, full_matrices=False).U[:, :rank], kept))
        columns["left"].append(float((kept.mT @ moved).norm() / norm))
        columns["right"].append(float((moved @ right[:rank].mT).norm() / norm))
        columns["change"].append(float(moved.norm() / norm))
    titles = {
        "gram": "protected directions, Gram matrix in float64",
        "svd": "protected directions, SVD in float32",
        "left": "leak, short side",
        "right": "leak, long side",
        "change": "change of the weight",
    }
    rows = [
        [titles[name], f"{torch.tensor(values).median():.1e}", f"{max(values):.1e}"]
        for name, values in columns.items()
    ]
    note = (
        f"Gemma 3 270M, {len(weights)} layers in float32, {RETENTION:.0%} protected, {STEPS} steps of AdamW on {TOKENS} tokens at {cost.OPTIONS['lr']:g}. Directions: sine of the largest angle to "
        "those of an SVD in float64. Leak and change: norm over that of the weight. `python -m benchmarks.continual.exactness` repeats it."
    )
    table = markdown(["", "median layer", "worst layer"], rows)
    write(NAME, {"command": "python -m benchmarks.continual.exactness", **columns, "table": f"{table}\n\n{note}"})
    print(table)


if __name__ == "__main__":
    main()
