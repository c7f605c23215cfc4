"""Answers do not depend on the batch, on other random draws, or on what the model's settings forbid it to say."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import GenerationConfig

from hf_ext.metrics.editing.inference import ModelRunner
from hf_ext.metrics.unlearning.generation import _Draw, greedy_answers, sampled_answers
from hf_ext.metrics.unlearning.rows import read_rows
from hf_ext.metrics.unlearning.scores import PromptFormat, RowEncoder


def parts(model, tokenizer, rows, batch_size=8):
    return ModelRunner(model, tokenizer, batch_size), RowEncoder(tokenizer, PromptFormat()), read_rows(rows, "forget")


def test_a_model_says_what_it_knows(full, island_tok, splits):
    rows = splits["forget"][:5]
    assert greedy_answers(*parts(full, island_tok, rows), 24) == [row["answer"] for row in rows]
    assert greedy_answers(*parts(full, island_tok, rows), 24, ["is"]) == [
        row["answer"].partition("is")[0].strip() for row in rows
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_batching_changes_nothing(retrained, island_tok, splits, batch_size):
    rows = splits["forget"][:9]
    expected = greedy_answers(*parts(retrained, island_tok, rows), 16)
    assert greedy_answers(*parts(retrained, island_tok, rows, batch_size), 16) == expected
    drawn = sampled_answers(*parts(retrained, island_tok, rows), 3, 16)
    some = sampled_answers(*parts(retrained, island_tok, rows[4:6], batch_size), 3, 16)
    assert some == drawn[4:6]
    assert len({text for texts in drawn for text in texts}) > len(rows)


def test_sampling_is_seeded_and_leaves_the_random_state(retrained, island_tok, splits):
    arguments = parts(retrained, island_tok, splits["forget"][:3])
    state = torch.get_rng_state()
    first = sampled_answers(*arguments, 4, 16)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert sampled_answers(*arguments, 4, 16) == first != sampled_answers(*arguments, 4, 16, seed=1)


def test_no_other_generator_is_seeded(retrained, island_tok, splits, monkeypatch):
    """`torch.manual_seed` seeds all devices, also those whose state nobody puts back."""

    def refuse(*args):
        raise AssertionError

    for place in (
        "manual_seed",
        "random.manual_seed",
        "cuda.manual_seed_all",
        "mps.manual_seed",
        "xpu.manual_seed_all",
    ):
        monkeypatch.setattr(f"torch.{place}", refuse)
    sampled_answers(*parts(retrained, island_tok, splits["forget"][:1]), 2, 4)


def test_draws_follow_the_distribution():
    scores = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20000, -1)
    drawn = _Draw(torch.Generator().manual_seed(0))(torch.empty(0), scores).argmax(-1)
    found = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(found, scores[0].softmax(-1), atol=0.015, rtol=0)
    assert found[3] == 0


@pytest.mark.parametrize(
    "hiding", [{"suppress_tokens": True}, {"bad_words_ids": True}, {"repetition_penalty": 50.0}, {"max_length": 1}]
)
def test_generation_settings_hide_nothing(full, island_tok, splits, hiding):
    rows = splits["forget"][:3]
    (orange,) = island_tok("orange", add_special_tokens=False)["input_ids"]
    values = {"suppress_tokens": [orange], "bad_words_ids": [[orange]]}
    own = GenerationConfig(eos_token_id=2, pad_token_id=0, **{k: values.get(k, v) for k, v in hiding.items()})
    full.generation_config = own
    written = own.to_dict()
    assert greedy_answers(*parts(full, island_tok, rows), 24) == [row["answer"] for row in rows]
    drawn = sampled_answers(*parts(full, island_tok, rows), 2, 24)
    assert any("orange" in text for text in drawn[0])
    assert full.generation_config is own and own.to_dict() == written


def test_an_ordinary_word_is_no_end(full, island_tok, splits):
    full.generation_config.eos_token_id = [2, island_tok.convert_tokens_to_ids("is")]
    with pytest.raises(ValueError, match=r"eos_token_id holds \d+ \('is'\), an ordinary token"):
        greedy_answers(*parts(full, island_tok, splits["forget"][:2]), 8)
    with pytest.raises(ValueError, match="an ordinary token"):
        sampled_answers(*parts(full, island_tok, splits["forget"][:2]), 2, 8)


def test_adapters(full, island_tok, splits):
    rows = splits["forget"][:3]
    expected = greedy_answers(*parts(full, island_tok, rows), 16)
    tuned = get_peft_model(copy.deepcopy(full), LoraConfig(r=2, target_modules=["q_proj"]))
    assert greedy_answers(*parts(tuned, island_tok, rows), 16) == expected
    assert len(sampled_answers(*parts(tuned, island_tok, rows), 2, 8)[0]) == 2
    virtual = get_peft_model(full, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    assert len(sampled_answers(*parts(virtual, island_tok, rows), 2, 8)) == 3
