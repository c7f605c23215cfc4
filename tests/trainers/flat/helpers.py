"""A small forget and a small retain data set, and short CPU runs, for the tests of the unlearning trainers."""

from __future__ import annotations

from datasets import Dataset

from hf_ext.trainers.flat import FlatConfig, FlatTrainer, UnlearnConfig, UnlearnTrainer
from hf_ext.trainers.flat.methods import METHODS
from tests.conftest import make_tiny_llama
from tests.trainers.overtone.helpers import make_tokenizer

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
    settings = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
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
