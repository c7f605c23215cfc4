"""`SubspaceAdamW`: AdamW on plain weights, some of which change only inside their subspace.

Projecting the gradient is not enough for Adam: its element-wise scaling turns the update out of the subspace. Here the moments of a protected weight are those of coordinates of its free directions, and the update
is projected after Adam has made it, so that nothing leaves the subspace whatever the moments, the momentum or the decay are.

Shapes: see `subspace`; a weight `(N, M)` of which k of P = min(N, M) directions are protected has coordinates `(P - k, Q)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from hf_ext.trainers.adaptive_svd.moments import new_moments, step_moments
from hf_ext.trainers.adaptive_svd.subspace import (
    Subspace,
    add_expanded,
    long_basis,
    project,
    reduce,
    without_long_side,
)


class SubspaceAdamW(AdamW):
    """AdamW whose updates of some parameters stay inside a subspace.

    A weight with a subspace keeps two moments in its reduced coordinates, and nothing else unless it has to: with weight
    decay, or in less than float32, also the change of the coordinates since the start. Decay then acts on that change, which
    is drawn to 0, because drawing the weight itself to 0 would change what is protected; and a weight in bfloat16 is written
    as its start plus the change, both of which are exact, since small updates added to it would be rounded away.

    The gradient of such a weight is reduced before the step, from `.grad` or from what `accumulate` was given instead, so that
    `clip_grad_norm_` of this class takes the place of torch's, and its `zero_grad` that of the model.

    Args:
        params: as for `AdamW`; weights with a subspace among them.
        subspaces: parameter -> what is protected of it, at its present value.
        eight_bit: parameters with or without a subspace whose moments are kept in 8 bits by bitsandbytes. The update is projected after
            they have made it, so that rounding does not leave the subspace either.
        joint: the paper's formula, for comparison: moments in the shape of the weight, and a copy of its start.
        lr, betas, eps, weight_decay: of AdamW, also in groups. `fused` is for the other parameters.

    Raises:
        ValueError: a subspace of a tensor that is not among the parameters, or an option of AdamW that is not supported.
    """

    def __init__(
        self,
        params: Iterable[Any],
        subspaces: Mapping[Tensor, Subspace],
        *,
        eight_bit: Iterable[Tensor] = (),
        joint: bool = False,
        **options: Any,
    ) -> None:
        for name in ("amsgrad", "maximize", "capturable", "differentiable"):
            if options.get(name):
                raise ValueError(f"{name}={options[name]!r} is not supported by SubspaceAdamW; leave it out.")
        super().__init__(params, **options)
        given = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(parameter) not in given for parameter in subspaces):
            raise ValueError("subspaces: a tensor is not among the parameters of the optimizer; is it trainable?")
        self._subspaces, self._eight_bit, self._joint = dict(subspaces), set(eight_bit), joint
        self._rows: dict[Tensor, Tensor] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        # Of the weights as they are in this step: for the gradient and the update.
        self._long: dict[Tensor, Tensor | None] = {}

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _start(self, parameter: Tensor) -> Tensor:
        """A weight that has the protected directions: as it is, or as it was if it is rounded or loses them ("joint")."""
        return self.state[parameter].get("start", parameter) if parameter in self.state else parameter

    @torch.no_grad()
    def accumulate(self, parameter: Tensor, short_TF: Tensor, long_TQ: Tensor) -> None:
        """Add short^T long to the gradient of a weight in coordinates of its free directions.

        Args:
            parameter: with a subspace.
            short_TF: inputs of the layer or gradients of its outputs, whichever are the short side, in those coordinates.
            long_TQ: the other ones.
        """
        if parameter not in self._rows:
            self._rows[parameter] = (short_TF.mT @ long_TQ).float()
        elif long_TQ.dtype == torch.float32:
            self._rows[parameter].addmm_(short_TF.mT, long_TQ)
        else:
            self._rows[parameter] += short_TF.mT @ long_TQ

    @torch.no_grad()
    def _reduce_all(self) -> None:
        for parameter, subspace in self._subspaces.items():
            if parameter in self._rows:
                rows_FQ = self._rows.pop(parameter)
            elif parameter.grad is None:
                continue
            elif self._joint:
                start = self._start(parameter).float()
                self._gradients[parameter] = project(parameter.grad.float(), start, subspace, joint=True)
                parameter.grad = None
                continue
            else:
                rows_FQ = reduce(parameter.grad.float(), subspace)
                parameter.grad = None
            start_PQ = subspace.oriented(self._start(parameter).float())
            self._long[parameter] = long_basis(start_PQ, subspace, len(rows_FQ), times=2)
            self._gradients[parameter] = without_long_side(rows_FQ, start_PQ, subspace, self._long[parameter])

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, parameters: Iterable[Tensor] | None = None) -> Tensor:
        """Scale all gradients so that their norm is at most `max_norm`, and return the norm before.

        That of a weight with a subspace is the norm of its part inside. The order of `parameters`, by default that of the
        groups, decides how the sum is rounded.
        """
        self._reduce_all()
        if parameters is None:
            parameters = [p for group in self.param_groups for p in group["params"]]
        gradients = [g for p in parameters if (g := self._gradients.get(p, p.grad)) is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))
        return norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for kept in (self._rows, self._gradients, self._long):
            kept.clear()

    # -- the step ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._reduce_all()
        plain = {p: p.grad for p in self._eight_bit if p.grad is not None}
        for parameter in plain:
            parameter.grad = None
        # Without a `.grad`, these and weights with a subspace are none of AdamW's business.
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._gradients:
                    self._update(parameter, self._gradients.pop(parameter), group)
                elif parameter in plain:
                    self._prepare(parameter, parameter, group)
                    step_moments(parameter, plain.pop(parameter), self.state[parameter], group)
        return loss

    def _prepare(self, parameter: Tensor, value: Tensor, group: dict[str, Any]) -> None:
        """Make the moments of `value`, if this is the first step of the parameter."""
        if not self.state[parameter]:
            self.state[parameter].update(new_moments(value, parameter in self._eight_bit, bool(group["fused"])))

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, subspace = self.state[parameter], self._subspaces[parameter]
        rounded, first = parameter.dtype != torch.float32, not state
        self._prepare(parameter, gradient, group)
        if first:
            if rounded or group["weight_decay"] != 0:
                state["change"] = torch.zeros_like(gradient)
            if rounded or self._joint:
                state["start"] = parameter.detach().clone()
        change = state.get("change")
        moved = torch.zeros_like(gradient) if change is None else change.clone()
        step_moments(moved, gradient, state, group)
        start = self._start(parameter).float()
        step = moved if change is None or rounded else moved - change
        # What is rounded is written anew from its start.
        whole = start if rounded else parameter
        if self._joint:
            whole += project(step, start, subspace, joint=True)
        else:
            long_QK = self._long.pop(parameter)
            add_expanded(whole, without_long_side(step, subspace.oriented(start), subspace, long_QK), subspace)
        if rounded:
            parameter.copy_(whole)
        if change is not None:
            change.copy_(moved)

    # -- saving ------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            ValueError: the state is that of other subspaces, or of the other projection.
        """
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        # torch casts what it loads to the dtype of the parameter, but coordinates are float32, and codes are bytes.
        for parameter, _, state in self._stored(state_dict):
            if parameter in self._subspaces or parameter in self._eight_bit:
                for name, value in state.items():
                    if name != "step":
                        self.state[parameter][name] = value.to(parameter.device, copy=True)

    def _stored(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, int, dict[str, Tensor]]]:
        """(parameter, its number, its state) of all that have one."""
        order = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        # torch says what is wrong if there are more or fewer.
        for parameter, number in zip(order, numbers, strict=False):
            if number in state_dict["state"]:
                yield parameter, number, state_dict["state"][number]

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        for parameter, number, state in self._stored(state_dict):
            if parameter not in self._subspaces:
                continue
            subspace = self._subspaces[parameter]
            whole = subspace.oriented(parameter).shape
            expected = parameter.shape if self._joint else (whole[0] - subspace.rank, whole[1])
            found = state["state1" if "state1" in state else "exp_avg"].shape
            if found != expected:
                raise ValueError(
                    f"the moments of parameter {number} have shape {tuple(found)}, and its subspace needs {tuple(expected)}: load the "
                    "state with the subspaces and the projection that it was saved with."
                )
