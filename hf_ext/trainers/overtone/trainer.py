"""OVERTONE as a drop-in for `trl.SFTTrainer`, and as a mixin for other trainers."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, Trainer
from trl import SFTConfig, SFTTrainer, is_conversational

from hf_ext._compat import without_appended_eos
from hf_ext.registry import OVERTONE
from hf_ext.trainers.cards import CardMixin
from hf_ext.trainers.output_layer import base_of, restore_forward
from hf_ext.trainers.overtone.callbacks import OvertoneSaturationCallback
from hf_ext.trainers.overtone.chunked import overtone_from_logits
from hf_ext.trainers.overtone.config import OvertoneConfig
from hf_ext.trainers.overtone.head import add_overtone_head
from hf_ext.trainers.overtone.loss import IGNORE_INDEX, OvertoneSettings, TokenLosses
from hf_ext.trainers.overtone.statistics import OvertoneStatistics
from hf_ext.trainers.runs import arguments_of

if TYPE_CHECKING:
    from accelerate import ParallelismConfig

    _TrainerBase = Trainer
else:
    _TrainerBase = object


class OvertoneMixin(_TrainerBase):
    """What any trainer needs to use the OVERTONE loss: per-token losses, saturation handling and logged metrics.

    Put it before the trainer class, call `overtone_setup` after the trainer's constructor, and use `overtone_per_token` in
    `compute_loss`. The normalisation stays with that method: set `loss_is_scaled_for_ga` if it divides by
    `num_items_in_batch`.

    Example:
        ```python
        class MyTrainer(OvertoneMixin, Trainer):
            loss_is_scaled_for_ga = True

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.overtone_setup(OvertoneSettings())

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                labels = inputs.pop("labels")[:, 1:]
                losses = self.overtone_per_token(model(**inputs).logits[:, :-1], labels)
                return losses.loss.sum() / num_items_in_batch
        ```
    """

    overtone_settings: OvertoneSettings
    overtone_statistics: OvertoneStatistics

    def overtone_setup(
        self,
        settings: OvertoneSettings,
        *,
        stop: bool = True,
        skip: bool = True,
        patience: int | None = None,
        min_steps: int = 0,
    ) -> None:
        """Set the numbers of the loss and install an `OvertoneSaturationCallback` with these options."""
        self.overtone_settings = settings
        self.overtone_statistics = OvertoneStatistics()
        self.add_callback(OvertoneSaturationCallback(self.overtone_statistics, stop, skip, patience, min_steps))

    def overtone_per_token(self, logits: torch.Tensor, labels: torch.Tensor) -> TokenLosses:
        """Losses of aligned logits [..., V] and labels [...], recorded for the metrics if they carry gradients."""
        losses = overtone_from_logits(logits, labels, self.overtone_settings)
        if losses.loss.requires_grad:
            self.overtone_statistics.record(losses, labels != IGNORE_INDEX)
        return losses

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model is not None and self.model.training:
            logs.update(self.overtone_statistics.pop_log())
        super().log(logs, start_time)


class OvertoneTrainer(CardMixin, OvertoneMixin, SFTTrainer):
    """Supervised fine-tuning with the OVERTONE loss, for knowledge editing (https://huggingface.co/papers/2502.00602).

    A drop-in for [`~trl.SFTTrainer`]: same datasets, PEFT, quantisation, packing and distributed engines. Training uses
    the OVERTONE loss, summed over the labelled tokens and divided by their number in the whole accumulated batch; evaluation
    reports the plain negative log-likelihood. The log holds `overtone/active_fraction` (tokens with a gradient),
    `overtone/accepted_fraction` (tokens with a mixed target), `overtone/kl` and `overtone/nll`.

    Args:
        model: as for `SFTTrainer`: a name, a model or a PEFT model. A PEFT adapter on the head is not supported.
        args: an `OvertoneConfig`; its defaults if not given.
        train_dataset: plain text, prompt-completion, conversational or tokenised data. Use prompt-completion data for edits:
            the loss is then on the answer alone.
        compute_loss_func: not supported, since the loss is the method.
        data_collator, eval_dataset, processing_class, kwargs: as for `SFTTrainer`.

    Raises:
        TypeError: `args` is not an `OvertoneConfig`.
        ValueError: an option that would be ignored or that replaces the loss.

    Example:
        ```python
        from datasets import Dataset
        from peft import LoraConfig
        from hf_ext import OvertoneConfig, OvertoneTrainer

        edit = Dataset.from_list([{"prompt": "The Eiffel Tower is in the city of", "completion": " Rome"}])
        trainer = OvertoneTrainer(
            "google/gemma-3-270m", OvertoneConfig("edited"), train_dataset=edit, peft_config=LoraConfig()
        )
        trainer.train()
        ```
    """

    _tag_names = ["trl", "sft", OVERTONE.slug]  # noqa: RUF012
    _name = OVERTONE.name
    _paper = {"title": OVERTONE.paper_title, "id": OVERTONE.arxiv, "citation": OVERTONE.citation}  # noqa: RUF012

    args: OvertoneConfig

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: OvertoneConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: None = None,
        **kwargs: Any,
    ) -> None:
        args = arguments_of(args, OvertoneConfig, model, type(self), OVERTONE.name)
        if compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func: OVERTONE replaces the loss; leave it out, or use SFTTrainer for a loss of your own."
            )
        if not args.edit_append_eos and kwargs.get("formatting_func") is None:
            _check_eos_is_ours(train_dataset, args)
        _reject_sequence_parallelism(args.parallelism_config)
        before = restore_forward(model)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        _reject_sequence_parallelism(self.accelerator.parallelism_config)
        self._reject_deepspeed_skipping()
        self.overtone_setup(
            args.overtone_settings(),
            stop=args.stop_when_saturated,
            skip=args.skip_saturated_steps,
            patience=args.saturation_patience,
            min_steps=args.saturation_min_steps,
        )
        add_overtone_head(base_of(self.model), self.overtone_settings, self.overtone_statistics, before)

    def _reject_deepspeed_skipping(self) -> None:
        if self.is_deepspeed_enabled and self.args.skip_saturated_steps:
            raise ValueError(
                "skip_saturated_steps=True: DeepSpeed updates the weights inside its own backward pass, so a step cannot be "
                "skipped. Set skip_saturated_steps=False; stop_when_saturated still works."
            )

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        keep_eos = cast(OvertoneConfig, args).edit_append_eos
        with nullcontext() if keep_eos else without_appended_eos(self):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        except FloatingPointError as error:
            raise FloatingPointError(f"optimizer step {self.state.global_step}: {error}") from error


def _check_eos_is_ours(train_dataset: Any, args: OvertoneConfig) -> None:
    """Raises `ValueError` where TRL appends no end token of its own, so that switching it off would change nothing."""
    if train_dataset is None:
        return
    example = next(iter(train_dataset))
    kind = None
    if "input_ids" in example:
        kind = "the dataset is already tokenised"
    elif is_conversational(example):
        kind = "the chat template of a conversational dataset writes the end of a turn"
    elif "image" in example or "images" in example:
        kind = "a vision dataset is tokenised by its collator"
    elif cast(dict, args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        kind = "dataset_kwargs skips the preparation"
    if kind is not None:
        raise ValueError(
            f"edit_append_eos=False has no effect: {kind}. Remove the end token there and leave the option out."
        )


def _reject_sequence_parallelism(config: ParallelismConfig | None) -> None:
    """Raises `ValueError` under DeepSpeed's sequence parallelism, where `Trainer` reduces the model's own loss."""
    if config is not None and config.sp_enabled and config.sp_backend == "deepspeed":
        raise ValueError(
            f"sp_size={config.sp_size}: OVERTONE replaces the loss; DeepSpeed sequence parallelism (Ulysses) computes its own. "
            "Use context parallelism (cp_size) or data parallelism instead."
        )
