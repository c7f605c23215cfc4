"""A classifier whose outputs, scores of source classes, become scores of the classes of a new task."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_ext._compat import saved_buffers
from hf_ext.tuners.lorvp.config import LorVpConfig
from hf_ext.tuners.lorvp.layer import LorVpLayer
from hf_ext.tuners.rows import owners_of


class LorVpHead(nn.Module, LorVpLayer):
    """The classifier of a model, `(N, d)` to `(N, S)` source classes, with maps to target classes.

    An adapter holds, for the head `"output_map"`, a linear layer `lorvp_head` from S to T; for `"label_map"`, the source class of each target class, `lorvp_label_map` `(T,)`,
    int64. While one is active, the number and the names of classes in the model's configuration are those of the target.
    """

    adapter_layer_names = ("lorvp_head",)
    other_param_names = ("lorvp_label_map", "labels")

    def __init__(self, base_layer: nn.Module, model_config: PreTrainedConfig) -> None:
        nn.Module.__init__(self)
        LorVpLayer.__init__(self, base_layer)
        self.lorvp_head = nn.ModuleDict()
        self.lorvp_label_map = saved_buffers()
        self.labels: dict[str, dict[int, str]] = {}
        self.model_config = model_config
        self.source_problem = model_config.problem_type
        self.source_labels = dict(cast(dict[int, str], model_config.id2label))
        self.register_load_state_dict_post_hook(_check_maps)

    def names(self) -> set[str]:
        return set(self.labels)

    def update_layer(self, adapter_name: str, config: LorVpConfig) -> None:
        targets = cast(int, config.num_labels)
        if config.head == "output_map":
            self.lorvp_head[adapter_name] = nn.Linear(self.out_features, targets)
        else:
            # Not on the device "meta", where an adapter that is about to be loaded is made: PEFT would move it from there.
            self.lorvp_label_map[adapter_name] = torch.tensor(list(range(targets)), device=self._device())
        self.labels[adapter_name] = config.id2label or {number: f"LABEL_{number}" for number in range(targets)}
        self._added(adapter_name, config)

    def _device(self) -> torch.device | None:
        return self._get_base_layer_device_and_dtype(self.get_base_layer())[0]

    # -- which classes the model has -----------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.announce()

    def check_one(self, names: list[str]) -> None:
        """
        Raises:
            ValueError: several of these adapters map the classes.
        """
        if len(set(self.present(names))) > 1:
            raise ValueError(f"adapters {self.present(names)} both map the classes of the model: use one of them.")

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.announce()

    def delete_adapter(self, adapter_name: str) -> None:
        # Which one is active instead is not for this layer to say, which does not have them all.
        for holder in (self.lorvp_head, self.lorvp_label_map, self.labels):
            if adapter_name in holder:
                del holder[adapter_name]
        self.set_adapter([name for name in self.active_adapters if name != adapter_name])

    def announce(self) -> None:
        """Tell the model's configuration which classes there are: the loss reads their number."""
        active = [] if self.disable_adapters else self.merged_adapters or self.present(self.active_adapters)
        labels = self.labels[active[0]] if active else self.source_labels
        if len(labels) != self.model_config.num_labels:
            # The loss has written it for the old number.
            self.model_config.problem_type = self.source_problem
        self.model_config.num_labels = len(labels)
        self.model_config.id2label = dict(labels)
        self.model_config.label2id = {name: number for number, name in labels.items()}

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names: list[str] | None = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        scores = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return scores
        if names is not None:
            return self._mapped_by_row(scores, owners_of(len(scores), names, self))
        mapping = self.merged_adapters or self.present(self.active_adapters)
        self.check_one(mapping)
        return self.mapped(scores, mapping[0]) if mapping else scores

    def mapped(self, scores_NS: Tensor, adapter: str) -> Tensor:
        """Scores of target classes."""
        if adapter in self.lorvp_label_map:
            return scores_NS[..., self.lorvp_label_map[adapter]]
        head = cast(nn.Linear, self.lorvp_head[adapter])
        return head(scores_NS.to(head.weight.dtype)).to(scores_NS.dtype)

    def _mapped_by_row(self, scores_NS: Tensor, owners: list[str]) -> Tensor:
        mapped = [
            self.mapped(scores, owner) if owner in self.names() else scores
            for scores, owner in zip(scores_NS, owners, strict=True)
        ]
        if len({len(scores) for scores in mapped}) > 1:
            raise ValueError(
                f"adapter_names: {sorted(set(owners))} have different numbers of classes; ask them one by one."
            )
        return torch.stack(mapped)

    # -- merging -------------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = self.present(check_adapters_to_merge(self, adapter_names))
        self.check_one([*self.merged_adapters, *names])
        self.merged_adapters += names
        self.announce()

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self.announce()

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The classifier alone; to merge, that of the target classes.

        Raises:
            ValueError: its weights are quantised.
        """
        base = cast(nn.Linear, self.get_base_layer())
        if not merge:
            self.set_adapter([])
            return base
        if not self.merged:
            self.merge(safe_merge, adapter_names)
        for name in self.merged_adapters:
            weight_SD, bias_S = base.weight, cast(Tensor | None, base.bias)
            if not weight_SD.is_floating_point():
                raise ValueError(
                    "the classifier is quantised, so that no map can be merged into it: load the base with "
                    'llm_int8_skip_modules=["classifier"].'
                )
            # A linear map of scores, be it a choice, is one of the weights.
            bias_T: Tensor | None
            if name in self.lorvp_label_map:
                chosen_T = self.lorvp_label_map[name]
                weight_TD, bias_T = weight_SD[chosen_T], None if bias_S is None else bias_S[chosen_T]
            else:
                head = cast(nn.Linear, self.lorvp_head[name])
                weight_TD = (head.weight @ weight_SD.to(head.weight.dtype)).to(weight_SD.dtype)
                bias_T = head.bias if bias_S is None else head(bias_S.to(head.weight.dtype))
                bias_T = bias_T.to(weight_SD.dtype)
            base.weight = nn.Parameter(weight_TD.contiguous(), requires_grad=False)
            if bias_T is not None:
                base.bias = nn.Parameter(bias_T.contiguous(), requires_grad=False)
            base.out_features = len(weight_TD)
        self.enable_adapters(True)  # so that the configuration has the classes of what is merged
        return base

    def __repr__(self) -> str:
        return "lorvp." + super().__repr__()


def _check_maps(head: LorVpHead, incompatible_keys: Any) -> None:
    """
    Raises:
        ValueError: a loaded map names source classes that the classifier does not have.
    """
    for adapter, chosen_T in head.lorvp_label_map.items():
        if chosen_T.device.type != "meta" and int(chosen_T.max()) >= head.out_features:
            raise ValueError(
                f"adapter {adapter!r} maps to the source class {int(chosen_T.max())}, and the classifier has {head.out_features}: it was trained on another model, see its base_model_name_or_path."
            )
