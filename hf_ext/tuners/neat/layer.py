"""NEAT's layers: a frozen layer whose update is a function of its own weight, evaluated as two thin factors.

Containers and parameter names are those of PEFT's type PEANUT, the same method with one of the two sides, so that the checkpoints are too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.peanut import Linear as PeanutLinear
from peft.tuners.peanut import PeanutConfig, PeanutLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from hf_ext._compat import layer_features, saved_buffers
from hf_ext.tuners.kept import Kept, keep
from hf_ext.tuners.neat.config import NeatConfig
from hf_ext.tuners.neat.product import product
from hf_ext.tuners.neat.reference import gain_of, hidden_features
from hf_ext.tuners.rows import owners_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLVE: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    return torch.sin if name == "sin" else ACT2FN[name]


class NeatLayer(nn.Module, PeanutLayer):
    """A frozen linear or convolutional layer with NEAT adapters.

    Shapes: the weight as a matrix W is `(N, M)`, N outputs and M inputs (of a convolution: times the size of its kernel). An adapter
    holds `peanut_A` `(r, D)` and `peanut_B` `(D, r)`, D = M for the side "input" and N for "output", and `depth` pairs of `(r, r)`.

    The features H of a weight are kept while nothing that they depend on changes, unless they need a gradient. What PyTorch does not count
    as a change, such as writing to `.data`, takes a call of `invalidate`.
    """

    other_param_names = (
        *PeanutLayer.other_param_names,
        "activation",
        "side",
        "dropout",
        "initial_scaling",
        "peanut_gain",
    )

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: NeatConfig, r: int, **kwargs: Any) -> None:
        # PeanutLayer's own would warn about every layer that is not an `nn.Linear`.
        super().__init__()
        self.base_layer = base_layer
        self.r, self.depth, self.res_num, self.scaling, self.act_fn = {}, {}, {}, {}, {}
        self.peanut_A, self.peanut_B = nn.ModuleDict(), nn.ModuleDict()
        self.peanut_encoders, self.peanut_decoders = nn.ModuleDict(), nn.ModuleDict()
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs
        self._add_what_peanut_lacks()
        self.update_layer(adapter_name, r, config)

    def _add_what_peanut_lacks(self) -> None:
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **self.kwargs)
        self.in_features, self.out_features = layer_features(base)
        self.kernel: tuple[int, ...] = base.kernel_size if isinstance(base, CONVOLUTIONS) else ()
        self.activation = {name: _activation(act_fn) for name, act_fn in self.act_fn.items()}
        self.side, self.dropout = dict.fromkeys(self.r, "output"), dict.fromkeys(self.r, 0.0)
        self.initial_scaling = dict(self.scaling)
        self.peanut_gain = saved_buffers()
        self._merged_factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._before_merging: dict[str, Kept] = {}
        self._kept: dict[str, Kept] = {}

    @classmethod
    def take_over(cls, layer: PeanutLinear) -> None:
        """Turn a layer of PEFT's type PEANUT, which is not merged, into one of ours."""
        ours = cast(Any, layer)
        ours.__class__ = cls
        ours._add_what_peanut_lacks()

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int, config: PeanutConfig) -> None:
        if not isinstance(config, NeatConfig):
            config = NeatConfig.from_peanut(config)
        inputs, outputs = self._shape()
        side = config.side if config.side != "auto" else ("input" if inputs <= outputs else "output")
        if side == "output" and not self._weight_can_be_read():
            raise ValueError(
                f"side='output' reads the columns of a weight, which {type(self.get_base_layer()).__name__} does not give: use side='input'."
            )
        size = inputs if side == "input" else outputs
        self.r[adapter_name], self.side[adapter_name], self.dropout[adapter_name] = r, side, config.dropout
        self.depth[adapter_name] = self.res_num[adapter_name] = config.depth
        self.scaling[adapter_name] = self.initial_scaling[adapter_name] = config.scaling
        self.act_fn[adapter_name] = config.act_fn
        self.activation[adapter_name] = _activation(config.act_fn)
        self.peanut_A[adapter_name] = nn.Linear(size, r, bias=False)
        for hidden in (self.peanut_encoders, self.peanut_decoders):
            hidden[adapter_name] = nn.ModuleList(nn.Linear(r, r, bias=False) for _ in range(config.depth))
        self.peanut_B[adapter_name] = nn.Linear(r, size, bias=False)
        self.reset_peanut_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.invalidate()
        if config.normalize:
            self.peanut_gain[adapter_name] = self._starting_gain(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def _starting_gain(self, adapter_name: str) -> Tensor:
        first = _weight(self.peanut_A[adapter_name])
        if first.is_meta:  # about to be loaded, and PEFT would move a buffer that is not there
            return torch.ones((), device=self._get_base_layer_device_and_dtype(self.get_base_layer())[0])
        features = self._features(adapter_name)
        fan_in = self.r[adapter_name] if self.side[adapter_name] == "input" else len(features)
        return torch.tensor(gain_of(features, fan_in), device=first.device)

    def delete_adapter(self, adapter_name: str) -> None:
        self.invalidate()
        super().delete_adapter(adapter_name)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Scale the update of an adapter, counted from the scaling of its configuration; diffusers calls it."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.initial_scaling[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in self._present(self.active_adapters):
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer(scale)`; None: everything since the start."""
        for name in self._present(self.active_adapters):
            self.scaling[name] = self.initial_scaling[name] if scale is None else self.scaling[name] / scale

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.r]

    # -- the weight --------------------------------------------------------------------------------------------------

    def _weight_can_be_read(self) -> bool:
        """Whether there is a weight to read: not where quantised layers only multiply, nor where it is elsewhere between two calls."""
        if self.quantization_backend is not None:
            return self.quantization_backend.supports_merge
        weight = _weight(self.get_base_layer())
        return not weight.is_meta and weight.numel() > 0

    def _shape(self) -> tuple[int, int]:
        """M and N."""
        assert self.in_features is not None and self.out_features is not None  # else layer_features has raised
        return self.in_features * math.prod(self.kernel), self.out_features

    def _matrix(self) -> Tensor:
        """The frozen weight as a matrix `(N, M)`, without what is merged into it, in its own dtype."""
        base = self.get_base_layer()
        weight = self.get_base_weight() if self.quantization_backend is not None else _weight(base).detach()
        matrix_NM = weight.mT if isinstance(base, Conv1D) else weight.flatten(1)
        for down_RM, up_NR in self._merged_factors.values():
            matrix_NM = torch.addmm(matrix_NM.to(up_NR.dtype), up_NR, down_RM, alpha=-1).to(weight.dtype)
        return matrix_NM

    def _products(self, factor_RD: Tensor, side: str) -> Tensor:
        """Rows ("input") or columns ("output") of the weight times the first layer of the network."""
        if not self._weight_can_be_read():
            # The layer multiplies for us: its outputs for the rows of the factor.
            base = self.get_base_layer()
            products_RN, bias_N = base(factor_RD), cast(Tensor | None, base.bias)
            return (products_RN if bias_N is None else products_RN - bias_N).mT
        kept = self.quantization_backend is None and not self.merged
        return product(factor_RD, self._matrix if side == "input" else lambda: self._matrix().mT, kept)

    # -- the two factors ---------------------------------------------------------------------------------------------

    def _features(self, adapter: str) -> Tensor:
        """H: `(N, r)` for the side "input", `(M, r)` for "output"."""
        encoders, decoders = (
            [_weight(layer) for layer in hidden[adapter].children()]
            for hidden in (self.peanut_encoders, self.peanut_decoders)
        )
        products = self._products(_weight(self.peanut_A[adapter]), self.side[adapter])
        features = hidden_features(products, encoders, decoders, self.activation[adapter])
        return features * self.peanut_gain[adapter] if adapter in self.peanut_gain else features

    def _network(self, adapter: str) -> list[nn.Module]:
        """The modules of an adapter that hold tensors."""
        hidden = (self.peanut_encoders[adapter], self.peanut_decoders[adapter])
        layers = [layer for part in hidden for layer in part.children()]
        return [self.peanut_A[adapter], *layers, self.peanut_B[adapter], self.peanut_gain]

    def _computed_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        features, last_DR = self._features(adapter), _weight(self.peanut_B[adapter])
        return (last_DR.mT, features) if self.side[adapter] == "input" else (features.mT, last_DR)

    def thin_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """(down `(r, M)`, up `(N, r)`): the update is `scaling * up @ down`; LoRA's A and B with the same outputs.

        Computed anew only if they need gradients, or something that they depend on has changed. While anything is merged they are those of
        the weight without it, and have no gradients.
        """
        if torch.compiler.is_compiling():
            return self._computed_factors(adapter)
        merged, gradients = self.merged, torch.is_grad_enabled()
        kept = (self._before_merging if merged else self._kept).get(adapter)
        if (merged or not gradients) and kept is not None and kept.still_true():
            return kept.value
        network = self._network(adapter)
        if gradients and any(p.requires_grad for layer in network for p in layer.parameters()):
            # Fused optimizers do not count their writes.
            self._kept.pop(adapter, None)
            return self._computed_factors(adapter)
        if kept is not None and kept.still_true():
            return kept.value
        if not merged and self._weight_can_be_read():
            kept = keep([self.get_base_layer(), *network], lambda: self._computed_factors(adapter))
            if kept is not None:
                self._kept[adapter] = kept
                return kept.value
        return self._computed_factors(adapter)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update in the shape of the weight."""
        down_RM, up_NR = self.thin_factors(adapter)
        return self._shaped(self.scaling[adapter] * up_NR @ down_RM)

    def _shaped(self, matrix_NM: Tensor) -> Tensor:
        if isinstance(self.get_base_layer(), Conv1D):
            return matrix_NM.mT
        return matrix_NM.view(len(matrix_NM), -1, *self.kernel) if self.kernel else matrix_NM

    def invalidate(self) -> None:
        """Forget what was computed from the weights."""
        self._kept.clear()

    def train(self, mode: bool = True) -> NeatLayer:
        self.invalidate()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> NeatLayer:
        # `.to`, `.half` and the like write to `.data`.
        self.invalidate()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles leave it behind.
        return {**self.__dict__, "_kept": {}}

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or (self.merged and names is None):
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if names is not None:
            return self._plus_updates_by_row(names, x, result)
        for adapter in self._present(self.active_adapters):
            result = self._plus_update(adapter, x, result)
        return result

    def _plus_updates_by_row(self, names: list[str], x: Tensor, result: Tensor) -> Tensor:
        owners, result = owners_of(len(x), names, self), result.clone()
        for adapter in self._present(sorted(set(names))):
            rows = [row for row, owner in enumerate(owners) if owner == adapter]
            result[rows] = self._plus_update(adapter, x[rows], result[rows])
        return result

    def _plus_update(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """The outputs with what an adapter adds to them."""
        down_RM, up_NR = self.thin_factors(adapter)
        x, scaling = self._cast_input_dtype(x, down_RM.dtype), self.scaling[adapter]
        if self.training and self.dropout[adapter]:
            x = F.dropout(x, self.dropout[adapter])
        if self.kernel:
            base, convolve = self.get_base_layer(), _CONVOLVE[len(self.kernel) - 1]
            kernels = down_RM.reshape(len(down_RM), -1, *self.kernel)
            inside = convolve(x, kernels, None, base.stride, base.padding, base.dilation)
            update = convolve(inside * scaling, up_NR.view(*up_NR.shape, *[1] * len(self.kernel)))
        else:
            inside = F.linear(x, down_RM)
            update = F.linear(inside if scaling == 1 else inside * scaling, up_NR)
        # Into a tensor that nobody else has seen.
        return update.add_(result) if update.dtype == result.dtype else result + update.to(result.dtype)

    # -- merging -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if names and not self.merged:
            # An update is a function of the original weight, which a merged one gives back only as far as it was not rounded.
            found = {name: keep(self._network(name), partial(self._computed_factors, name)) for name in self.r}
            self._before_merging = {name: kept for name, kept in found.items() if kept is not None}
        for name in names:
            down_RM, up_NR = (factor.detach().clone() for factor in self.thin_factors(name))
            up_NR *= self.scaling[name]
            self._write(up_NR, down_RM, f"The adapter {name} seems to be broken" if safe_merge else None)
            self._merged_factors[name] = (down_RM, up_NR)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            down_RM, up_NR = self._merged_factors.pop(self.merged_adapters.pop())
            self._write(-up_NR, down_RM)
        self._before_merging = {}

    def _write(self, up_NR: Tensor, down_RM: Tensor, otherwise: str | None = None) -> None:
        """Add a product to the weight, rounding once; `otherwise`: what to say if the sum is not finite."""
        weight = self.get_base_weight()
        wide = torch.promote_types(up_NR.dtype, torch.float32)
        changed = (weight.to(wide) + self._shaped(up_NR.to(wide) @ down_RM.to(wide))).to(weight.dtype)
        if otherwise is not None and not bool(changed.isfinite().all()):
            raise ValueError(f"NaNs detected in the merged weights. {otherwise}")
        if self.quantization_backend is not None:
            self.set_base_weight(changed)
        else:
            weight.copy_(changed)
        self.invalidate()

    def __repr__(self) -> str:
        return "neat." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
