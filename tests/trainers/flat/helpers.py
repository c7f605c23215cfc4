"""A small forget and a small retain data set, and short CPU runs, for the tests of the unlearning trainers."""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import PeftModel

from hf_ext.trainers.flat import FlatConfig, FlatTrainer, UnlearnConfig, UnlearnTrainer
from hf_ext.trainers.flat.methods import METHODS
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import CPU_RUN, make_tokenizer

REFUSALS = ["w80 w81 w82", "w83 w84", "w85 w86 w87 w88"]


def make_forget(count: int = 8) -> Dataset:
    """Prompts of two or three words and answers of one to three."""
    rows = []
    for i in range(count):
        prompt = " ".join(f"w{i + j}" for j in range(2 + i % 2))
        rows.append({"prompt": prompt + " ", "completion": " ".join(f"w{(5 * i + j) % 70}" for j in range(1 + i % 3))})
    return Dataset.from_list(rows)


def make_retain(count: int = 6) -> Dataset:
    rows = [
        {"prompt": f"w{i + 30} w{i} ", "completion": " ".join(f"w{(7 * i + j) % 70}" for j in range(1 + i % 4))}
        for i in range(count)
    ]
    return Dataset.from_list(rows)


def make_preference() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": REFUSALS[i % 3], "rejected": row["completion"]}
            for i, row in enumerate(make_forget())
        ]
    )


def make_args(folder, config_class=UnlearnConfig, **overrides) -> UnlearnConfig:
    settings = {"output_dir": str(folder), "max_steps": 3, **CPU_RUN}
    loss_type = overrides.get("loss_type", "flat")
    if loss_type == "rmu":
        settings["loss_kwargs"] = {"layer": 0}
    if METHODS[loss_type].template:
        settings["template_answers"] = REFUSALS
    return config_class(**{**settings, **overrides})


def make_trainer(folder, model=None, data=None, overrides=None, trainer_class=UnlearnTrainer, **kwargs):
    config_class = FlatConfig if issubclass(trainer_class, FlatTrainer) else UnlearnConfig
    return trainer_class(
        make_tiny_llama() if model is None else model,
        make_args(folder, config_class, **(overrides or {})),
        train_dataset=make_forget() if data is None else data,
        processing_class=make_tokenizer(),
        **kwargs,
    )


def trained(folder, **kwargs) -> UnlearnTrainer:
    trainer = make_trainer(folder, **kwargs)
    trainer.train()
    return trainer


def random_adapter(model: PeftModel, seed: int = 3) -> PeftModel:
    """Draw its trainable weights, as a trained adapter would have them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def batch_of(trainer) -> dict[str, torch.Tensor]:
    """The first batch of a run that has not begun."""
    if trainer._references_are_due:
        trainer.train_dataset = trainer._with_reference_sums(trainer.train_dataset)
    return next(iter(trainer.get_train_dataloader()))


def loss_of(trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch))
