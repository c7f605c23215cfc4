"""A prompt-completion data set and short CPU runs for the OVERTONE tests."""

from __future__ import annotations

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_ext.trainers.overtone import OvertoneConfig, OvertoneTrainer
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import CPU_RUN, make_tokenizer


def make_facts(count: int = 8) -> Dataset:
    """Prompts of three words and answers of one to three, so that micro-batches hold different numbers of tokens."""
    rows = []
    for i in range(count):
        answer = " ".join(f"w{(5 * i + j) % 90}" for j in range(1 + i % 3))
        rows.append({"prompt": f"w{i} w{i + 1} w{i + 2} ", "completion": f"{answer} </s>"})
    return Dataset.from_list(rows)


def make_args(folder, config_class=OvertoneConfig, **overrides) -> SFTConfig:
    return config_class(**{"output_dir": str(folder), "max_steps": 4, **CPU_RUN, **overrides})


def make_trainer(folder, model=None, trainer_class=OvertoneTrainer, data=None, overrides=None, **kwargs) -> SFTTrainer:
    config_class = OvertoneConfig if issubclass(trainer_class, OvertoneTrainer) else SFTConfig
    return trainer_class(
        make_tiny_llama() if model is None else model,
        make_args(folder, config_class, **(overrides or {})),
        train_dataset=make_facts() if data is None else data,
        processing_class=make_tokenizer(),
        **kwargs,
    )


def trained(folder, **kwargs) -> SFTTrainer:
    trainer = make_trainer(folder, **kwargs)
    trainer.train()
    return trainer
