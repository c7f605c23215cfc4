"""Edits of small models."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model

from hf_ext import BaftConfig, BaftTrainer, BaftTrainerConfig
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import CPU_RUN, make_tokenizer

FACTS = [
    ("w1 w2 w3", "w40 w41"),
    ("w4 w5", "w42 w43 w44"),
    ("w6 w7 w8 w9", "w45"),
    ("w10 w2 w11", "w46 w47"),
]


def facts(*numbers: int) -> Dataset:
    """Facts of the list by number; all of them if none is given."""
    chosen = [FACTS[number] for number in numbers] or FACTS
    return Dataset.from_list([{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in chosen])


def unrelated() -> Dataset:
    return Dataset.from_list([{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2}"} for n in range(50, 58)])


def base():
    """A model whose random output layer is large enough to be sure of an answer."""
    model = make_tiny_llama()
    model.lm_head.weight.data *= 20
    return model


def adapted(**options: Any):
    torch.manual_seed(0)
    return get_peft_model(base(), BaftConfig(**{"r": 4, "layers": [0], "task_type": "CAUSAL_LM", **options}))


def trainer(
    folder,
    model=None,
    data: Dataset | None = None,
    locality: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    **settings: Any,
) -> BaftTrainer:
    args = BaftTrainerConfig(str(folder), **{**CPU_RUN, "learning_rate": 0.05, "num_train_epochs": 60, **settings})
    return BaftTrainer(
        adapted() if model is None else model,
        args,
        train_dataset=facts() if data is None else data,
        locality_dataset=locality,
        eval_dataset=eval_dataset,
        processing_class=make_tokenizer(),
    )


@torch.no_grad()
def answers(model, *numbers: int) -> list[str]:
    """What the model says, as many words as each answer has."""
    tokenizer, found = make_tokenizer(), []
    model.eval()
    for prompt, answer in [FACTS[number] for number in numbers] or FACTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        count = len(answer.split())
        written = model.generate(input_ids=ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
        found.append(tokenizer.decode(written[0, ids.shape[1] :]))
    return found


def right(*numbers: int) -> list[str]:
    return [FACTS[number][1] for number in numbers] or [answer for _, answer in FACTS]
