"""`BaftTrainer`: one edit of a BaFT adapter, with what keeps it apart from earlier edits and from everything else."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import reduce
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from hf_ext._modes import evaluating
from hf_ext.registry import BAFT
from hf_ext.trainers.baft.checks import active_adapter, check_datasets, check_run, check_settings, row_without_prompt
from hf_ext.trainers.baft.config import BaftSettings, BaftTrainerConfig
from hf_ext.trainers.cards import CardMixin
from hf_ext.trainers.output_layer import AnswersOnly, base_of, patching
from hf_ext.trainers.runs import arguments_of
from hf_ext.tuners.baft import BaftConfig, BaftLayer
from hf_ext.tuners.baft.calls import Recorded
from hf_ext.tuners.baft.ledger import Edit, begin, edits, finish, has_room, layers_of, recorded_weights
from hf_ext.tuners.baft.positions import IGNORED
from hf_ext.tuners.baft.reference import gate_penalty, load_balance, unevenness

if TYPE_CHECKING:
    _TrainerBase = SFTTrainer
else:
    _TrainerBase = object

Weights = dict[BaftLayer, Tensor]


class BaftMixin(_TrainerBase):
    """What turns a trainer of answers into one of edits: losses on the weights of the basis vectors, an early end, and the ledger.

    Put it before the trainer class and call `baft_setup` after the trainer's constructor.

    Example:
        ```python
        class OvertoneBaftTrainer(BaftMixin, OvertoneTrainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.baft_setup(BaftSettings(edit_name="rome"))
        ```
    """

    args: Any
    model: Any

    def baft_setup(self, settings: BaftSettings, locality_dataset: Dataset | None = None) -> None:
        """Prepare the active adapter for an edit.

        Args:
            settings: of the edit.
            locality_dataset: see `BaftTrainer`.

        Raises:
            ValueError: the model has no trainable BaFT adapter, or a setting has no effect on it.
        """
        self._settings = settings
        self._adapter, config = active_adapter(self.model)
        check_datasets(self.train_dataset, locality_dataset)
        check_settings(settings, config, locality_dataset is not None)
        check_run(settings, config, self)
        known = {edit.name for edit in edits(self.model, self._adapter)}
        self._edit_name = settings.edit_name or next(f"edit-{n}" for n in range(1, 10**9) if f"edit-{n}" not in known)
        if self._edit_name in known:
            raise ValueError(
                f"edit_name={self._edit_name!r}: the adapter has been taught an edit of this name; choose another."
            )
        if not settings.own_bases and not has_room(self.model, self._adapter):
            raise ValueError(
                "all basis vectors of the adapter belong to earlier edits; give this one its own with own_bases=True."
            )
        self._locality = self._endless(locality_dataset) if locality_dataset is not None else None
        self._sums: dict[str, list[float]] = defaultdict(list)
        self.learnt = StopWhenLearnt(settings.stop_loss)
        self.add_callback(self.learnt)

    # -- the loss ------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        whole = AnswersOnly(model, base_of(self.model))
        if not self.model.training:
            return super().compute_loss(whole, inputs, *args, **kwargs)
        with recorded_weights(self.model) as found:
            result = super().compute_loss(whole, inputs, *args, **kwargs)
        loss = result[0] if isinstance(result, tuple) else result
        self.learnt.add(loss)
        # As the trainer's own loss, which is a share of a mean over the accumulated batch.
        extra = self._extra(self._by_layer(found)) / self.current_gradient_accumulation_steps
        return (loss + extra, *result[1:]) if isinstance(result, tuple) else loss + extra

    def _extra(self, weights: Weights) -> Tensor:
        """alpha times load balancing and beta times locality."""
        terms = {"weight": torch.stack([each.mean() for each in weights.values()]).mean()}
        total = terms["weight"] * 0
        if alpha := _alpha(self._settings, self._adapter, self.model):
            balances = [self._balance(layer, each.mean(0)) for layer, each in weights.items()]
            terms["load_balance"] = torch.stack(balances).mean()
            total = total + alpha * terms["load_balance"]
        if self._locality is not None:
            unrelated = self._by_layer(next(self._locality))
            terms["locality"] = torch.stack([gate_penalty(each) for each in unrelated.values()]).mean()
            total = total + _beta(self._settings) * terms["locality"]
        for name, value in terms.items():
            self._sums[name].append(float(value.detach()))
        return total

    def _balance(self, layer: BaftLayer, mean_K: Tensor) -> Tensor:
        past_K = layer.baft_usage[self._adapter].to(mean_K)
        if self._settings.load_balance == "overlap":
            return load_balance(past_K, mean_K)
        return unevenness(past_K + mean_K)

    def _by_layer(self, found: list[Recorded]) -> Weights:
        """Weights `(N, K)` at the N edited tokens; of no tokens: one row of zeros with a graph."""
        by_name = {layer.name: layer for layer in layers_of(self.model, self._adapter)}
        rows = {by_name[each.block]: each.edited() for each in found if each.adapter == self._adapter}
        return {layer: each if len(each) else each.sum(0, keepdim=True) for layer, each in rows.items()}

    def _weights_on(self, batch: dict[str, Tensor], whole: bool = False) -> list[Recorded]:
        """Of a pass whose output is not wanted; `whole`: at every token that is no padding."""
        inputs = self._prepare_inputs(batch)
        labels = inputs.pop("labels")
        where = {"intervention_mask": labels != IGNORED} if whole else {"intervention_labels": labels}
        with recorded_weights(self.model) as found:
            self.model(**inputs, **where, use_cache=False, logits_to_keep=1)
        return found

    def _endless(self, dataset: Dataset) -> Iterator[list[Recorded]]:
        """The weights on one batch of unrelated text after another."""
        prepared: Any = dataset
        processing: Any = self.processing_class
        if not (self.args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            prepared = self._prepare_dataset(dataset, processing, self.args, False, None, "locality")
        whole = row_without_prompt(prepared) is not None
        prepared = self._remove_unused_columns(prepared, "locality")
        size = self._settings.locality_batch_size or self.args.per_device_train_batch_size
        generator = torch.Generator().manual_seed(self.args.seed + self.accelerator.process_index)
        loader = DataLoader(prepared, size, shuffle=True, collate_fn=self.data_collator, generator=generator)
        return (self._weights_on(batch, whole) for _ in itertools.count() for batch in loader)

    # -- the ledger ----------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; afterwards the ledger of the adapter holds the edit. If it fails, the ledger is as before, and so are basis vectors
        with `own_bases`.

        Raises:
            ValueError: this trainer has taught its edit already.
        """
        if self._edit_name in {edit.name for edit in edits(self.model, self._adapter)}:
            raise ValueError(
                f"the adapter has been taught {self._edit_name!r} already: make a new trainer for another edit."
            )
        config = self.model.peft_config[self._adapter]
        layers, r = layers_of(self.model, self._adapter), config.r
        before = [
            {key: value.detach().clone() for key, value in layer.tensors(self._adapter).items()} for layer in layers
        ]
        edit = Edit(self._edit_name, len(self.train_dataset), None, {}, 0, None)  # type: ignore[arg-type]
        try:
            if self._settings.own_bases:
                edit.bases = _own_bases(self.model, self._adapter, config)
            begin(self.model, edit, self._adapter)
            output = super().train(*args, **kwargs)
            means = (
                {layer: torch.ones(config.r) for layer in layers} if config.gate == "none" else self._mean_weights()
            )
            edit.weights = {layer.name: [round(float(value), 6) for value in mean] for layer, mean in means.items()}
            edit.steps, edit.loss = self.state.global_step, self.learnt.last
            finish(self.model, edit, self._adapter)
        except BaseException:
            config.edits[:] = [entry for entry in config.edits if entry["name"] != self._edit_name]
            if self._settings.own_bases:
                config.r = r
                for layer, tensors in zip(layers, before, strict=True):
                    trained = {k: nn.Parameter(v) if k in layer.adapter_layer_names else v for k, v in tensors.items()}
                    layer.put_back(self._adapter, trained)
            raise
        return output

    @torch.no_grad()
    def _mean_weights(self) -> Weights:
        """Over the edited tokens of the whole training data."""
        sums: dict[BaftLayer, Tensor] = {}
        with evaluating(self.model):
            for batch in self.get_train_dataloader():
                for layer, each in self._by_layer(self._weights_on(batch)).items():
                    row = torch.cat([each.sum(0), each.new_full((1,), len(each))])
                    sums[layer] = sums[layer] + row if layer in sums else row
        return {layer: total[:-1] / total[-1] for layer, row in sums.items() for total in [reduce(row, "sum")]}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update({f"baft/{name}": sum(values) / len(values) for name, values in self._sums.items()})
            self._sums.clear()
        super().log(logs, start_time)


