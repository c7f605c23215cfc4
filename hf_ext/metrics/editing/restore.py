"""Takes a model back to where it was before an edit."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ParameterSnapshot:
    """Copies of what an editor may train, and a checksum of everything else.

    Kept, on their own devices: every parameter that requires a gradient (all of a plain model, the adapter of a
    `PeftModel`) and every buffer. If nothing requires a gradient (an editor that computes its update in closed form on a
    frozen model), every parameter is kept. The rest is not copied but summed up, so that an editor that changes it is found
    out instead of silently leaking into the next edit.

    Also kept: which parameters require a gradient, and the training mode of every module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        named = dict(model.named_parameters())
        trainable = {name: p for name, p in named.items() if p.requires_grad}
        kept: dict[str, Tensor] = {**(trainable or named), **dict(model.named_buffers())}
        self._copies = {name: tensor.detach().clone() for name, tensor in kept.items()}
        self._requires_grad = {name: p.requires_grad for name, p in named.items()}
        self._modes = {name: module.training for name, module in model.named_modules()}
        self._sums = {name: _checksum(p) for name, p in named.items() if name not in self._copies}

    def restore(self) -> None:
        """Writes the copies back, in place and exactly.

        Raises:
            ValueError: the editor added or removed modules, or changed a parameter that was not copied.
        """
        named = dict(self.model.named_parameters())
        if set(named) != set(self._requires_grad):
            changed = sorted(set(named) ^ set(self._requires_grad))[:3]
            raise ValueError(
                f"the editor added or removed parameters ({changed}, …), which a snapshot cannot undo; add the adapter before "
                "run_editing, or pass restore, a callable that undoes the edit."
            )
        for name, total in self._sums.items():
            if _checksum(named[name]) != total:
                raise ValueError(
                    f"the editor changed {name!r}, which did not require a gradient when run_editing began, so there is no "
                    "copy of it; mark what the editor changes as trainable first, or pass restore, which undoes the edit."
                )
        current: dict[str, Tensor] = {**named, **dict(self.model.named_buffers())}
        with torch.no_grad():
            for name, copy in self._copies.items():
                current[name].copy_(copy)
        for name, parameter in named.items():
            # Frozen quantised weights cannot even be asked to require a gradient.
            if parameter.requires_grad != self._requires_grad[name]:
                parameter.requires_grad_(self._requires_grad[name])
            parameter.grad = None
        for name, module in self.model.named_modules():
            module.training = self._modes[name]


def _checksum(parameter: Tensor) -> float:
    """The sum in double precision; equal for an untouched parameter, since the same sum in the same order rounds alike."""
    return float(parameter.detach().sum(dtype=torch.float64))
