"""One step of AdamW on one tensor, with moments in float32 or in 8 bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from hf_ext._lazy import optional_import

# As bitsandbytes: the moments of small tensors stay in float32, and blocks of this many entries share a scale.
SMALLEST, BLOCK = 4096, 256


def new_moments(value: Tensor, eight_bit: bool, fused: bool) -> dict[str, Tensor]:
    """The state of a tensor before its first step.

    Args:
        value: the tensor.
        eight_bit: moments in blocks of 8-bit numbers, if the tensor has at least `SMALLEST` entries.
        fused: of torch's AdamW, which counts the steps on the device then.
    """
    if not eight_bit or value.numel() < SMALLEST:
        step = torch.zeros((), device=value.device if fused else "cpu")
        return {"step": step, "exp_avg": torch.zeros_like(value), "exp_avg_sq": torch.zeros_like(value)}
    scales = torch.zeros(-(-value.numel() // BLOCK), device=value.device)
    codes = torch.zeros_like(value, dtype=torch.uint8)
    return {
        "step": torch.zeros(()),
        "state1": codes,
        "state2": codes.clone(),
        "absmax1": scales,
        "absmax2": scales.clone(),
    }


def step_moments(value: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    """Update `value` and `state` in place; learning rate, betas, eps, weight decay and `fused` are those of the group."""
    if "state1" in state:
        _step_eight_bit(value, gradient, state, group)
        return
    adamw(
        [value],
        [gradient],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [state["step"]],
        foreach=False,
        fused=bool(group["fused"]),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _step_eight_bit(value: Tensor, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    state["step"] += 1
    optional_import("bitsandbytes.functional", "quant").optimizer_update_8bit_blockwise(
        "adam",
        gradient.contiguous(),
        value,
        state["state1"],
        state["state2"],
        *group["betas"],
        0.0,  # third beta and alpha belong to other optimizers
        0.0,
        group["eps"],
        int(state["step"]),
        group["lr"],
        _map(signed=True, device=value.device),
        _map(signed=False, device=value.device),
        state["absmax1"],
        state["absmax2"],
        group["weight_decay"],
    )


@cache
def _map(signed: bool, device: torch.device) -> Tensor:
    """The 256 numbers that a code can mean."""
    return optional_import("bitsandbytes.functional", "quant").create_dynamic_map(signed=signed).to(device)
