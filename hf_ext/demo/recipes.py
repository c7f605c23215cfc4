"""How the demo and the benchmarks edit facts: a tuner, a loss, and the ordinary trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from hf_ext.metrics.editing import EditRecord
from hf_ext.trainers.overtone import OvertoneConfig, OvertoneTrainer
from hf_ext.tuners.roselora import RoseLoraCallback, RoseLoraConfig

LOSSES = ("sft", "ce", "ce_stop", "overtone")
TUNERS = ("lora", "roselora")


@dataclass(frozen=True)
class EditRecipe:
    """One way to edit.

    Attributes:
        tuner: `"lora"` or `"roselora"`.
        loss: `"sft"` (cross-entropy by `SFTTrainer`), `"ce"` (the same numbers from OVERTONE's head with `mix_lambda=1` and
            `clip_epsilon=0`, which on a CPU projects only the labelled tokens), `"ce_stop"` (until its mean is below
            `STOP_LOSS`) or `"overtone"` (until no token has a gradient).
        learning_rate: of AdamW, constant.
        steps: optimizer steps at most, each on all edits at once.
        rank, alpha, target_modules: of the adapter.
        layers: which decoder layers to adapt, as a range of fractions of the depth. Facts about a subject are looked up in
            the early MLPs; adapting those moves the neighbours of an edit least.
        sparsity, t_init, t_final: of RoseLoRA; training never stops before `t_final`.
        append_eos: teach the model to end its text after the answer.
    """

    tuner: str = "roselora"
    loss: str = "overtone"
    learning_rate: float = 1e-3
    steps: int = 40
    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = ("up_proj", "down_proj")
    layers: tuple[float, float] = (0.05, 0.45)
    sparsity: float = 0.9
    t_init: int = 3
    t_final: int = 20
    append_eos: bool = False

    @property
    def min_steps(self) -> int:
        return self.t_final if self.tuner == "roselora" else 1

    def peft_config(self, depth: int) -> LoraConfig:
        """The adapter for a model of `depth` decoder layers."""
        first, end = (round(share * depth) for share in self.layers)
        shared: dict[str, Any] = dict(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.target_modules),
            layers_to_transform=list(range(first, max(end, first + 1))),
            task_type="CAUSAL_LM",
        )
        if self.tuner == "lora":
            return LoraConfig(**shared)
        return RoseLoraConfig(**shared, sparsity=self.sparsity, t_init=self.t_init, t_final=self.t_final)


STOP_LOSS = 0.3  # of `"ce_stop"`: the tokens of the answers have probabilities of about 0.75


class StopBelow(TrainerCallback):
    """Stop once the training loss is below `threshold`, but not before `min_steps`."""

    def __init__(self, min_steps: int, threshold: float = STOP_LOSS) -> None:
        self.threshold, self.min_steps = threshold, min_steps

    def reached(self, state: TrainerState, logs: dict[str, float] | None) -> bool:
        return state.global_step >= self.min_steps and (logs or {}).get("loss", self.threshold) < self.threshold

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.reached(state, logs):
            control.should_training_stop = True


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    recipe: EditRecipe,
    output_dir: str,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
) -> SFTTrainer:
    """Train an adapter on the edits, all of them in every step; `.model` of the returned trainer is the edited model."""
    torch.manual_seed(seed)
    adapted: PeftModel = get_peft_model(model, recipe.peft_config(model.config.get_text_config().num_hidden_layers))
    settings: dict[str, Any] = dict(
        output_dir=output_dir,
        max_steps=recipe.steps,
        per_device_train_batch_size=len(records),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        seed=seed,
    )
    extra = [*callbacks, *([RoseLoraCallback()] if recipe.tuner == "roselora" else [])]
    data = tokenized(tokenizer, records, recipe.append_eos)
    shared: dict[str, Any] = dict(model=adapted, train_dataset=data, processing_class=tokenizer)
    if recipe.loss == "sft":
        trainer = SFTTrainer(args=SFTConfig(**settings), callbacks=extra, **shared)
    elif recipe.loss == "overtone":
        config = OvertoneConfig(**settings, saturation_patience=1, saturation_min_steps=recipe.min_steps)
        trainer = OvertoneTrainer(args=config, callbacks=extra, **shared)
    else:
        config = OvertoneConfig(
            **settings, mix_lambda=1.0, clip_epsilon=0.0, stop_when_saturated=False, skip_saturated_steps=False
        )
        if recipe.loss == "ce_stop":
            extra.append(StopBelow(recipe.min_steps))
        trainer = OvertoneTrainer(args=config, callbacks=extra, **shared)
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.train()
    return trainer


def tokenized(tokenizer: PreTrainedTokenizerBase, records: Sequence[EditRecord], append_eos: bool) -> Dataset:
    """Prompt and answer as token ids, with labels on the answer alone: TRL would take a mask of completions of tokenised data for none."""
    rows = []
    for record in records:
        prompt = tokenizer(record.prompt)["input_ids"]
        answer = tokenizer(f" {record.target_new}", add_special_tokens=False)["input_ids"]
        answer = answer + [tokenizer.eos_token_id] * append_eos
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)
