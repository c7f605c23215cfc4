"""The model before unlearning: where it is found, and the numbers that are computed from it once.

`ReferenceTrainer` is the part of `UnlearnTrainer` that the losses with a reference need. Losses that compare sums
(npo, idk_dpo) store one number per answer before the first step; losses that compare distributions or activations run
the backbone of the reference in every step, without its logits.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOTrainer

from hf_ext._modes import evaluating
from hf_ext.trainers.cards import CardMixin
from hf_ext.trainers.flat.config import UnlearnConfig
from hf_ext.trainers.flat.data import sequences, stack_sequences
from hf_ext.trainers.flat.distributions import Head
from hf_ext.trainers.flat.methods import Method
from hf_ext.trainers.flat.reading import head_of, recorded
from hf_ext.trainers.output_layer import base_of, drop_copied_patches, score_answers
from hf_ext.trainers.references import NoReference


class ReferenceTrainer(CardMixin, DPOTrainer):
    """A `DPOTrainer` that holds no reference unless the loss reads one in every step.

    Attributes:
        method: the row of `METHODS` that is trained.
        _retain_weight, _retain_kind: of the retain term: 0 without one; "nll", "kl" or "activations".
        _layer: the layer whose activations are read, if any.
        _adapter_is_fresh: the trainer made the adapter, so switching it off gives the model before unlearning.
        _reads_reference: the loss reads the reference's hidden states or activations.
        _references_are_due: the sums of a dataset are to be computed when it is first used.
    """

    args: UnlearnConfig
    model: Any
    method: Method
    _retain_weight: float
    _retain_kind: str
    _layer: int | None
    _adapter_is_fresh: bool
    _reads_reference: bool
    _references_are_due: bool

    def _reference_for(self, model: Any, ref_model: Any) -> Any:
        """What `DPOTrainer` is given as `ref_model`; with `None` it loads the model named by a string once more."""
        if ref_model is not None:
            return ref_model
        if not self._reads_reference:
            return NoReference()
        if self._adapter_is_fresh or isinstance(model, str):
            return None
        reference = copy.deepcopy(model)
        drop_copied_patches(reference)
        return reference

    def _refuse_sharding(self) -> None:
        reads_more = self.method.hidden or self.method.reference or self.method.activations or self._reads_reference
        if reads_more and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"loss_type={self.args.loss_type!r} (retain_loss={self.args.retain_loss!r}) reads the output layer or "
                "a reference outside the model's forward, where DeepSpeed and FSDP keep them sharded. Use plain data "
                "parallelism, or flat, simnpo, wga, satimp or gradient ascent with retain_loss='nll'."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # Before a checkpoint is loaded: the reference is the model that the trainer was given.
        if self._references_are_due:
            self.train_dataset = self._with_reference_sums(self.train_dataset)
            self._complete_eval_dataset()
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._references_are_due and (eval_dataset is None or isinstance(eval_dataset, str)):
            self._complete_eval_dataset()
        return super().evaluate(eval_dataset, *args, **kwargs)

    def _owns(self, dataset: Dataset) -> bool:
        """Whether sums that this dataset brings are those of this trainer's reference."""
        evaluation = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return any(dataset is own for own in (self.train_dataset, *evaluation))

    def _complete_eval_dataset(self) -> None:
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_reference_sums(data) for name, data in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_reference_sums(self.eval_dataset)

    def _with_reference_sums(self, dataset: Dataset) -> Dataset:
        """Add `ref_forget_logps` and `ref_template_logps`: log-probability of every answer before unlearning."""
        if "ref_forget_logps" in dataset.column_names:
            return dataset
        trained = self.state.global_step > 0
        if trained and self.ref_model is None and not self._adapter_is_fresh:
            raise ValueError(
                f"{self.args.loss_type}: the model before unlearning is gone, so this dataset has no reference. Give "
                "it as eval_dataset to the trainer, or pass a ref_model."
            )
        rows = [sequences(row) for row in dataset]
        pairs = [pair for row in rows for pair in row]
        sums = iter(self._sums(pairs, adapter_off=self._adapter_is_fresh and self.ref_model is None))
        by_row = [[next(sums) for _ in row] for row in rows]
        dataset = dataset.add_column("ref_forget_logps", [values[0] for values in by_row])
        if not self.method.template:
            return dataset
        return dataset.add_column("ref_template_logps", [values[1:] for values in by_row])

    @torch.no_grad()
    def _sums(self, pairs: list[tuple[list[int], list[int]]], adapter_off: bool) -> list[float]:
        """Log-probability of each (prompt, answer), computed once with the work shared between the processes."""
        collate = partial(
            stack_sequences,
            pad_token_id=self._tokenizer.pad_token_id,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
        )
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        loader = self.accelerator.prepare_data_loader(DataLoader(cast(Any, pairs), size, collate_fn=collate))
        model, sums = cast(Any, self.ref_model or self.model), []
        off = model.disable_adapter() if adapter_off else contextlib.nullcontext()
        with evaluating(model), off, self.accelerator.autocast():
            for batch in loader:
                answer = batch.pop("completion_mask").bool()
                outputs = score_answers(model, base_of(model), {**batch, "use_cache": False}, answer)
                sums.append(self.accelerator.gather_for_metrics(outputs.log_probs.sum(-1)))
        return torch.cat(sums).tolist()

    def _recorded(self, base: PreTrainedModel) -> Any:
        reads_hidden = self.method.hidden or bool(self._retain_weight and self._retain_kind == "kl")
        return recorded(base, reads_hidden, self._layer)

    @torch.no_grad()
    def _reference(self, inputs: dict[str, Any], parts: dict[str, slice]) -> tuple[dict[str, dict], Head | None]:
        """(name -> group -> tensor, output layer) of the model before unlearning, without its logits."""
        groups = ["forget"] if self.method.reference == "hidden" else []
        if self._retain_weight and self._retain_kind != "nll":
            groups.append("retain")
        model = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
        off = model.disable_adapter() if self.ref_model is None else contextlib.nullcontext()
        base = base_of(model)
        if not self._is_vision_dataset:
            # The wanted groups are neighbours.
            wanted = slice(parts[groups[0]].start, parts[groups[-1]].stop)
            inputs = {name: value[wanted] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            parts = {
                group: slice(parts[group].start - wanted.start, parts[group].stop - wanted.start) for group in groups
            }
        # The policy may be in training mode, where some attentions drop out although TRL disables the dropout modules.
        with evaluating(model), off, self.accelerator.autocast(), self._recorded(base) as seen:
            base.base_model(**inputs)
            head = head_of(base)
        return {name: {group: value[parts[group]] for group in groups} for name, value in seen.items()}, head
