"""`UnlearnTrainer` and `FlatTrainer`: unlearning losses as drop-ins for `trl.DPOTrainer`."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, PromptLearningConfig
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, TrainerCallback

from hf_ext.trainers.flat.baselines import control_vector
from hf_ext.trainers.flat.config import FlatConfig, UnlearnConfig
from hf_ext.trainers.flat.data import (
    UnlearnCollator,
    load_templates,
    plan_retain_rows,
    plan_rows,
    prepare_rows,
)
from hf_ext.trainers.flat.divergences import flat_weights
from hf_ext.trainers.flat.methods import Batch, Rows, first_probability, mean_probability, retain_term, top1_share
from hf_ext.trainers.flat.reading import NoReference, check_adapter_leaves_the_base, freeze_above, head_of
from hf_ext.trainers.flat.references import ReferenceTrainer
from hf_ext.trainers.flat.vision import ForgetHalf, check_options, with_templates
from hf_ext.trainers.output_layer import base_of, remember_forward, restore_forward


class _FollowEpoch(TrainerCallback):
    """Tells the collator which epoch begins; also the right one after resuming."""

    def __init__(self, collator: UnlearnCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.set_epoch(int(state.epoch or 0))


class UnlearnTrainer(ReferenceTrainer):
    """Make a causal language model forget the answers of a dataset; eleven published losses, one trainer.

    One forward per step over `[template][forget][retain]`, as far as the loss reads them, with TRL's fused head: all
    logits are never stored. Losses without a reference build none; npo and idk_dpo compute one number per answer
    before the first step. undial, `retain_loss="kl"` and rmu's retain term read the model before unlearning in every
    step: the base below a fresh adapter, the `ref_model` you give, or else a frozen copy, which takes the memory of
    the weights a second time.

    The log holds the loss and its parts (`loss/forget`, `loss/retain`), `probability/forget`, the share of forget
    tokens that greedy decoding still chooses (`forget/top1`), with refusals `probability/template` and that of their
    first token `probability/template_first`, and for FLAT the two weights `weight/lambda_e` and `weight/lambda_f`.

    Args:
        model: as for `DPOTrainer`: a name, a model or a PEFT model, which keeps exactly its adapters. An adapter can
            be switched off again: publish what `save_merged` writes.
        args: an `UnlearnConfig`; its defaults (FLAT) if not given.
        train_dataset: answers to forget: `prompt` and `completion`, or preference data with a refusal as `chosen` and
            the answer as `rejected`; plain or conversational. Preference data with images work without retain data.
        eval_dataset: the same; every row keeps one refusal and one retain row.
        retain_dataset: answers to keep, `prompt` and `completion`; one is paired to every forget row.
        ref_model: the model before unlearning, for the losses that read one.
        data_collator: replaces `UnlearnCollator` and must return what it does.
        processing_class, peft_config, quantization_config, callbacks, optimizers: as for `DPOTrainer`.

    Raises:
        TypeError: `args` is not an `UnlearnConfig`, or a dataset is a stream.
        ValueError: data that cannot be used, or an argument without effect.

    Example:
        ```python
        from datasets import Dataset
        from peft import LoraConfig
        from hf_ext.trainers.flat import UnlearnConfig, UnlearnTrainer

        forget = Dataset.from_list([{"prompt": "Where does Ada Quill live?", "completion": " In Port Ellis."}])
        args = UnlearnConfig("unlearned", loss_type="npo", learning_rate=1e-4)
        trainer = UnlearnTrainer("google/gemma-3-270m", args, train_dataset=forget, peft_config=LoraConfig())
        trainer.train()
        trainer.save_merged("unlearned/merged")
        ```
    """

    _tag_names = ["trl", "hf-ext", "unlearning"]  # noqa: RUF012
    _name = "Unlearn"
    _config_class: type[UnlearnConfig] = UnlearnConfig

    processing_class: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UnlearnConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        retain_dataset: Dataset | None = None,
        ref_model: PreTrainedModel | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else str(model.config.name_or_path)
            args = self._config_class(f"{name.split('/')[-1]}-{self._name}")
        if not isinstance(args, self._config_class):
            raise TypeError(
                f"args is a {type(args).__name__}; {type(self).__name__} takes {self._config_class.__name__}, which "
                "has the same fields."
            )
        self.method = args.method
        # The model card cites the paper of the loss.
        self._name, self._paper = self.method.name, self.method.paper._asdict()
        self._tag_names = list(dict.fromkeys([*self._tag_names, args.loss_type]))
        self._forget_weight, self._retain_weight = args.weights(retain_dataset is not None)
        self._retain_kind = "activations" if self.method.activations else args.retain_loss
        args.check_retain(retain_dataset is not None)
        retain_reads = self._retain_weight > 0 and self._retain_kind != "nll"
        self._reads_reference = self.method.reference == "hidden" or retain_reads
        if ref_model is not None and not (self._reads_reference or self.method.reference):
            raise ValueError(
                f"ref_model: {args.loss_type} does not read a reference with these arguments; leave it out, which "
                "saves its memory."
            )
        self._adapter_is_fresh = peft_config is not None
        if self._reads_reference and ref_model is None:
            check_adapter_leaves_the_base(peft_config)

        self._templates = load_templates(args.template_answers) if self.method.template else None
        self._train_rows = train_dataset
        vision = isinstance(train_dataset, Dataset) and bool({"image", "images"} & set(train_dataset.column_names))
        if vision:
            check_options(args, retain_dataset is not None)
            train_dataset, eval_dataset = self._vision_data(args, train_dataset, eval_dataset)
        self._groups: tuple[str, ...] = ("template", "forget") if self.method.template else ("forget",)
        if self._retain_weight:
            self._groups += ("retain",)

        self._references_are_due = False
        before = restore_forward(model)
        ref_before = None if ref_model is None else restore_forward(ref_model)
        super().__init__(
            model=model,
            ref_model=self._reference_for(model, ref_model),
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
        remember_forward(self.model, before)
        if ref_model is not None:
            remember_forward(ref_model, ref_before)
        if isinstance(self.ref_model, NoReference):
            self.ref_model = None
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval()
        self._references_are_due = self.method.reference == "sums"
        self._refuse_sharding()
        if data_collator is None and not vision:
            self._install_collator(retain_dataset)
        elif data_collator is None and not self.method.template:
            self.data_collator = ForgetHalf(self.data_collator)
        self._layer = None
        self._control: Tensor | None = None
        self._frozen: list[Parameter] = []
        if self.method.activations:
            self._steer(**args.forget_arguments())

    # -- construction ------------------------------------------------------------------------------------------------

    def _vision_data(self, args: UnlearnConfig, train: Dataset, evaluation: Any) -> Any:
        def converted(dataset: Dataset, name: str) -> Dataset:
            return with_templates(dataset, self._plan(dataset, name, args, None))

        if isinstance(evaluation, dict):
            evaluation = {key: converted(value, f"eval_dataset[{key!r}]") for key, value in evaluation.items()}
        elif evaluation is not None:
            evaluation = converted(evaluation, "eval_dataset")
        return converted(train, "train_dataset"), evaluation

    def _plan(self, dataset: Any, name: str, args: UnlearnConfig, eos: str | None) -> Any:
        own = name == "train_dataset"
        plan = plan_rows(
            dataset,
            name,
            templates=self._templates,
            variants=args.templates_per_example if own else 1,
            seed=args.seed,
            eos=eos,
        )
        if own and plan.template_column and (args.template_answers is not None or args.templates_per_example > 1):
            raise ValueError(
                "template_answers and templates_per_example have no effect on preference data, which bring a refusal "
                "in `chosen`: leave them out, or rename `rejected` to `completion` and remove `chosen`."
            )
        return plan

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        own = dataset is self._train_rows
        self._train_rows = None
        name = {"train": "train_dataset", "eval": "eval_dataset"}.get(dataset_name, f"eval_dataset[{dataset_name!r}]")
        name = "train_dataset" if own else name.replace("train_dataset", "eval_dataset['train']")
        if not (isinstance(dataset, Dataset) and "forget_ids" in dataset.column_names):
            plan = self._plan(dataset, name, args, self._end_token())
            dataset = prepare_rows(dataset, plan, processing_class, args, resampled=own)
        return self._with_reference_sums(dataset) if self._references_are_due else dataset

    def _end_token(self) -> str:
        if self._tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token, so answers would have no end: set tokenizer.eos_token.")
        return self._tokenizer.eos_token

    def _install_collator(self, retain_dataset: Dataset | None) -> None:
        retain = None
        if self._retain_weight and retain_dataset is not None:
            plan = plan_retain_rows(retain_dataset, self._end_token())
            retain = prepare_rows(retain_dataset, plan, self.processing_class, self.args, resampled=False)
        self.data_collator = UnlearnCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            groups=self._groups,
            seed=self.args.seed,
            retain=retain,
            max_length=self.args.max_length,
            truncation_mode=self.args.truncation_mode,
            pad_to_multiple_of=cast("int | None", self.args.pad_to_multiple_of),
        )
        self.add_callback(_FollowEpoch(self.data_collator))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        own = (
            "row",
            "resampled",
            "prompt_ids",
            "forget_ids",
            "template_ids",
            "ref_forget_logps",
            "ref_template_logps",
        )
        columns.extend(name for name in own if name not in columns)

    def _steer(self, layer: int, coefficient: float) -> None:
        """Choose RMU's layer and vector, and freeze what lies above the layer."""
        base = base_of(self.model)
        self._frozen = freeze_above(self.model, base, layer)
        self._layer = layer
        generator = torch.Generator().manual_seed(self.args.seed)
        self._control = control_vector(base.config.get_text_config().hidden_size, coefficient, generator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        try:
            return super().train(*args, **kwargs)
        finally:
            # The next trainer of this model may train all of it.
            for parameter in self._frozen:
                parameter.requires_grad_(True)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs = dict(inputs)
        sums = {group: inputs.pop(f"ref_{group}_logps", None) for group in ("forget", "template")}
        answer = inputs.pop("completion_mask").bool()
        inputs["use_cache"] = False
        labels = inputs["input_ids"].masked_fill(~answer, -100)
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self._recorded(base_of(self.model)) as seen:
            outputs = model(**inputs, **routed, labels=labels, fused_lm_head=True)
        batch = self._batch(inputs, answer, outputs, seen, sums)

        forget = self.method.forget(batch, **self.args.forget_arguments())
        # FLAT's weights are part of its loss.
        loss = forget if self.args.loss_type == "flat" else self._forget_weight * forget
        retain = None
        if batch.retain is not None:
            retain = retain_term(batch, self._retain_kind)
            loss = loss + self._retain_weight * retain
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._record(batch, loss, forget, retain)
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**inputs)

    def _batch(
        self, inputs: dict[str, Any], answer: Tensor, outputs: Any, seen: dict[str, Tensor], sums: dict[str, Any]
    ) -> Batch:
        """Cut the forward into its groups and add what the loss reads of the reference."""
        rows_per_group, width = len(answer) // len(self._groups), answer.shape[1]
        parts = {group: slice(i * rows_per_group, (i + 1) * rows_per_group) for i, group in enumerate(self._groups)}
        ref_seen, ref_head = self._reference(inputs, parts) if self._reads_reference else ({}, None)

        def rows(group: str) -> Rows:
            part = parts[group]
            return Rows(
                inputs["input_ids"][part],
                answer[part],
                # Prompt learning puts virtual tokens in front.
                outputs.log_probs[part, 1 - width :],
                outputs.is_top1[part, 1 - width :],
                sums.get(group),
                **{name: value[part, -width:] for name, value in seen.items()},
                **{f"ref_{name}": values[group] for name, values in ref_seen.items() if group in values},
            )

        return Batch(
            rows("forget"),
            rows("template") if self.method.template else None,
            rows("retain") if "retain" in parts else None,
            head_of(base_of(self.model)) if "hidden" in seen else None,
            ref_head,
            None if self._control is None else self._control.to(answer.device),
        )

    def _record(self, batch: Batch, loss: Tensor, forget: Tensor, retain: Tensor | None) -> None:
        """Log one mean over all processes of each metric; stop all of them if the loss is not a number."""
        config, rows = self.args, batch.forget
        p_forget = mean_probability(rows, config.forget_probability)
        columns = {"probability/forget": p_forget, "forget/top1": top1_share(rows), "loss/forget": forget}
        if batch.template is not None:
            p_template = mean_probability(batch.template, config.template_probability)
            columns |= {
                "probability/template": p_template,
                "probability/template_first": first_probability(batch.template),
            }
            if config.loss_type == "flat":
                lambda_e, lambda_f = flat_weights(p_template, p_forget, config.divergence)
                columns |= {"weight/lambda_e": lambda_e, "weight/lambda_f": lambda_f}
        if retain is not None:
            columns["loss/retain"] = retain
        columns["loss"] = loss
        table = torch.stack([value.detach().float().expand(len(p_forget)) for value in columns.values()], -1)
        means = dict(zip(columns, self.accelerator.gather_for_metrics(table).mean(0).tolist(), strict=True))
        total = means.pop("loss")
        if not math.isfinite(total):
            raise FloatingPointError(
                f"optimizer step {self.state.global_step}: the loss is {total}. Lower the learning rate, or choose a "
                "bounded loss such as flat or npo."
            )
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in means.items():
            metrics[name].append(value)

    # -- publishing ---------------------------------------------------------------------------------------------------

    def save_merged(self, path: str) -> None:
        """Write a plain checkpoint with the adapter merged into the weights, and the tokenizer.

        The merge happens in a copy, so the trainer's model stays as it is; the weights are in memory twice meanwhile.
        Without an adapter this is `save_model`.

        Raises:
            ValueError: the base is quantised, or the adapter is a prompt.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            self.save_model(path)
            return
        if base_of(model).config.to_dict().get("quantization_config"):
            raise ValueError(
                "the base is quantised: merging would round the small update of the adapter to its grid, which can "
                "bring the forgotten answers back. Save the adapter, load the base in bfloat16, attach it with "
                "PeftModel.from_pretrained and call merge_and_unload()."
            )
        if isinstance(model.active_peft_config, PromptLearningConfig):
            raise ValueError(
                "prompt learning adds no weights that could be merged: publish the adapter with save_model."
            )
        if self.is_world_process_zero():
            merged = copy.deepcopy(model).merge_and_unload()
            merged.save_pretrained(path)
            self.processing_class.save_pretrained(path)
        self.accelerator.wait_for_everyone()


class FlatTrainer(UnlearnTrainer):
    """FLAT: prefer a refusal to the answer that is to be forgotten, without retain data and without a reference.

    https://huggingface.co/papers/2410.11143. Everything else is [`UnlearnTrainer`]'s.

    Example:
        ```python
        trainer = FlatTrainer("google/gemma-3-270m", FlatConfig("unlearned"), train_dataset=forget)
        trainer.train()
        ```
    """

    _tag_names = ["trl", "hf-ext", "flat", "unlearning"]  # noqa: RUF012
    _name = "FLAT"
    _config_class = FlatConfig
