"""LoR-VP's layers: the convolution that reads the pixels, with what it makes of a prompt, and a classifier whose outputs are mapped.

A convolution is linear: conv(x + P) = conv(x) + conv(P) without bias, and the second term is the same for every input. So the pixels are never touched.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_ext._compat import layer_features
from hf_ext.tuners.kept import Kept, keep
from hf_ext.tuners.lorvp import reference
from hf_ext.tuners.lorvp.config import LorVpConfig
from hf_ext.tuners.rows import owners_of

_TEST_STD = 0.5  # of all parameters that `init_weights=False` draws


class LorVpLayer(BaseTunerLayer):
    """What PEFT asks of both layers."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters, self._active_adapter = False, []
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = layer_features(base_layer)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    @abstractmethod
    def names(self) -> set[str]:
        """Of the adapters that the layer has."""

    def present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.names()]

    def _added(self, adapter_name: str, config: LorVpConfig) -> None:
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


@dataclass(frozen=True)
class PromptSettings:
    """What a prompt is, apart from its numbers. The padding is what the model puts around pictures before the convolution."""

    kind: str
    size: tuple[int, int]
    scale: tuple[float, ...]
    width: int | None
    resize: bool
    freeze: bool
    padding: tuple[int, int, int, int]


class LorVpConvolution(nn.Module, LorVpLayer):
    """The convolution that reads the pixels `(N, C, H, W)`, with prompts.

    An adapter holds, for the prompt `"low_rank"`, `lorvp_B` `(C, H, r)` and `lorvp_A` `(C, r, W)`; for `"low_rank_shared"`, `lorvp_C` `(C, r)`, `lorvp_B` `(H, r)`
    and `lorvp_A` `(r, W)`; for others `lorvp_P`, their free pixels. What the convolution makes of a prompt is kept while nothing that it depends on changes,
    unless it needs a gradient.
    """

    adapter_layer_names = ("lorvp_B", "lorvp_A", "lorvp_C", "lorvp_P")
    other_param_names = ("settings",)

    def __init__(self, base_layer: nn.Module) -> None:
        nn.Module.__init__(self)
        LorVpLayer.__init__(self, base_layer)
        self.lorvp_B, self.lorvp_A = nn.ParameterDict(), nn.ParameterDict()
        self.lorvp_C, self.lorvp_P = nn.ParameterDict(), nn.ParameterDict()
        self.settings: dict[str, PromptSettings] = {}
        self.hook: Any = None
        self._merged_prompts: dict[str, Tensor] = {}
        self._kept: dict[str, tuple[tuple[int, int], Kept]] = {}

    def names(self) -> set[str]:
        return set(self.settings)

    @property
    def convolution(self) -> nn.Conv2d:
        """Without adapters."""
        return cast(nn.Conv2d, self.get_base_layer())

    @property
    def stride(self) -> Any:
        """Some models read it."""
        return self.convolution.stride

    @property
    def kernel_size(self) -> Any:
        return self.convolution.kernel_size

    @property
    def dilation(self) -> Any:
        return self.convolution.dilation

    # -- prompts -------------------------------------------------------------------------------------------------------

    def update_layer(
        self, adapter_name: str, config: LorVpConfig, padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    ) -> None:
        height, width = cast(list[int], config.image_size)
        colours = self.convolution.in_channels
        scale = tuple(cast(list[float], config.pixel_scale))
        self.settings[adapter_name] = PromptSettings(
            config.prompt, (height, width), scale, config.width, config.resize_prompt, config.freeze_norm, padding
        )
        mask_pixels = height * width
        if config.prompt == "frame":
            mask_pixels = int(reference.frame_mask(height, width, cast(int, config.width)).sum())
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "low_rank": {"lorvp_B": (colours, height, config.r), "lorvp_A": (colours, config.r, width)},
            "low_rank_shared": {
                "lorvp_C": (colours, config.r),
                "lorvp_B": (height, config.r),
                "lorvp_A": (config.r, width),
            },
            "frame": {"lorvp_P": (colours, mask_pixels)},
            "tile": {"lorvp_P": (colours, config.width or 0, config.width or 0)},
            "free": {"lorvp_P": (colours, height, width)},
        }
        holders = {"lorvp_B": self.lorvp_B, "lorvp_A": self.lorvp_A, "lorvp_C": self.lorvp_C, "lorvp_P": self.lorvp_P}
        for name, shape in shapes[config.prompt].items():
            parameter = nn.Parameter(torch.zeros(shape))
            if not config.init_weights:
                nn.init.normal_(parameter, std=_TEST_STD)
            elif name == "lorvp_A":
                nn.init.normal_(parameter, std=config.init_std)
            elif name == "lorvp_C":
                nn.init.ones_(parameter)
            holders[name][adapter_name] = parameter
        self._kept.pop(adapter_name, None)
        self._added(adapter_name, config)

    def prompt(self, adapter: str) -> Tensor:
        """The prompt `(C, H, W)` for pixels in [0, 1]."""
        settings = self.settings[adapter]
        kind, (height, width) = settings.kind, settings.size
        if kind == "low_rank":
            return reference.low_rank(self.lorvp_B[adapter], self.lorvp_A[adapter])
        if kind == "low_rank_shared":
            return reference.low_rank_shared(self.lorvp_C[adapter], self.lorvp_B[adapter], self.lorvp_A[adapter])
        values = self.lorvp_P[adapter]
        if kind == "frame":
            return reference.frame(
                values, reference.frame_mask(height, width, cast(int, settings.width), values.device)
            )
        return reference.tiled(values, height, width) if kind == "tile" else values

    def _scaled_prompt(self, adapter: str) -> Tensor:
        device = self._get_base_layer_device_and_dtype(self.convolution)[0]
        with torch.autocast(device.type if device is not None else "cpu", enabled=False):
            return reference.scaled(self.prompt(adapter), self.settings[adapter].scale)

    # -- what the convolution makes of them ----------------------------------------------------------------------------

    def _convolved(self, prompt_CHW: Tensor, adapter: str, size: tuple[int, int]) -> Tensor:
        base = self.convolution
        if prompt_CHW.shape[1:] != size:
            prompt_CHW = reference.resized(prompt_CHW, *size)
        pixels_1CHW = F.pad(prompt_CHW[None], self.settings[adapter].padding).to(base.weight.dtype)
        # Without what it adds to every input. By the module, not by its formula: it may standardise its weights, or have them gathered from elsewhere.
        without = {"bias": base.weight.new_zeros(base.out_channels)} if base.bias is not None else {}
        if "spatial_bias" in dict(base.named_buffers()):
            without["spatial_bias"] = torch.zeros_like(cast(Tensor, base.spatial_bias))
        return functional_call(self.base_layer, without, (pixels_1CHW,), tie_weights=False)

    def constant_map(self, adapter: str, size: tuple[int, int] | None = None) -> Tensor:
        """What an adapter adds to the outputs of the convolution, `(1, D, h, w)`, for pictures of a size; default: that of the prompt."""
        size = size or self.settings[adapter].size
        if adapter in self._merged_prompts:
            return self._convolved(self._merged_prompts[adapter], adapter, size)
        holders: list[nn.Module] = [self.lorvp_B, self.lorvp_A, self.lorvp_C, self.lorvp_P]
        own = [holder[adapter] for holder in holders if adapter in holder]  # type: ignore[operator, index]
        # What is trained changes unseen: fused optimizers do not count their writes.
        if torch.compiler.is_compiling() or any(p.requires_grad for p in (*own, *self.convolution.parameters())):
            self._kept.pop(adapter, None)
            return self._convolved(self._scaled_prompt(adapter), adapter, size)
        kept_size, kept = self._kept.get(adapter, (None, None))
        if kept_size == size and kept is not None and kept.still_true():
            return kept.value
        kept = keep([self.convolution, *holders], lambda: self._convolved(self._scaled_prompt(adapter), adapter, size))
        if kept is None:
            return self._convolved(self._scaled_prompt(adapter), adapter, size)
        self._kept[adapter] = (size, kept)
        return kept.value

    def _size(self, pixels: Tensor, adapter: str) -> tuple[int, int]:
        """Of the pictures, before the model put anything around them.

        Raises:
            ValueError: the prompt has another.
        """
        settings = self.settings[adapter]
        left, right, top, bottom = settings.padding
        height, width = pixels.shape[-2] - top - bottom, pixels.shape[-1] - left - right
        if (height, width) != settings.size and not settings.resize:
            raise ValueError(
                f"image_size: the prompt of adapter {adapter!r} is for pictures of {settings.size[0]} x {settings.size[1]} pixels, and these have {height} x {width}: resize them, or "
                "set resize_prompt=True. If they have the right size, the model pads them in a way that LoR-VP does not know."
            )
        return height, width

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if names is None:
            for adapter in self.merged_adapters or self.present(self.active_adapters):
                result = result + self.constant_map(adapter, self._size(x, adapter)).to(result.dtype)
            return result
        owners = owners_of(len(result), names, self)
        maps = {name: self.constant_map(name, self._size(x, name)).to(result.dtype) for name in self.present(owners)}
        maps["__base__"] = torch.zeros_like(result[:1])
        order = list(maps)
        index = torch.tensor([order.index(owner) for owner in owners], device=result.device)
        return result + torch.cat(list(maps.values()))[index]

    def keep_frozen(self, model: nn.Module, args: Any) -> None:
        """Before a training step: put what is frozen into eval mode, if an active adapter asks for it."""
        if model.training and any(self.settings[name].freeze for name in self.present(self.active_adapters)):
            rest(model)

    # -- merging -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for name in self.present(check_adapters_to_merge(self, adapter_names)):
            if safe_merge and not bool(self.constant_map(name).isfinite().all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._merged_prompts[name] = self._scaled_prompt(name).detach().clone()
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self._merged_prompts.clear()

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The convolution alone; to merge, with the sum of the maps as its buffer `spatial_bias`."""
        base = self.convolution
        if merge and not self.merged:
            self.merge(safe_merge, adapter_names)
        merged_map = self.merged_map() if merge else None
        if merged_map is not None:
            attach_map(base, merged_map.to(base.weight.dtype))
        return base

    def merged_map(self) -> Tensor | None:
        """What merged adapters add to the outputs of the convolution, `(1, D, h, w)`.

        Raises:
            ValueError: they are for pictures of different sizes.
        """
        if len({self.settings[name].size for name in self.merged_adapters}) > 1:
            raise ValueError(
                f"the prompts of {self.merged_adapters} are for pictures of different sizes: merge one of them."
            )
        maps = [self.constant_map(name) for name in self.merged_adapters]
        return torch.stack(maps).sum(0) if maps else None

    def train(self, mode: bool = True) -> LorVpConvolution:
        self._kept.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> LorVpConvolution:
        # `.to`, `.half` and the like write to `.data`.
        self._kept.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def __repr__(self) -> str:
        return "lorvp." + super().__repr__()


def rest(module: nn.Module) -> bool:
    """Put into eval mode what holds no parameter that is trained; whether the module holds one.

    A layer that is checkpointed keeps its mode, which says that it is; what it consists of does not. Modules that are trained whole are left alone.
    """
    if isinstance(module, AuxiliaryTrainingWrapper):
        return True
    trained = any(p.requires_grad for p in module.parameters(recurse=False))
    for child in module.children():
        trained |= rest(child)
    if not trained and not (isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing):
        module.training = False
    return trained


# -- a convolution with a constant map ----------------------------------------------------------------------------------


def attach_map(convolution: nn.Module, spatial_bias: Tensor) -> None:
    """Let a convolution add `spatial_bias` `(1, D, h, w)`, which becomes a buffer of it, to its outputs; a second one is added to the first."""
    if "spatial_bias" in dict(convolution.named_buffers()):
        convolution.spatial_bias = cast(Tensor, convolution.spatial_bias) + spatial_bias
        return
    convolution.register_buffer("spatial_bias", spatial_bias)
    cast(Any, convolution).spatial_bias_hook = convolution.register_forward_hook(_add_map)


def detach_map(convolution: nn.Module) -> None:
    """Undo `attach_map`."""
    cast(Any, convolution).spatial_bias_hook.remove()
    del convolution.spatial_bias, convolution.spatial_bias_hook


def _add_map(convolution: nn.Module, args: Any, output: Tensor) -> Tensor:
    bias = cast(Tensor, convolution.spatial_bias)
    if output.shape[-2:] != bias.shape[-2:]:
        raise ValueError(
            f"spatial_bias: the prompt was merged for {tuple(bias.shape[-2:])} outputs of the convolution, and these pictures give {tuple(output.shape[-2:])}: resize them."
        )
    return output + bias.to(output.dtype)
