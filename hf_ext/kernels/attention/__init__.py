"""Decode attention over a packed cache: a few query rows, keys and values that stay packed."""

from __future__ import annotations

import torch

from hf_ext.kernels import native
from hf_ext.kernels.attention import two_pass
from hf_ext.kernels.attention.reference import Tokens
from hf_ext.kernels.quantize import triton_kernels

__all__ = ["Tokens", "attend", "path"]


def attend(
    query: torch.Tensor,
    keys: Tokens,
    values: Tokens,
    mask: torch.Tensor | None = None,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same as `reference.attend`, with tokens that stay packed: Triton on a GPU, two passes over the codes everywhere else."""
    kernels = triton_kernels(__name__, query.device)
    chosen = kernels if kernels is not None and kernels.supports(query, keys, values) else two_pass
    return chosen.attend(query, keys, values, mask, scaling=scaling, softcap=softcap, sinks=sinks)


def path(device: torch.device) -> str:
    """Which implementation a device gets, for reports."""
    if triton_kernels(__name__, device) is not None:
        return "triton"
    return f"compiled ({native.status()})" if device.type == "cpu" and native.library() is not None else "PyTorch"
