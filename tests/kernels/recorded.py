"""What was recorded of the authors' code, for the tests of the operators and of the cache."""

from __future__ import annotations

import json

import torch

from tests.oracles import ORACLES

FOLDER = ORACLES / "squat"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())


def hadamard(size: int) -> torch.Tensor:
    """Sylvester's matrix, orthogonal, which some of the recorded runs turned queries and keys by."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5
