"""`RoseRAGTrainer`: losses that `trl.DPOTrainer` does not have, on its own forward."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from trl import DPOTrainer

from hf_ext.pipelines.roserag.prompts import RagPrompts
from hf_ext.registry import ROSERAG
from hf_ext.trainers.cards import CardMixin
from hf_ext.trainers.output_layer import AnswersOnly, base_of, patching
from hf_ext.trainers.references import NoReference, complete_reference_adapter
from hf_ext.trainers.roserag.config import RoseRAGConfig
from hf_ext.trainers.roserag.data import GAMMA, WithGamma, check_margins, check_prompts
from hf_ext.trainers.roserag.loss import Responses, log_odds, negative_log_likelihood
from hf_ext.trainers.roserag.report import BuildReport
from hf_ext.trainers.runs import arguments_of

logger = logging.getLogger(__name__)

# From this many logged values on, a chosen response that became less likely every time is told.
_FALLING = 5


class RoseRAGTrainer(CardMixin, DPOTrainer):
    """Prefer right answers to wrong ones that the same passages led the model to, without a reference model.

    https://huggingface.co/papers/2502.10993. One forward per step, `DPOTrainer`'s own: its metrics, experts' load balancing, activation offloading and
    fused output layer stay. `rewards/*` are measured against 0 where no loss has a reference.

    The log holds, beside those, `nll_loss`, `loss/<name>` of every term of ours before its weight, `log_odds` (z of rose_rag), and `margins/token`, the mean
    log-probability of a chosen token less that of a rejected one.

    Args:
        model: as for `DPOTrainer`: a name, a model or a PEFT model.
        args: a `RoseRAGConfig`; its defaults if not given.
        train_dataset: what `RoseRAGDatasetBuilder` writes, or any preference data that `DPOTrainer` takes, with images too.
        eval_dataset: the same.
        ref_model: the reference, for losses that have one; by default the model before training.
        prompts: the texts that the pairs were built with, saved beside the model, so that it is asked with the same.
        data_collator: replaces TRL's, and must return what it does, and `gamma` `(B,)` if `margin_column` is set.
        processing_class, peft_config, quantization_config, callbacks, optimizers: as for `DPOTrainer`.

    Raises:
        TypeError: `args` is not a `RoseRAGConfig`.
        ValueError: data that cannot be used, or an argument without effect.

    Example:
        ```python
        from hf_ext import RoseRAGConfig, RoseRAGTrainer
        from peft import LoraConfig

        args = RoseRAGConfig("robust", learning_rate=1e-4)
        trainer = RoseRAGTrainer("Qwen/Qwen3-1.7B", args, train_dataset=pairs, peft_config=LoraConfig())
        trainer.train()
        ```
    """

    _tag_names = ["trl", "hf-ext", "dpo", "roserag"]  # noqa: RUF012
    _name = "RoseRAG"
    _paper = {"title": ROSERAG.paper_title, "id": ROSERAG.arxiv, "citation": ROSERAG.citation}  # noqa: RUF012

    args: RoseRAGConfig
    model: Any
    processing_class: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RoseRAGConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        ref_model: PreTrainedModel | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Any = None,
        prompts: RagPrompts | None = None,
    ) -> None:
        args = arguments_of(args, RoseRAGConfig, model, type(self), self._name)
        if ref_model is not None and not args.needs_reference:
            raise ValueError(f"ref_model: loss_type={args.loss_type!r} has no reference; leave it out.")
        if args.precompute_ref_log_probs and not args.needs_reference:
            raise ValueError(
                f"precompute_ref_log_probs=True: loss_type={args.loss_type!r} has no reference; leave it out."
            )
        self._gammas, self.prompts = args.margin_column, prompts
        described = isinstance(train_dataset, (Dataset, IterableDataset))
        self._built = BuildReport.from_description(train_dataset.info.description) if described else None
        self._falling: list[float] = []
        with patching(self, model, ref_model):
            super().__init__(
                model=model,
                ref_model=ref_model if args.needs_reference else NoReference(),  # type: ignore[arg-type]
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        if isinstance(self.ref_model, NoReference):
            self.ref_model = None
        self._complete_reference()
        if self._gammas and data_collator is None:
            self.data_collator = WithGamma(self.data_collator, self._gammas)

    def _complete_reference(self) -> None:
        if isinstance(self.model, PeftModel) and "ref" in self.model.peft_config:
            complete_reference_adapter(self.model)

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        self._complete_reference()
        return super()._precompute_ref_logps(dataset, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer`'s, with `rag_config.json` if the trainer has `prompts`."""
        super().save_model(output_dir, _internal_call)
        if self.is_world_process_zero():
            self.save_companions(output_dir or str(self.args.output_dir))

    def save_companions(self, folder: str | Path) -> None:
        """Write `rag_config.json` into `folder`, for `save_model`, `hf_ext.publish` and `hf_ext.model_cards.save`."""
        if self.prompts is not None:
            self.prompts.save_pretrained(folder)

    # -- what cards tell ---------------------------------------------------------------------------------------------

    @property
    def data_notes(self) -> tuple[str, ...]:
        """How the pairs were made, as `hf_ext.publish` and `build_card` tell it; empty if `RoseRAGDatasetBuilder` did not make them."""
        return () if self._built is None else self._built.sentences()

    # -- data --------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        if self._gammas:
            check_margins(dataset, self._gammas, dataset_name)
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if isinstance(dataset, Dataset):
            check_prompts(dataset, prepared, args.max_length, dataset_name)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        if self._gammas and self._gammas not in columns:
            columns.append(self._gammas)

    # -- the loss ----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs, own = dict(inputs), self.args.own_losses
        gamma = inputs.pop(GAMMA, self.args.margin)
        pairs = len(inputs["completion_mask"]) // 2
        if not self.args.needs_reference:
            zeros = torch.zeros(pairs, device=inputs["completion_mask"].device)
            inputs |= {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
        elif "ref_chosen_logps" not in inputs:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        probe = _Probe(AnswersOnly(model, base_of(self.model)), inputs, whole=self._reads_prompts)
        with self._native_losses():
            base = super()._compute_loss(probe, inputs, return_outputs)
        outputs = base[1] if return_outputs else None
        loss = base[0] if return_outputs else base

        chosen, rejected = probe.responses(inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
        parts, weights = {}, self.args.weights
        for name, term in own.items():
            per_pair = term.function(chosen, rejected, self.beta, gamma)
            parts[f"loss/{name}"] = per_pair
            loss = loss + weights[name] * per_pair.mean()
        if self.args.effective_nll_weight:
            nll = self._nll(probe, chosen)
            parts["nll_loss"] = nll.expand(pairs)
            loss = loss + self.args.effective_nll_weight * nll
        self._record(parts, chosen, rejected)
        return (loss, outputs) if return_outputs else loss

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        return super().compute_ref_log_probs(AnswersOnly(model, base_of(model)), inputs)

    @property
    def _reads_prompts(self) -> bool:
        return self.args.nll_normalization == "full_token" and bool(self.args.effective_nll_weight)

    def _nll(self, probe: _Probe, chosen: Responses) -> Tensor:
        if self._reads_prompts:
            return negative_log_likelihood(probe.whole_chosen(), "token")
        return negative_log_likelihood(chosen, self.args.nll_normalization)

    @contextlib.contextmanager
    def _native_losses(self) -> Iterator[None]:
        """Let `DPOTrainer` see its own losses alone, with sums of the reference that are there already."""
        kept = self.loss_types, self.loss_weights, self.precompute_ref_logps
        weights = dict(zip(self.loss_types, self.loss_weights, strict=True))
        self.loss_types = [name for name in self.loss_types if name not in self.args.own_losses]
        self.loss_weights = [weights[name] for name in self.loss_types]
        self.precompute_ref_logps = True
        try:
            yield
        finally:
            self.loss_types, self.loss_weights, self.precompute_ref_logps = kept

    @torch.no_grad()
    def _record(self, parts: dict[str, Tensor], chosen: Responses, rejected: Responses) -> None:
        columns = {**parts, "margins/token": chosen.means_B - rejected.means_B}
        if "loss/rose_rag" in parts:
            columns["log_odds"] = log_odds(chosen.means_B) - log_odds(rejected.means_B)
        metrics = self._metrics["train" if self.model.training else "eval"]
        table = torch.stack([values.detach().float() for values in columns.values()], -1)
        means = self.accelerator.gather_for_metrics(table).mean(0).tolist()
        for name, value in zip(columns, means, strict=True):
            metrics[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        chosen = self._metrics["train"].get("logps/chosen")
        if (
            self.model.training
            and chosen
            and not self.args.effective_nll_weight
            and "margin_dpo" in self.args.loss_type
        ):
            self._warn_if_falling(sum(chosen) / len(chosen))
        super().log(logs, start_time)

    def _warn_if_falling(self, value: float) -> None:
        self._falling = [*self._falling, value] if not self._falling or value < self._falling[-1] else [value]
        if len(self._falling) == _FALLING:
            logger.warning(
                "logps/chosen fell from %.1f to %.1f over %d logs: pairs that are nearly equal drive both responses down. Set nll_weight=1.",
                self._falling[0],
                value,
                _FALLING,
            )


class _Probe:
    """Stands for the model in `DPOTrainer._compute_loss`, and keeps the log-probabilities of its forward.

    Args:
        model: what is called.
        inputs: the batch, `[chosen; rejected]`.
        whole: read the prompts of the chosen half too.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], whole: bool) -> None:
        self._model, self._whole = model, whole
        self._mask = inputs["completion_mask"][:, 1:].bool()
        self._present = inputs["attention_mask"][:, 1:].bool()
        self._logps: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("fused_lm_head"):
            return self._model(*args, **kwargs)
        width = self._mask.shape[1]
        if self._whole:
            ids, labels = kwargs["input_ids"], kwargs["labels"].clone()
            half = len(labels) // 2
            labels[:half] = ids[:half].masked_fill(kwargs["attention_mask"][:half] == 0, -100)
            kwargs["labels"] = labels
        outputs = self._model(*args, **kwargs)
        # Prompt learning puts virtual tokens in front.
        self._logps = outputs.log_probs[:, -width:]
        if self._whole:
            # The caller adds them up without a mask.
            outputs.log_probs = self._logps * self._mask
        return outputs

    def responses(self, *references: Tensor) -> tuple[Responses, Responses]:
        """(chosen, rejected), float32."""
        assert self._logps is not None
        logps = (self._logps * self._mask).float()
        halves = zip(logps.chunk(2), self._mask.chunk(2), references, strict=True)
        chosen, rejected = (Responses(values, mask, reference.float()) for values, mask, reference in halves)
        return chosen, rejected

    def whole_chosen(self) -> Responses:
        """Prompts and responses of the chosen half."""
        assert self._logps is not None
        return Responses(self._logps.float().chunk(2)[0], self._present.chunk(2)[0])
