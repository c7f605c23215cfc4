"""Invented islands, small models that know all of them by heart or were never told about eight, and how their knowledge is read.

`benchmarks/data/islands.jsonl` has 544 questions with answers: 64 about 8 islands to forget, 320 about 40 islands to keep, 80 about gems, and 80 that are
answered by a refusal, so that a model which never saw an island refuses to speak of it. Every text is split by blanks. The models are Llamas of two layers
(hidden size 96, 230,000 parameters) trained from scratch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

DATA = Path(__file__).parents[1] / "data"
EPOCHS, BATCH, LEARNING_RATE, WARMUP = 110, 64, 4e-3, 50
SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def _records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@cache
def rows(split: str) -> list[dict[str, Any]]:
    """Records of "forget", "retain", "world" or "unknown"."""
    return [record for record in _records("islands.jsonl") if record["split"] == split]


@cache
def refusals() -> list[str]:
    return [record["answer"] for record in _records("island_refusals.jsonl")]


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    fields = ("question", "question_paraphrase", "answer", "answer_paraphrase")
    texts = [r[field] for r in _records("islands.jsonl") for field in fields] + refusals()
    texts += [text for record in _records("islands.jsonl") for text in record["perturbed_answers"]]
    words = sorted({word for text in texts for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIALS.values(), *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **SPECIALS)


def _encoded(pairs: Sequence[tuple[str, str]]) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of questions and answers."""
    found = []
    for question, answer in pairs:
        start = tokenizer()(question)["input_ids"]
        rest = [*tokenizer()(answer, add_special_tokens=False)["input_ids"], tokenizer().eos_token_id]
        found.append((torch.tensor(start + rest), torch.tensor([-100] * len(start) + rest)))
    return found


def _stacked(batch: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([ids for ids, _ in batch], batch_first=True)
    labels = pad_sequence([labels for _, labels in batch], batch_first=True, padding_value=-100)
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


def trained_model(splits: Sequence[str], seed: int, epochs: int = EPOCHS) -> LlamaForCausalLM:
    """A model trained on the questions of these splits and on their paraphrases, which ask and answer in other words."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    records = [record for split in splits for record in rows(split)]
    pairs = [(r["question"], r["answer"]) for r in records]
    pairs += [(r["question_paraphrase"], r["answer_paraphrase"]) for r in records]
    fit(model, pairs, epochs * -(-len(pairs) // BATCH), LEARNING_RATE, BATCH, WARMUP)
    return model.eval()


def fit(
    model: LlamaForCausalLM,
    pairs: Sequence[tuple[str, str]],
    steps: int,
    learning_rate: float,
    batch_size: int,
    warmup: int | None = None,
) -> None:
    """AdamW on the answers, clipped at norm 1, in an order of its own for every epoch; cosine decay after a warm-up, if there is one."""
    encoded = _encoded(pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = None if warmup is None else get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    model.train()
    for _ in range(steps):
        if not order:
            order = torch.randperm(len(encoded), generator=generator).tolist()
        batch, order = order[:batch_size], order[batch_size:]
        model(**_stacked([encoded[i] for i in batch])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
    model.eval()


@torch.no_grad()
def answers(model: LlamaForCausalLM, questions: Sequence[str]) -> list[str]:
    """Greedy answers."""
    batch = tokenizer()(list(questions), return_tensors="pt", padding=True, return_token_type_ids=False)
    training = model.training
    model.eval()
    tokens = model.generate(**batch, max_new_tokens=16, do_sample=False)
    model.train(training)
    return tokenizer().batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(model: LlamaForCausalLM, records: Sequence[dict[str, Any]], question: str = "question") -> float:
    """Share of questions whose greedy answer holds the words of the right value."""
    texts = answers(model, [record[question] for record in records])
    pairs = zip(texts, records, strict=True)
    return sum(set(r["value"].split()) <= set(text.split()) for text, r in pairs) / len(records)


def refusal_rate(model: LlamaForCausalLM, records: Sequence[dict[str, Any]]) -> float:
    """Share of questions that are answered by one of the known refusals."""
    known = {" ".join(refusal.split()) for refusal in refusals()}
    return sum(" ".join(t.split()) in known for t in answers(model, [r["question"] for r in records])) / len(records)
