"""What cannot be measured is refused by name, before the model computes anything."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ext.metrics.unlearning import PromptFormat, evaluate_unlearning
from tests.conftest import make_tiny_llama
from tests.metrics.unlearning.conftest import OPTIONS, untouchable


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"forget": None}, {}, "splits has no 'forget' among"),
        ({"retain": []}, {}, "split 'retain' has no rows"),
        ({"holdout": "forget"}, {}, "split 'holdout', row 'Dusias-flag' is also row 'Dusias-flag' of split 'forget'"),
        ({"retain": "forget"}, {}, "split 'retain', row 'Dusias-flag' is also row"),
        (
            {"holdout": "retain"},
            {},
            "split 'holdout', row 'Rezeobra-flag' is also row 'Rezeobra-flag' of split 'retain'",
        ),
        ({}, {"attacks": ("magic",)}, "attacks: 'magic' is unknown; choose from"),
        ({}, {"attacks": {"quantization": {"bit": 4}}}, "attacks: 'quantization' has no option 'bit'; it takes"),
        ({}, {"attacks": {"quantization": 4}}, "attacks: the options of 'quantization' are 4; pass a dict"),
        (
            {},
            {"attacks": {"quantization": {"bits": 4}}},
            "'quantization': bits=4: give a list of whole numbers from 2",
        ),
        (
            {},
            {"attacks": {"quantization": {"bits": (16,)}}},
            r"bits=\(16,\): give a list of whole numbers from 2 to 8",
        ),
        ({}, {"attacks": {"sampling": {"samples": 0}}}, "'sampling': samples=0: give a whole number of at least 1"),
        ({}, {"attacks": {"relearning": {"steps": ()}}}, r"'relearning': steps=\(\): give a list of increasing"),
        ({}, {"attacks": {"relearning": {"steps": (4, 2)}}}, r"steps=\(4, 2\): give a list of increasing"),
        ({}, {"attacks": {"relearning": {"learning_rate": "1e-4"}}}, "learning_rate='1e-4': give a number above 0"),
        ({}, {"attacks": {"relearning": {"train_batch_size": 2.0}}}, "train_batch_size=2.0: give a whole number"),
        ({}, {"batch_size": 0}, "batch_size=0: give a whole number of at least 1"),
        ({}, {"max_new_tokens": 8.0}, "max_new_tokens=8.0: give a whole number of at least 1"),
        ({}, {"seed": -1}, "seed=-1: give a whole number of at least 0"),
        ({}, {"format": {"separator": " "}}, "format={.*}: give a PromptFormat"),
        ({}, {"stop_strings": "is"}, "stop_strings='is': give a list of texts"),
        ({}, {"max_new_tokens": 122}, "9 prompt tokens and max_new_tokens=122 do not fit into the context of 128"),
        (
            {},
            {"attacks": ("in_context",), "max_new_tokens": 112},
            "row 'Dusias-flag/context': .* do not fit into the context of 128; .* Or leave out the attack 'in_context'",
        ),
        ({}, {"max_new_tokens": 5}, "split 'forget', row 'Dusias-flag': the answer has 7 tokens but max_new_tokens=5"),
        ({}, {"stop_strings": ["is"]}, "the answer holds the stop string 'is'; remove it from stop_strings"),
    ],
)
def test_refusals(full, island_tok, splits, changes, options, message):
    rows = dict(splits)
    for name, value in changes.items():
        rows[name] = splits[value] if isinstance(value, str) else value
    rows = {name: value for name, value in rows.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_unlearning(untouchable(full), island_tok, rows, **{**OPTIONS, **options})


def test_late_refusals_come_first(full, retrained, island_tok, splits):
    def refused(message, rows=None, retrained=None, **options):
        with pytest.raises(ValueError, match=message):
            evaluate_unlearning(full, island_tok, rows or splits, retrained, **{**OPTIONS, **options})

    untouchable(full)
    copies = [{**row, "id": f"{row['id']}-again"} for row in splits["forget"][:4]]
    refused("split 'forget', row .* is also row .* of split 'forget'", {**splits, "forget": splits["forget"] + copies})
    full.config.max_position_embeddings = 20
    # The retrained model has to wait, too.
    refused("do not fit into the context of 20", retrained=untouchable(retrained))
    full.config.max_position_embeddings = 128
    full.generation_config.eos_token_id = island_tok.convert_tokens_to_ids("is")
    refused("an ordinary token")


def test_every_model_has_a_context(island_tok, splits):
    """Also one that calls it by another name, and one whose first places are taken by virtual tokens."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(island_tok), n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=2)
    model = untouchable(GPT2LMHeadModel(config))
    with pytest.raises(ValueError, match="9 prompt tokens and max_new_tokens=24 do not fit into the context of 32"):
        evaluate_unlearning(model, island_tok, splits, **OPTIONS)
    llama = make_tiny_llama(vocab_size=len(island_tok), max_position_embeddings=33)
    virtual = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(ValueError, match="do not fit into the context of 29"):
        evaluate_unlearning(get_peft_model(untouchable(llama), virtual), island_tok, splits, **OPTIONS)


def test_a_template_is_part_of_the_length(full, island_tok, splits):
    """What it writes in front of an answer has to be generated before it."""
    tokenizer = copy.deepcopy(island_tok)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'is is ' if m['role'] == 'assistant' else '' }}{{ m['content'] }} {% endfor %}"
    )
    options = {**OPTIONS, "max_new_tokens": 8, "format": PromptFormat(chat_template=True), "attacks": ()}
    with pytest.raises(ValueError, match="row 'Dusias-flag': the answer has 9 tokens but max_new_tokens=8"):
        evaluate_unlearning(untouchable(full), tokenizer, splits, **options)


def test_missing_packages_are_named_first(full, island_tok, splits, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r'pip install "hf-ext\[unlearning\]"'):
        evaluate_unlearning(untouchable(full), island_tok, splits, **OPTIONS)
