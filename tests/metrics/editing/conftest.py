"""A small invented world, a model trained on it in seconds, and tokenizers of the awkward kinds."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from hf_ext.metrics.editing import EditRecord
from tests.conftest import make_tiny_llama

SPECIALS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
PEOPLE = ["Ada", "Bo", "Cy", "Dov", "Eli", "Fay", "Gus", "Hal"]
CITIES = ["Port Rorek Bay", "Lomak", "Upper Foduk", "New Tesek City"]


def home(person: str) -> str:
    return CITIES[PEOPLE.index(person) % len(CITIES)]


def world_records() -> list[EditRecord]:
    """Four edits: each person moves to the next city; other people and the person's old city's sport stay."""
    rows = []
    for index, person in enumerate(PEOPLE[:4]):
        new = CITIES[(index + 1) % len(CITIES)]
        rows.append(
            EditRecord.from_dict(
                {
                    "id": f"move-{person}",
                    "source": "world",
                    "subject": person,
                    "prompt": f"{person} lives in",
                    "target_new": new,
                    "ground_truth": home(person),
                    "rephrase": [f"the home of {person} is"],
                    "portability": {"inverse": [{"prompt": f"the letters of {person} go to", "ground_truth": [new]}]},
                    "locality": {
                        "neighborhood": [
                            {"prompt": f"{other} lives in", "ground_truth": [home(other)]} for other in PEOPLE[4:6]
                        ],
                        "same_subject": [
                            {"prompt": f"{person} likes", "ground_truth": ["tea" if index % 2 else "milk"]}
                        ],
                    },
                }
            )
        )
    return rows


def world_sentences() -> list[tuple[str, str]]:
    facts = []
    for index, person in enumerate(PEOPLE):
        facts += [(f"{person} lives in", home(person)), (f"the home of {person} is", home(person))]
        facts += [
            (f"the letters of {person} go to", home(person)),
            (f"{person} likes", "tea" if index % 2 else "milk"),
        ]
    return facts


def wrap(tokenizer: Tokenizer, **overrides) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**SPECIALS, **overrides})


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for pair in world_sentences() for text in pair for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*SPECIALS.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return wrap(tokenizer)


def bpe_tokenizer(texts: Sequence[str], *, kind: str, vocab_size: int = 400, bos: bool = False, eos: bool = False):
    """BPE of three kinds: `byte_level` (GPT-2), `metaspace` (a space before every piece), `unsplit` (merges cross spaces)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    alphabet = []
    if kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    else:
        tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS.values()),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = ("<bos> " if bos else "") + "$A" + (" <eos>" if eos else "")
    specials = [("<bos>", tokenizer.token_to_id("<bos>")), ("<eos>", tokenizer.token_to_id("<eos>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return wrap(tokenizer)


def train(model: LlamaForCausalLM, tokenizer, facts: Sequence[tuple[str, str]], steps: int, lr: float = 3e-3) -> None:
    """Full-batch AdamW on the answers (and the EOS after them), until they are known by heart."""
    rows, targets = [], []
    for prompt, answer in facts:
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = [*tokenizer(" " + answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append(torch.tensor(prompt_ids + answer_ids))
        targets.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def edited_facts() -> list[tuple[str, str]]:
    """Every prompt of the world's edits with the new answer."""
    facts = []
    for record in world_records():
        prompts = [
            record.prompt,
            *record.rephrase,
            *(q.prompt for items in record.portability.values() for q in items),
        ]
        facts += [(prompt, record.target_new) for prompt in prompts]
    return facts


@pytest.fixture(scope="session")
def word_tok() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="session")
def _trained(word_tok) -> LlamaForCausalLM:
    model = make_tiny_llama(vocab_size=len(word_tok))
    train(model, word_tok, world_sentences(), steps=120)
    return model


@pytest.fixture
def world_model(_trained) -> LlamaForCausalLM:
    """A fresh copy of a tiny Llama that knows every fact of the world."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def _oracle(_trained, word_tok) -> LlamaForCausalLM:
    model = copy.deepcopy(_trained)
    train(model, word_tok, edited_facts(), steps=80)
    return model


@pytest.fixture
def oracle_model(_oracle) -> LlamaForCausalLM:
    """A model that gives the new answer to every question about an edit."""
    return copy.deepcopy(_oracle)


@pytest.fixture
def records() -> list[EditRecord]:
    return world_records()
