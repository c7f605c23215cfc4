"""`UnlearnTrainer` and `FlatTrainer`: unlearning losses as drop-ins for `trl.DPOTrainer`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_ext.trainers.flat.baselines import control_vector
from hf_ext.trainers.flat.config import FlatConfig, UnlearnConfig
from hf_ext.trainers.flat.data import UnlearnCollator, load_templates, prepare_rows
from hf_ext.trainers.flat.measures import measures
from hf_ext.trainers.flat.merging import check_mergeable, write_checkpoint
from hf_ext.trainers.flat.methods import Batch, Rows, retain_term
from hf_ext.trainers.flat.plans import plan_retain_rows, plan_rows
from hf_ext.trainers.flat.reading import check_adapter_leaves_the_base, freeze_above, head_of
from hf_ext.trainers.flat.references import ReferenceTrainer
from hf_ext.trainers.flat.vision import ForgetHalf, check_options, with_templates
from hf_ext.trainers.output_layer import base_of, patching, score_answers
from hf_ext.trainers.references import NoReference
from hf_ext.trainers.runs import arguments_of
from hf_ext.tuners.merging import merged_copy


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
    tokens that greedy decoding still chooses (`forget/top1`), with retain data the same of theirs (`retain/top1`, which
    falls when other answers suffer), with refusals `probability/template` and that of their first token
    `probability/template_first`, for FLAT the two weights `weight/lambda_e` and `weight/lambda_f`, and for a mixture of
    experts `aux_loss`.

    An optimizer step is the mean over its rows however they are split into micro-batches and processes, a smaller last
    one included, except for `padded_length` and the load balancing of experts, which are taken per micro-batch. Where
    several processes do not divide the dataset, accelerate repeats some rows at its end, and these count twice.

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
        args = arguments_of(args, self._config_class, model, type(self), self._name)
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
        if (self._reads_reference or self.method.reference) and ref_model is None:
            check_adapter_leaves_the_base(peft_config)

        self._templates = load_templates(args.template_answers) if self.method.template else None
        self._train_rows = train_dataset
        vision = isinstance(train_dataset, Dataset) and bool({"image", "images"} & set(train_dataset.column_names))
        if vision:
            check_options(args, retain_dataset is not None)
        self._groups: tuple[str, ...] = ("template", "forget") if self.method.template else ("forget",)
        if self._retain_weight:
            self._groups += ("retain",)

        self._references_are_due = False
        with patching(self, model, ref_model):
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
        if isinstance(self.ref_model, NoReference):
            self.ref_model = None
        if self.ref_model is not None:
            self.ref_model.requires_grad_(False).eval()
        self._references_are_due = self.method.reference == "sums"
        self._refuse_sharding()
        if self._is_vision_dataset:
            self._prepare_vision_data()
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

    def _prepare_vision_data(self) -> None:
        """Bring the datasets into the form that TRL's collator reads; TRL itself leaves those with images alone."""

        def prepared(dataset: Dataset, name: str) -> Dataset:
            return self._prepare_dataset(dataset, self.processing_class, self.args, name)

        self.train_dataset = prepared(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: prepared(dataset, name) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = prepared(self.eval_dataset, "eval")

    def _plan(self, dataset: Any, name: str, args: UnlearnConfig) -> Any:
        own = name == "train_dataset"
        plan = plan_rows(
            dataset,
            name,
            templates=self._templates,
            variants=args.templates_per_example if own else 1,
            seed=args.seed,
            eos=self._end_token(),
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
        name = {"eval": "eval_dataset", "test": "test_dataset"}.get(dataset_name, f"eval_dataset[{dataset_name!r}]")
        name = "train_dataset" if own else name
        if self._is_vision_dataset:
            return with_templates(dataset, self._plan(dataset, name, args))
        if not (isinstance(dataset, Dataset) and "forget_ids" in dataset.column_names):
            plan = self._plan(dataset, name, args)
            dataset = prepare_rows(dataset, plan, processing_class, args, resampled=own)
        elif not (self._references_are_due and self._owns(dataset)):
            # Prepared by another trainer, whose reference is another model.
            stale = {"ref_forget_logps", "ref_template_logps"} & set(dataset.column_names)
            dataset = dataset.remove_columns(sorted(stale))
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
            "template_prompt_ids",
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

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self._is_vision_dataset and isinstance(eval_dataset, Dataset):
            eval_dataset = self._prepare_dataset(eval_dataset, self.processing_class, self.args, "eval")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
        return super().predict(test_dataset, *args, **kwargs)

    # -- the loss -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of an optimizer step and the mean number of their rows, over processes too."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = sum(len(batch["completion_mask"]) for batch in batches) / max(len(batches), 1)
        return batches, self.accelerator.reduce(torch.tensor(rows, device=device), "mean").item()

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch; in training it is weighed by its rows, as `Trainer` averages over micro-batches."""
        weight = 1.0 if num_items_in_batch is None else len(inputs["completion_mask"]) / num_items_in_batch
        return super().compute_loss(model, {**inputs, "weight": weight}, return_outputs)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        inputs = dict(inputs)
        weight = inputs.pop("weight")
        sums = {group: inputs.pop(f"ref_{group}_logps", None) for group in ("forget", "template")}
        answer = inputs.pop("completion_mask").bool()
        inputs["use_cache"] = False
        routed = {"output_router_logits": True} if self.aux_loss_enabled else {}
        base = base_of(self.model)
        with self._recorded(base) as seen:
            outputs = score_answers(model, base, inputs | routed, answer)
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
        parts = {"loss/forget": forget, "loss/retain": retain, "aux_loss": outputs.aux_loss if routed else None}
        self._record(batch, loss, {name: value for name, value in parts.items() if value is not None}, weight)
        if not return_outputs:
            return weight * loss
        with torch.no_grad():
            return weight * loss, model(**inputs)

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
                outputs.log_probs[part],
                outputs.is_top1[part],
                sums.get(group),
                # Prompt learning puts virtual tokens in front.
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

    def _record(self, batch: Batch, loss: Tensor, parts: dict[str, Tensor], weight: float) -> None:
        """Log one mean over all processes of each metric; stop all of them if the loss is not a number."""
        columns = {**measures(batch, self.args), **parts, "loss": loss}
        rows = len(batch.forget.tokens)
        table = torch.stack([value.detach().float().expand(rows) for value in columns.values()], -1)
        training = self.model.training
        # Rows repeated to fill the last batch count in training, as they do in the loss. All batches of a step are
        # fetched before the first is used, so accelerate would take earlier ones for the last and cut them.
        gather = self.accelerator.gather if training else self.accelerator.gather_for_metrics
        means = dict(zip(columns, gather(table).mean(0).tolist(), strict=True))
        total = means.pop("loss")
        if not math.isfinite(total):
            raise FloatingPointError(
                f"optimizer step {self.state.global_step}: the loss is {total}. Lower the learning rate, or choose a "
                "bounded loss such as flat or npo."
            )
        metrics = self._metrics["train" if training else "eval"]
        for name, value in means.items():
            metrics[name].append(weight * value)

    # -- publishing ---------------------------------------------------------------------------------------------------

    def save_merged(self, path: str) -> None:
        """Write a plain checkpoint with the adapter merged into the weights, and the tokenizer.

        The merge happens in a copy, so the trainer's model stays as it is; the weights are in memory twice meanwhile.
        Without an adapter this is `save_model`. An output layer tied to embeddings that the adapter changed is written
        as one of its own. Interrupted, it leaves a folder that does not load.

        Raises:
            ValueError: the folder holds an adapter, the base is quantised, the adapter is a prompt or was added with
                `add_adapter`, or the weights are sharded.
        """
        model, folder = self.accelerator.unwrap_model(self.model), Path(path)
        check_mergeable(model, folder, sharded=self.is_fsdp_enabled or is_deepspeed_zero3_enabled())
        if not isinstance(model, PeftModel):
            self.save_model(path)
            return
        if self.is_world_process_zero():
            write_checkpoint(merged_copy(model), self.processing_class, folder)
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
