"""Small tasks that contradict or complement each other, and short CPU runs over them."""

from __future__ import annotations

from datasets import Dataset

from hf_ext.trainers.adaptive_svd import AdaptiveSVDConfig, AdaptiveSVDTrainer, ContinualTask
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import CPU_RUN, make_tokenizer

OPTIONS = ("w60", "w61", "w62")


def make_task(name: str, shift: int, first: int = 0, count: int = 12) -> ContinualTask:
    """Words `first` to `first + count`, each with one of three answers; other shifts give other answers."""
    rows = [{"prompt": f"w{first + i} ", "completion": OPTIONS[(i + shift) % 3]} for i in range(count)]
    return ContinualTask(name, Dataset.from_list(rows), Dataset.from_list(rows), OPTIONS)


def make_tasks(count: int = 2) -> list[ContinualTask]:
    return [make_task(f"t{number}", number, first=15 * number) for number in range(count)]


def make_trainer(folder, tasks=None, model=None, **overrides) -> AdaptiveSVDTrainer:
    settings = {**CPU_RUN, "max_steps": 6, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 2}
    return AdaptiveSVDTrainer(
        make_tiny_llama() if model is None else model,
        AdaptiveSVDConfig(str(folder), **settings | overrides),
        make_tasks() if tasks is None else tasks,
        processing_class=make_tokenizer(),
    )


def trained(folder, **kwargs) -> AdaptiveSVDTrainer:
    trainer = make_trainer(folder, **kwargs)
    trainer.train()
    return trainer
