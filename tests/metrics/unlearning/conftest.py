"""Invented islands, a model that knows them all, models that never saw three of them, and reports on both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext.metrics.unlearning import ATTACKS, UnlearningReport, evaluate_unlearning
from tests.conftest import make_tiny_llama
from tests.metrics.editing.conftest import SPECIALS, train, wrap

DATA = Path(__file__).resolve().parents[2] / "data" / "unlearning_metrics"
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in (DATA / "islands.jsonl").open(encoding="utf-8")]
KEPT_ISLANDS = 5
OPTIONS = {"max_new_tokens": 24, "batch_size": 32}
RELEARNING = {"relearning": {"steps": (2, 8), "learning_rate": 1e-3}}
FAST = {"sampling": {"samples": 3}, **RELEARNING}


def island_splits() -> dict[str, list[dict[str, Any]]]:
    """Rows to forget (24), to keep (40 and 16) and never seen (24)."""
    islands = list(dict.fromkeys(record["entity"] for record in RECORDS if record["split"] == "retain"))
    splits: dict[str, list[dict[str, Any]]] = {"forget": [], "retain": [], "world_facts": [], "holdout": []}
    names = {"forget": "forget", "retain": "retain", "world": "world_facts"}
    for record in RECORDS:
        unseen = record["entity"] in islands[KEPT_ISLANDS:]
        row = {
            "id": f"{record['entity']}-{record['attribute']}",
            "prompt": record["question"],
            "answer": record["answer"],
            "perturbed": record["perturbed_answers"],
            "prompt_paraphrases": [record["question_paraphrase"]],
        }
        splits["holdout" if unseen else names[record["split"]]].append(row)
    return splits


def island_tokenizer() -> PreTrainedTokenizerFast:
    texts = [r[key] for r in RECORDS for key in ("question", "question_paraphrase", "answer", "answer_paraphrase")]
    texts += [text for record in RECORDS for text in record["perturbed_answers"]]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIALS.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return wrap(tokenizer)


def learn(model: LlamaForCausalLM, tokenizer, *splits: str, steps: int = 75, lr: float = 5e-3) -> LlamaForCausalLM:
    rows = [row for split in splits for row in island_splits()[split]]
    train(model, tokenizer, [(row["prompt"], row["answer"]) for row in rows], steps=steps, lr=lr)
    return model


@pytest.fixture(scope="session")
def island_tok() -> PreTrainedTokenizerFast:
    return island_tokenizer()


@pytest.fixture(scope="session")
def _full(island_tok) -> LlamaForCausalLM:
    return learn(make_tiny_llama(0, vocab_size=len(island_tok)), island_tok, "forget", "retain", "world_facts")


@pytest.fixture(scope="session")
def _retrained(island_tok) -> LlamaForCausalLM:
    return learn(make_tiny_llama(1, vocab_size=len(island_tok)), island_tok, "retain", "world_facts")


@pytest.fixture(scope="session")
def _retrained_again(island_tok) -> LlamaForCausalLM:
    return learn(make_tiny_llama(2, vocab_size=len(island_tok)), island_tok, "retain", "world_facts")


@pytest.fixture
def full(_full) -> LlamaForCausalLM:
    """A fresh copy of a model that knows everything but the holdout."""
    return copy.deepcopy(_full)


@pytest.fixture
def retrained(_retrained) -> LlamaForCausalLM:
    """A fresh copy of a model that never saw the rows to forget."""
    return copy.deepcopy(_retrained)


@pytest.fixture
def retrained_again(_retrained_again) -> LlamaForCausalLM:
    """The same from another seed."""
    return copy.deepcopy(_retrained_again)


@pytest.fixture
def splits() -> dict[str, list[dict[str, Any]]]:
    return island_splits()


def few(splits):
    return {name: rows[:4] for name, rows in splits.items()}


def everything():
    return {**{name: {} for name in ATTACKS}, **FAST}


@pytest.fixture(scope="session")
def retrained_report(_retrained, island_tok) -> UnlearningReport:
    return evaluate_unlearning(_retrained, island_tok, island_splits(), attacks=everything(), **OPTIONS)


@pytest.fixture(scope="session")
def full_report(_full, _retrained, island_tok) -> UnlearningReport:
    return evaluate_unlearning(_full, island_tok, island_splits(), _retrained, attacks=everything(), **OPTIONS)


class Snapshot:
    """Everything about a model that an attack might change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.random = torch.get_rng_state()
        self.values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.parameters = [
            (name, id(p), p.data_ptr(), p.dtype, p.requires_grad, None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters()
        ]
        self.modes = [module.training for module in model.modules()]

    def check(self) -> None:
        other = Snapshot(self.model)
        assert torch.equal(self.random, other.random)
        assert list(self.values) == list(other.values)
        assert all(torch.equal(value, other.values[name]) for name, value in self.values.items())
        for one, two in zip(self.parameters, other.parameters, strict=True):
            assert one[:5] == two[:5]
            assert (one[5] is None) == (two[5] is None) and (one[5] is None or torch.equal(one[5], two[5]))
        assert self.modes == other.modes


def adapted(model, seed=0, scale=0.05, **options):
    """The model with a LoRA adapter that does something."""
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.5, **options}
    tuned = get_peft_model(model, LoraConfig(**options))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=scale)
    return tuned.eval()


def untouchable(model):
    """Whatever is refused is refused before the model computes anything."""

    def refuse(module, args, kwargs):
        raise AssertionError("a forward pass")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    return model
