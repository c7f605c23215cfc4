"""LoR-VP as a PEFT tuner: which layers read the pixels and name the classes, and how a prompt becomes a part of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from hf_ext.tuners.lorvp.config import LorVpConfig
from hf_ext.tuners.lorvp.fold import as_rows, position_table
from hf_ext.tuners.lorvp.head import LorVpHead
from hf_ext.tuners.lorvp.layer import LorVpConvolution, LorVpLayer, detach_map
from hf_ext.tuners.lorvp.targets import base_of, classifiers_of, convolution_of, one_classifier, scales_of, vision_fact
from hf_ext.tuners.rows import adapter_for_each_row

FOLDS = ("auto", "positions", "map")


class LorVpModel(BaseTuner):
    """Low-rank visual prompting (https://huggingface.co/papers/2502.00896).

    Example:
        ```python
        model = get_peft_model(base, LorVpConfig(r=4))
        ```
    """

    prefix = "lorvp_"
    tuner_layer_cls = LorVpLayer
    target_module_mapping = {}  # noqa: RUF012  # any model: `_prepare_model` finds the convolution

    # -- which layers --------------------------------------------------------------------------------------------------

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config  # `_prepare_model` does it, since it has the model

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        config, facts = cast(LorVpConfig, peft_config), self.get_model_config(model)
        name = convolution_of(model, config, facts)
        size = config.image_size or vision_fact(facts, "image_size")
        if size is None:
            raise ValueError(
                f"image_size: {type(model).__name__} does not say how large its pictures are; give their height and width."
            )
        config.image_size = [size, size] if isinstance(size, int) else list(size)
        config.pixel_scale = scales_of(config, model, cast(nn.Conv2d, base_of(model.get_submodule(name))).in_channels)
        _check_fits(config)
        targets, asked = {name}, list(config.modules_to_save or ())
        if config.head != "none":
            classifiers = classifiers_of(model, name, config.head, facts.get("model_type"))
            if config.head == "linear":
                # Those that contain a classifier would be trained with it, and could be neither loaded nor merged.
                asked = [each for each in asked if not any(_within(found, each) for found in classifiers)]
                config.modules_to_save = sorted({*asked, *classifiers})
            else:
                mapped = one_classifier(model, classifiers, config)
                if double := [each for each in asked if _within(mapped, each)]:
                    raise ValueError(
                        f"modules_to_save={double}: head={config.head!r} maps what this puts out; use head='linear' to train it."
                    )
                targets.add(mapped)
        config.target_modules = targets

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config, layer = cast(LorVpConfig, peft_config), target
        is_head = not isinstance(base_of(target), nn.Conv2d)
        if not isinstance(target, LorVpLayer):
            layer = LorVpHead(target, cast(Any, self.model).config) if is_head else LorVpConvolution(target)
        if isinstance(layer, LorVpConvolution):
            around = dict(parent.named_children()).get("padding")
            padding = around.padding if isinstance(around, nn.ZeroPad2d) else (0, 0, 0, 0)
            layer.update_layer(adapter_name, config, padding)
            if layer.hook is None:
                layer.hook = self.model.register_forward_pre_hook(layer.keep_frozen)
        else:
            cast(LorVpHead, layer).update_layer(adapter_name, config)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    # -- which adapters -------------------------------------------------------------------------------------------------

    def _check_one_head(self, names: str | list[str]) -> None:
        """
        Raises:
            ValueError: several of these adapters map the classes of the model.
        """
        for module in self.modules():
            if isinstance(module, LorVpHead):
                module.check_one([names] if isinstance(names, str) else names)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_one_head(adapter_name)
        super().set_adapter(adapter_name, inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_one_head(self.active_adapters if adapter_names is None else adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.set_adapter(self.active_adapters)

    # -- use -----------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> LorVpModel:
        """Training mode, but for what is frozen, if an active adapter has `freeze_norm`."""
        super().train(mode)
        if mode:
            for _, layer in self._convolutions():
                layer.keep_frozen(self.model, None)
        return self

    def _convolutions(self) -> Iterator[tuple[str, LorVpConvolution]]:
        return ((name, layer) for name, layer in self.model.named_modules() if isinstance(layer, LorVpConvolution))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand every layer what `PeftModel` was called with as `adapter_names`: an adapter, or "__base__", for each row.

        Raises:
            ValueError: a name that the model does not have, or the model is in training mode.
        """
        with adapter_for_each_row(self, kwargs.get("adapter_names"), LorVpLayer):
            yield

    # -- going ---------------------------------------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        fold: str = "auto",
    ) -> nn.Module:
        """The model with the prompt as a part of it.

        Args:
            fold: `"positions"`, into the table of positions, which gives an ordinary model; `"map"`, as a buffer `spatial_bias` of the convolution, which other installations
                do not know; `"auto"`, into the positions if that is exact, otherwise as a map, with a warning.

        Raises:
            ValueError: `fold="positions"` and the model has none to which it could be added; or `safe_merge` and the prompt is not finite.
        """
        if fold not in FOLDS:
            raise ValueError(f"fold={fold!r}: choose one of {', '.join(map(repr, FOLDS))}.")
        (name, layer), table = next(self._convolutions()), None
        self.merge_adapter(adapter_names, safe_merge)
        merged_map = layer.merged_map()
        if fold != "map" and merged_map is not None:
            try:
                table = position_table(self.model, name, layer, merged_map)
            except ValueError as reason:
                if fold == "positions":
                    self.unmerge_adapter()
                    raise
                warnings.warn(
                    f"merge_and_unload: {reason} It is now a buffer of the first convolution, `spatial_bias`, which a model that is loaded elsewhere does not have: save the "
                    "adapter, not the merged model.",
                    stacklevel=2,
                )
        layer.hook.remove()
        model = super().merge_and_unload(progressbar)
        if table is not None:
            detach_map(layer.convolution)
            table += as_rows(cast(Tensor, merged_map))
        return model

    def unload(self) -> nn.Module:
        for _, layer in self._convolutions():
            layer.hook.remove()
        return super().unload()


def _within(name: str, other: str) -> bool:
    """Whether a module is the other one or a part of it."""
    return name == other or name.startswith(f"{other}.")


def _check_fits(config: LorVpConfig) -> None:
    """
    Raises:
        ValueError: a frame or a tile is as large as the picture.
    """
    smaller = min(cast(list[int], config.image_size))
    if config.prompt.startswith("low_rank") and config.r > smaller:
        warnings.warn(
            f"r={config.r}: a prompt of {config.image_size} pixels has no higher rank than {smaller}.", stacklevel=2
        )
    if config.width is not None and config.width * (2 if config.prompt == "frame" else 1) >= smaller:
        raise ValueError(
            f"width={config.width}: a {config.prompt} of that width is as large as the picture; use prompt='free'."
        )
