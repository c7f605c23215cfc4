"""Five small classification tasks, and a small language model that has read their texts.

`benchmarks/data/continual/` has the texts and labels of DBpedia (three groups of five, five and four topics), AG News (four topics) and Yelp (two
sentiments). A row is a text and, after `Label:`, its label. The small models are Llamas of two layers (hidden size 64) with 3,000 words and one token per
label, trained from scratch on the texts without their labels.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from benchmarks.training import QUIET
from hf_ext.trainers.tasks import ContinualTask

DATA = Path(__file__).parents[1] / "data" / "continual"
TASKS = ("dbpedia_a", "dbpedia_b", "dbpedia_c", "agnews", "yelp")
ORDERS = (
    ("dbpedia_a", "agnews", "yelp", "dbpedia_b", "dbpedia_c"),
    ("yelp", "dbpedia_c", "agnews", "dbpedia_a", "dbpedia_b"),
)
WORDS, LENGTH, EPOCHS, LEARNING_RATE = 3000, 64, 8, 3e-3
SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


@cache
def records() -> list[dict[str, str]]:
    """`task`, `split`, `text` and `label` of every row."""
    lines = {name: (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in TASKS}
    return [{"task": name, **json.loads(line)} for name, found in lines.items() for line in found]


@cache
def labels(task: str) -> tuple[str, ...]:
    return tuple(sorted({record["label"] for record in records() if record["task"] == task}))


def task(name: str, train_rows: int | None = None, eval_rows: int | None = None) -> ContinualTask:
    """A task with at most so many rows; those of its labels alternate."""
    splits = {}
    for split, count in (("train", train_rows), ("test", eval_rows)):
        found = [record for record in records() if (record["task"], record["split"]) == (name, split)][:count]
        rows = [{"prompt": f"{r['text']}\nLabel:", "completion": " " + r["label"]} for r in found]
        splits[split] = Dataset.from_list(rows)
    return ContinualTask(name, splits["train"], splits["test"], tuple(f" {label}" for label in labels(name)))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per lower-case word, and one per label."""
    inner = Tokenizer(models.WordLevel(unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=list(SPECIALS.values()), show_progress=False)
    inner.train_from_iterator([f"{record['text']}\nLabel:" for record in records()], trainer)
    inner.add_tokens([AddedToken(f" {label}", normalized=False) for name in TASKS for label in labels(name)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **SPECIALS)


def pretrained_model(seed: int) -> LlamaForCausalLM:
    """A small model that has read all texts."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer()),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2 * LENGTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    texts = Dataset.from_list([{"text": record["text"]} for record in records() if record["split"] == "train"])
    with tempfile.TemporaryDirectory() as scratch:
        settings = SFTConfig(
            scratch,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=32,
            learning_rate=LEARNING_RATE,
            max_length=LENGTH,
            seed=seed,
            **QUIET,
        )
        SFTTrainer(model, settings, train_dataset=texts, processing_class=tokenizer()).train()
    # TRL gives a trained model a forward that stays bound to it, in copies too.
    fresh = LlamaForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    return fresh
