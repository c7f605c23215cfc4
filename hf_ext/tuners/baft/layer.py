"""The layer of BaFT: attached to a block, whose output it edits at chosen tokens."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_ext._compat import saved_buffers
from hf_ext.tuners.baft.calls import Call, Calls, Recorded
from hf_ext.tuners.baft.config import BaftConfig
from hf_ext.tuners.baft.positions import Positions, parse_positions
from hf_ext.tuners.baft.reference import intervene, orthonormal_basis
from hf_ext.tuners.rows import owners_of

FREE, KEPT, CLOSED = 0, 1, 2  # of a basis vector: trained; of an earlier edit, and fixed; taken back
UNMERGEABLE = "BaFT cannot be merged into the weights: how far it moves a hidden state depends on the state. Keep the adapter, or remove it with unload()."


class BaftLayer(nn.Module, BaseTunerLayer):
    """What is attached to a block: for each adapter, the tensors of its subspace.

    Shapes: D is the width of the model, K the basis vectors. `baft_R` `(K, D)` is what the basis is computed from (`reference.py`), `baft_A`
    `(K, D)` and `baft_b` `(K,)` the targets, `baft_U` `(K, D)` and `baft_c` `(K,)` the gate; with the gate "mlp" `baft_V` `(K, D)` is its
    first layer and `baft_U` `(K, K)` its second. Buffers: `baft_usage` `(K,)`, the sums of the mean weights of the edits so far, and
    `baft_state` `(K,)`, for each basis vector FREE, KEPT or CLOSED.

    Args:
        name: of the block.
        calls: shared by the layers of a model.
        width: D.
    """

    baft_R: nn.ParameterDict
    baft_A: nn.ParameterDict
    baft_b: nn.ParameterDict
    baft_U: nn.ParameterDict
    baft_c: nn.ParameterDict
    baft_V: nn.ParameterDict

    adapter_layer_names = ("baft_R", "baft_A", "baft_b", "baft_U", "baft_c", "baft_V")
    other_param_names = ("baft_usage", "baft_state", "positions", "gate", "normalize")

    def __init__(self, name: str, calls: Calls, width: int) -> None:
        super().__init__()
        self.name, self.calls, self.width = name, calls, width
        for key in self.adapter_layer_names:
            setattr(self, key, nn.ParameterDict())
        self.baft_usage, self.baft_state = saved_buffers(), saved_buffers()
        self.positions: dict[str, Positions] = {}
        self.gate: dict[str, str] = {}
        self.normalize: dict[str, bool] = {}
        self._disable_adapters, self._active_adapter = False, []
        self.merged_adapters: list[str] = []
        self.hook: Any = None

    @property
    def weight(self) -> Tensor:
        raise AttributeError("a BaFT layer stands beside a block and has no weight of its own.")

    # -- adapters ------------------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: BaftConfig, device: torch.device) -> None:
        """A new adapter, in float32.

        Raises:
            ValueError: more basis vectors than the width of the model.
        """
        self._check_room(config.r)
        self.positions[name], self.gate[name] = parse_positions(config.positions), config.gate
        self.normalize[name] = config.normalize
        for key, value in self._start(config, config.r).items():
            getattr(self, key)[name] = nn.Parameter(value.to(device))
        self.baft_usage[name] = torch.zeros(config.r, device=device)
        self.baft_state[name] = torch.full((config.r,), FREE, device=device)

    def grow(self, name: str, config: BaftConfig, count: int) -> None:
        """Append `count` basis vectors, orthogonal to those that there are, which are fixed from now on.

        The basis is computed row by row, so that what it has does not change.

        Raises:
            ValueError: more basis vectors than the width of the model.
        """
        self._check_room(len(self.baft_state[name]) + count)
        state = self.baft_state[name]
        self.baft_state[name] = torch.cat([state.clamp(min=KEPT), state.new_full((count,), FREE)])
        self.baft_usage[name] = torch.cat([self.baft_usage[name], self.baft_usage[name].new_zeros(count)])
        new = self._start(config, count, self.baft_R[name].detach().float().cpu())
        for key, value in new.items():
            old = getattr(self, key)[name]
            join = torch.block_diag if key == "baft_U" and self.gate[name] == "mlp" else _stacked
            getattr(self, key)[name] = nn.Parameter(join(old.detach(), value.to(old)))

    def _start(self, config: BaftConfig, count: int, others_KD: Tensor | None = None) -> dict[str, Tensor]:
        """Tensors of `count` basis vectors, orthogonal to those of `others_KD`."""
        free_KD = torch.randn(count, self.width)
        if others_KD is not None:
            # Trainers set the seed anew: the same numbers again would lie in the span of what there is.
            seed = torch.initial_seed() + 7919 * len(others_KD)
            free_KD = torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed % 2**63))
            free_KD = orthonormal_basis(torch.cat([others_KD, free_KD]))[-count:]
        basis_KD = orthonormal_basis(free_KD)
        # As the forward pass will find the basis, so that nothing is left of their difference but rounding.
        tensors = {"baft_R": basis_KD, "baft_A": orthonormal_basis(basis_KD), "baft_b": torch.zeros(count)}
        if config.gate == "mlp":
            tensors["baft_V"] = torch.randn(count, self.width) / self.width**0.5
        if config.gate != "none":
            tensors["baft_U"] = torch.zeros(count, count if config.gate == "mlp" else self.width)
            tensors["baft_c"] = torch.full((count,), config.gate_bias or 0.0)
        if not config.init_weights:
            for key in [key for key in tensors if key in ("baft_A", "baft_U")]:  # in the same order in every process
                tensors[key] = torch.randn_like(tensors[key]) / tensors[key].shape[1] ** 0.5
            tensors["baft_b"] = torch.randn(count)
        return tensors

    def _check_room(self, count: int) -> None:
        if count > self.width:
            raise ValueError(
                f"r={count}: {self.name!r} puts out {self.width} features; give at most that many basis vectors."
            )

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Everything that an adapter has here, by the name of its container."""
        containers = (*self.adapter_layer_names, "baft_usage", "baft_state")
        return {key: getattr(self, key)[name] for key in containers if name in getattr(self, key)}

    def put_back(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Undo what happened since `tensors` were copied from `tensors(name)`, new basis vectors included."""
        for key, value in tensors.items():
            getattr(self, key)[name] = value

    @torch.no_grad()
    def has_no_effect(self, name: str) -> bool:
        """Whether an adapter is as it was made."""
        basis_KD = orthonormal_basis(self.baft_R[name].float())
        return torch.allclose(self.baft_A[name].float(), basis_KD, rtol=0, atol=1e-5) and not self.baft_b[name].any()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(UNMERGEABLE)

    def unmerge(self) -> None:
        raise NotImplementedError(UNMERGEABLE)

    # -- what it computes ----------------------------------------------------------------------------------------------

    def edit(self, block: nn.Module, args: Any, output: Any) -> Any:
        """The hook after the block's forward pass: its output, with the hidden states edited."""
        if self.disable_adapters:
            return None
        hidden_BTD = output[0] if isinstance(output, tuple) else output
        call = self.calls.current(hidden_BTD)
        names = self.active_adapters if self.calls.names is None else sorted(set(self.calls.names))
        for name in names:
            if name in self.baft_R:
                hidden_BTD = self._edited(name, hidden_BTD, call)
        return (hidden_BTD, *output[1:]) if isinstance(output, tuple) else hidden_BTD

    def _edited(self, name: str, hidden_BTD: Tensor, call: Call) -> Tensor:
        positions, rows_B = self.positions[name], None
        if self.calls.names is not None:
            owners = owners_of(len(hidden_BTD), self.calls.names, self)
            rows_B = torch.tensor([owner == name for owner in owners], device=hidden_BTD.device)
        if torch.compiler.is_compiling():  # which tokens are edited, and so their number, is not known while tracing
            mask_BT = call.mask(positions).to(hidden_BTD.device)
            mask_BT = mask_BT if rows_B is None else mask_BT & rows_B[:, None]
            return torch.where(mask_BT[..., None], self._moved(name, hidden_BTD, mask_BT), hidden_BTD)
        rows, columns = (place.to(hidden_BTD.device) for place in call.places(positions))
        if rows_B is not None:
            rows, columns = rows[rows_B[rows]], columns[rows_B[rows]]
        return hidden_BTD.index_put((rows, columns), self._moved(name, hidden_BTD[rows, columns]))

    def _moved(self, name: str, hidden: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Hidden states `(..., D)` after the edit; computed in float32 at least. `mask_BT` is for the record."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            own = {
                key: getattr(self, key)[name].to(hidden.device, dtype)
                for key in self.adapter_layer_names
                if name in getattr(self, key)
            }
            state_K = self.baft_state[name].to(hidden.device)
            if torch.is_grad_enabled():
                free_K = state_K == FREE
                for key, value in own.items():
                    own[key] = torch.where(free_K.view(-1, *[1] * (value.dim() - 1)), value, value.detach())
            wide = hidden.to(dtype)
            update, weights = intervene(
                wide, own["baft_R"], own["baft_A"], own["baft_b"], lambda h: self._weights(name, h, own, state_K)
            )
            if self.calls.weights is not None:
                self.calls.weights.append(Recorded(self.name, name, weights, mask_BT))
            return (wide + update).to(hidden.dtype)

    def _weights(self, name: str, hidden: Tensor, own: dict[str, Tensor], state_K: Tensor) -> Tensor:
        """Of the basis vectors, `(..., K)`, for hidden states `(..., D)`."""
        kind = self.gate[name]
        if kind == "none":
            return (state_K != CLOSED).to(hidden.dtype).expand(*hidden.shape[:-1], -1)
        if self.normalize[name]:
            hidden = nn.functional.rms_norm(hidden, hidden.shape[-1:])
        features = (hidden @ own["baft_V"].mT).relu() if kind == "mlp" else hidden
        logits = features @ own["baft_U"].mT + own["baft_c"]
        weights = logits.softmax(-1) if kind == "softmax" else logits.sigmoid()
        return weights * (state_K != CLOSED)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second])