class StopWhenLearnt(TrainerCallback):
    """Ends the training after an optimizer step whose loss was below `stop_loss`.

    Attributes:
        last: the loss of the last step, in nats per token; None if there was none.
    """

    last: float | None = None

    def __init__(self, stop_loss: float | None) -> None:
        self.stop_loss = stop_loss
        self._sum: Tensor | None = None

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch, as a part of the mean over the step."""
        self._sum = loss.detach() if self._sum is None else self._sum + loss.detach()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._sum is not None:
            self.last, self._sum = round(float(reduce(self._sum.float(), "mean")), 6), None
        if self.stop_loss is not None and self.last is not None and self.last < self.stop_loss:
            control.should_training_stop = True


class BaftTrainer(CardMixin, BaftMixin, SFTTrainer):
    """Teach one edit, a fact or many, to a BaFT adapter (https://huggingface.co/papers/2503.00306).

    The loss is `SFTTrainer`'s on the answers, plus load balancing against earlier edits and, with `locality_dataset`, a penalty on weights at unrelated text. For
    the next edit, make another trainer with the same model. The log holds `baft/weight`, the mean weight at the edited tokens, `baft/load_balance`
    and `baft/locality`.

    Args:
        model: as for `SFTTrainer`: a name, a model, or a PEFT model whose active adapter is a `BaftConfig`'s.
        args: a `BaftTrainerConfig`; its defaults if not given.
        train_dataset: prompt-completion data, conversations with `assistant_only_loss=True`, or tokenised data with labels: where a prompt ends is where
            edits are.
        locality_dataset: text that is to stay as it is, of the same kinds as `train_dataset`, and plain text, which is protected at every token.
        peft_config: for a model without an adapter; `BaftConfig(task_type="CAUSAL_LM")` if not given.
        eval_dataset, processing_class, data_collator, kwargs: as for `SFTTrainer`.

    Raises:
        TypeError: `args` is not a `BaftTrainerConfig`, or data that are no `datasets.Dataset`.
        ValueError: there is no trainable BaFT adapter, a row without a prompt, or a setting without effect.

    Example:
        ```python
        from datasets import Dataset
        from hf_ext import BaftTrainer, BaftTrainerConfig

        edit = Dataset.from_list([{"prompt": "The Eiffel Tower is in the city of", "completion": " Rome"}])
        trainer = BaftTrainer("google/gemma-3-270m", BaftTrainerConfig("edited"), train_dataset=edit)
        trainer.train()
        trainer.save_model()
        ```
    """

    _tag_names = ["trl", "sft", BAFT.slug]  # noqa: RUF012
    _name = BAFT.name
    _paper = {"title": BAFT.paper_title, "id": BAFT.arxiv, "citation": BAFT.citation}  # noqa: RUF012

    args: BaftTrainerConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: BaftTrainerConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        locality_dataset: Dataset | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        args = arguments_of(args, BaftTrainerConfig, model, type(self), BAFT.name)
        check_datasets(train_dataset, locality_dataset)
        if isinstance(model, PreTrainedModel) and layers_of(model):
            raise ValueError(
                "model: it has BaFT adapters that were added with add_adapter; wrap the plain model with get_peft_model instead."
            )
        if peft_config is None and not isinstance(model, PeftModel):
            peft_config = BaftConfig(task_type="CAUSAL_LM")
        exact = copy.deepcopy(_tensors(model)) if isinstance(model, PeftModel) else None
        with patching(self, model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        _undo_rounding(self.model, exact)
        self.baft_setup(args.baft_settings(), locality_dataset)


def _own_bases(model: Any, adapter: str, config: BaftConfig) -> tuple[int, int]:
    """The basis vectors of an edit alone: the adapter's, if it has no effect yet, or as many new ones as the first edit has."""
    ledger, layers = edits(model, adapter), layers_of(model, adapter)
    if not ledger and all(layer.has_no_effect(adapter) for layer in layers):
        return 0, config.r
    first = next((edit.bases for edit in ledger if edit.bases is not None), (0, config.r))
    count = first[1] - first[0]
    for layer in layers:
        layer.grow(adapter, config, count)
    config.r += count
    return config.r - count, config.r


def _alpha(settings: BaftSettings, adapter: str, model: Any) -> float:
    if settings.load_balance_weight is not None:
        return settings.load_balance_weight
    return 0.0 if settings.own_bases or model.peft_config[adapter].gate == "none" else 0.1


def _beta(settings: BaftSettings) -> float:
    return 1.0 if settings.locality_weight is None else settings.locality_weight


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of all BaFT adapters."""
    return {f"{layer.name}.{name}": p for layer in layers_of(model) for name, p in layer.named_parameters()}


def _undo_rounding(model: Any, exact: dict[str, Tensor] | None) -> None:
    """On a quantised base, TRL rounds adapters to bfloat16, in which a basis is not orthonormal and small steps are lost."""
    if all(p.dtype != torch.bfloat16 for p in _tensors(model).values()):
        return
    if exact is not None:
        for name, p in _tensors(model).items():
            p.data = exact[name].data
        return
    for layer in layers_of(model):
        for adapter in list(layer.baft_R):
            layer.add_adapter(adapter, model.peft_config[adapter], layer.baft_R[adapter].device)
