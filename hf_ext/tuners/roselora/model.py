"""RoseLoRA as a PEFT tuner: LoRA's layers, with pruning attached."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel
from torch import nn

from hf_ext.tuners.roselora import pruning
from hf_ext.tuners.roselora.config import RoseLoraConfig
from hf_ext.tuners.roselora.density import DensityReport, density_report


class RoseLoraModel(LoraModel):
    """LoRA with row- and column-wise sparse factors (https://huggingface.co/papers/2406.10777).

    Layers, quantised bases, saving, merging and inference are those of [`~peft.LoraModel`]. While an adapter trains, its
    factors are pruned at every `optimizer.step()` of a `torch.optim` optimizer; nothing has to be called. Several
    adapters may train in one model, each on its own schedule; a frozen adapter is never touched.

    Example:
        ```python
        model = get_peft_model(base, RoseLoraConfig(sparsity=0.95, task_type="CAUSAL_LM"))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[RoseLoraCallback()])
        trainer.train()
        print(model.base_model.density())
        ```
    """

    # `prefix` and `tuner_layer_cls` are LoraModel's: the tensors are stock LoRA tensors.

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        pruning.attach(model, adapter_name, cast(RoseLoraConfig, self.peft_config[adapter_name]))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        pruning.detach(self.model, adapter_name)

    def update_and_allocate(self, global_step: int) -> None:
        """Prune by hand, as AdaLoRA's users do: after `optimizer.step()` and before the gradients are cleared.

        With a `torch.optim` optimizer the step has been pruned already and this call does nothing. It is for optimizers
        without step hooks; there the scores of a step use the weights that the previous call left behind, which are the
        weights of that step's forward pass, and scoring begins with the second call.

        Args:
            global_step: optimizer steps finished so far, this one included.
        """
        for name, schedule in pruning.schedules(self.model).items():
            if schedule.advanced:
                schedule.advanced = False
                continue
            schedule.restart(global_step)
            factors = [f for p in pruning.pruners(self.model) for f in p.trainable(name)]
            for factor in factors:
                if factor.parameter.grad is not None:
                    # Zero stands for the unknown weights of the first step: with B = 0 every score is zero there.
                    before = factor.state.last_weight
                    weight = torch.zeros_like(factor.parameter) if before is None else before
                    pruning.score(factor, weight, factor.parameter.grad)
            pruning.prune(factors)
            for factor in factors:
                factor.state.last_weight = factor.parameter.detach().clone()

    def density(self, adapter_name: str | None = None) -> DensityReport:
        """How sparse the adapter is: see [`density_report`]."""
        return density_report(self.model, adapter_name)
