"""A word-level tokenizer, a prompt-completion data set and short CPU runs for the OVERTONE tests."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_ext.trainers.overtone import OvertoneConfig, OvertoneTrainer
from tests.conftest import make_tiny_llama


def make_tokenizer() -> PreTrainedTokenizerFast:
    """99 tokens: pad, bos, eos, unk and w0 ... w94."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i + 4 for i in range(95)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_facts(count: int = 8) -> Dataset:
    """Prompts of three words and answers of one to three, so that micro-batches hold different numbers of tokens."""
    rows = []
    for i in range(count):
        answer = " ".join(f"w{(5 * i + j) % 90}" for j in range(1 + i % 3))
        rows.append({"prompt": f"w{i} w{i + 1} w{i + 2} ", "completion": f"{answer} </s>"})
    return Dataset.from_list(rows)


def make_args(folder, config_class=OvertoneConfig, **overrides) -> SFTConfig:
    settings = dict(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return config_class(**{**settings, **overrides})


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


def column(trainer: SFTTrainer, name: str) -> list[float]:
    """The logged values of one metric over the steps of the run."""
    return [float(row[name]) for row in trainer.state.log_history if name in row]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)
