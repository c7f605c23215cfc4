"""What adaptive SVD is compared with, each a `TaskSequenceTrainer`, with the loss that all of them share."""

from __future__ import annotations

from typing import Any

import torch
from datasets import concatenate_datasets
from peft import LoraConfig, OSFConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from hf_ext.trainers.adaptive_svd import AdaptiveSVDTrainer
from hf_ext.trainers.task_sequence import TaskSequenceTrainer


class OptionTrainer(TaskSequenceTrainer):
    """At the place of the label, the softmax is that over the options of its task, as in `TaskSequenceTrainer.scores`.

    Over the whole vocabulary a small model learns first of all which labels the present task has, and nothing is left of the others.
    """

    _options: Tensor | None = None

    def options_of_tokens(self) -> Tensor:
        """`[token, other token]`: both are labels of one task; other tokens have none but all."""
        if self._options is None:
            self._options = torch.ones(len(self.processing_class), len(self.processing_class), dtype=torch.bool)
            for task in self.tasks:
                encoded = self.processing_class(list(task.options), add_special_tokens=False)["input_ids"]
                tokens = torch.tensor(encoded)[:, 0]
                self._options[tokens] = False
                self._options[tokens[:, None], tokens] = True
        return self._options

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean over labels and ends of sequence."""
        logits = model(**{name: value for name, value in inputs.items() if name != "labels"}, use_cache=False).logits
        labels = inputs["labels"][:, 1:]
        answers = labels != -100
        chosen = labels[answers]
        open_logits = logits[:, :-1][answers].masked_fill(~self.options_of_tokens()[chosen], -torch.inf)
        loss = nn.functional.cross_entropy(open_logits, chosen)
        return (loss, None) if return_outputs else loss


class AdaptiveSVD(AdaptiveSVDTrainer, OptionTrainer):
    """Ours, with the loss of the others."""


class EWC(OptionTrainer):
    """Elastic weight consolidation (https://huggingface.co/papers/1612.00796): a quadratic penalty for every learnt task.

    The Fisher information is the mean of squared gradients of single training rows, added up over the tasks.
    """

    strength, rows = 3000.0, 200

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        for name, parameter in self.model.named_parameters() if self._anchor else ():
            loss = loss + self.strength / 2 * (self._fisher[name] * (parameter - self._anchor[name]).square()).sum()
        return (loss, None) if return_outputs else loss

    def after_task(self, number: int) -> None:
        self._anchor = {}
        data = self.prepared(number).shuffle(seed=self.args.seed).select(range(self.rows))
        found = {name: torch.zeros_like(parameter) for name, parameter in self.model.named_parameters()}
        for row in data:
            self.model.zero_grad()
            self.compute_loss(self.model, self.data_collator([row])).backward()
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    found[name] += parameter.grad.square() / self.rows
        self.model.zero_grad()
        self._fisher = {name: value + self._fisher.get(name, 0.0) for name, value in found.items()}
        self._anchor = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}


class Replay(OptionTrainer):
    """A few rows of every earlier task among those of the present one."""

    memory = 28

    def before_task(self, number: int, resumed: bool) -> None:
        kept = [
            self.prepared(earlier).shuffle(seed=self.args.seed).select(range(self.memory)) for earlier in range(number)
        ]
        self.train_dataset = concatenate_datasets([self.prepared(number), *kept])


class OLoRA(OptionTrainer):
    """O-LoRA (https://huggingface.co/papers/2310.14152): one adapter per task, with A orthogonal to those of earlier tasks.

    `model` is a plain one; all adapters stay active, and those of earlier tasks are frozen.
    """

    strength = 0.5

    def before_task(self, number: int, resumed: bool) -> None:
        config = lora()
        if number:
            self.model.add_adapter(f"task_{number}", config)
        else:
            self.model = self.model_wrapped = get_peft_model(self.model, config, adapter_name="task_0")
        self.model.base_model.set_adapter([f"task_{earlier}" for earlier in range(number + 1)])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(f".task_{number}." in name)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        for module in self.model.modules():
            if not isinstance(module, LoraLayer):
                continue
            for earlier in range(self.task_number):
                new, old = module.lora_A[f"task_{self.task_number}"].weight, module.lora_A[f"task_{earlier}"].weight
                loss = loss + self.strength * (new @ old.mT).abs().sum()
        return (loss, None) if return_outputs else loss


class OSF(OptionTrainer):
    """PEFT's OSF from the second task on, merged after every one; the first is plain fine-tuning, as in the reference.

    `rest`: train what is not targeted too, which PEFT freezes.
    """

    retention, rest = 0.8, False

    def before_task(self, number: int, resumed: bool) -> None:
        if number == 0:
            return
        config = OSFConfig(effective_rank=self.retention, target_modules=linear_names(self.model))
        adapted = get_peft_model(self.model, config)
        if self.rest:
            for name, parameter in adapted.named_parameters():
                targeted = any(f".{target}." in name for target in config.target_modules or ())
                parameter.requires_grad_(parameter.requires_grad or not targeted)
        self.model = self.model_wrapped = adapted

    def after_task(self, number: int) -> None:
        if isinstance(self.model, PeftModel):
            self.model = self.model_wrapped = self.model.merge_and_unload().requires_grad_(True)


def lora() -> LoraConfig:
    return LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


def linear_names(model: nn.Module) -> list[str]:
    """Ends of the names of the linear layers in the blocks."""
    return sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    )
