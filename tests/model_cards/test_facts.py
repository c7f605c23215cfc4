"""What a card states is what is published: counts, commits, classes and results of these weights."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_ext.model_cards import build_card, save, validate
from hf_ext.model_cards.facts.base_model import identify
from tests.conftest import make_tiny_llama
from tests.model_cards.test_card import row
from tests.model_cards.tiny import lora_model

BASE_PARAMETERS = sum(parameter.numel() for parameter in make_tiny_llama().parameters())


def count(text: str) -> int:
    return int(text.split()[0].replace(",", ""))


def test_other_adapters_are_not_counted():
    model = lora_model(r=4)
    model.add_adapter("second", LoraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    card = build_card(model, base_model="user/base")
    own = count(row(card, "Parameters of the adapter"))
    assert count(row(card, "Parameters in all")) == BASE_PARAMETERS + own
    assert f"{own / BASE_PARAMETERS:.2%} of the base model's" in card.text
    assert count(row(build_card(model, merged=True), "Parameters in all")) == BASE_PARAMETERS


def test_a_prompt_is_counted_once():
    model = get_peft_model(make_tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert count(row(build_card(model), "Parameters in all")) == BASE_PARAMETERS + 4 * 64


def test_a_quantised_base_has_all_its_parameters(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    card = build_card(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])))
    assert count(row(card, "Parameters in all")) == BASE_PARAMETERS + count(row(card, "Parameters of the adapter"))


def test_adapted_embeddings_are_saved_and_counted(tmp_path):
    folder = save(lora_model(target_modules=["embed_tokens"]), tmp_path / "adapter", base_model="user/base")
    assert "adapter-size" not in {finding.rule for finding in validate(folder).warnings}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the Hub with two commits of user/base, of which main is the second."""
    root = tmp_path / "models--user--base"
    for commit, names in (("a" * 40, ["v1"]), ("b" * 40, ["main"])):
        (root / "snapshots" / commit).mkdir(parents=True)
        (root / "snapshots" / commit / "config.json").write_text("{}")
        (root / "refs").mkdir(exist_ok=True)
        for name in names:
            (root / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return root


def test_a_commit_is_stated_only_if_it_was_loaded(cache):
    assert identify("user/base").commit is None
    assert identify("user/base", "v1").commit == "a" * 40
    assert identify(None, None, "user/base").commit is None
    snapshot = str(cache / "snapshots" / ("a" * 40))
    assert identify(snapshot).commit == "a" * 40 and identify(snapshot).id == "user/base"
    other = identify(snapshot, None, "user/other")
    assert (other.id, other.commit) == ("user/other", None)


def test_a_local_copy_says_so(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), LoraConfig(task_type="CAUSAL_LM"))
    told = row(build_card(model, base_model="user/base"), "Base model")
    assert re.fullmatch(r"\[user/base\]\(\S+\), from a local copy with sha256 `[0-9a-f]{64}", told)


TINY = dict(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)


@pytest.mark.parametrize(
    ("make", "auto_class", "task"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "AutoModelForSeq2SeqLM",
            None,
        ),
        (
            lambda: BertForMaskedLM(
                BertConfig(
                    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
                )
            ),
            "AutoModelForMaskedLM",
            "fill-mask",
        ),
        (
            lambda: WhisperForConditionalGeneration(
                WhisperConfig(
                    **TINY, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0
                )
            ),
            "AutoModelForSpeechSeq2Seq",
            "automatic-speech-recognition",
        ),
    ],
    ids=["T5", "BERT", "Whisper"],
)
def test_the_class_that_loads_it(make, auto_class, task):
    card = build_card(make())
    assert f"model = {auto_class}.from_pretrained(name)" in card.text and card.data.pipeline_tag == task


def trainer(folder, rows=6, **options) -> Trainer:
    data = [{"input_ids": torch.arange(4) + n, "labels": torch.arange(4) + n} for n in range(rows)]
    arguments = TrainingArguments(str(folder), report_to=[], use_cpu=True, max_steps=3, learning_rate=1.0, **options)
    return Trainer(make_tiny_llama(), arguments, train_dataset=data, eval_dataset=data)


def test_results_of_the_checkpoint_that_was_loaded(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    run = trainer(tmp_path, load_best_model_at_end=True, **every)
    run.train()
    assert run.state.best_global_step < 3, "the best one is not the last one, or the test shows nothing"
    assert float(row(build_card(run), "loss")) == pytest.approx(run.state.best_metric, rel=1e-3)


def test_rows_of_other_data_are_not_those_of_the_trainer(tmp_path):
    run = trainer(tmp_path)
    run.train()
    run.evaluate(run.eval_dataset[:2] * 20)
    text = build_card(run).text
    assert "Rows: 6." not in text.split("### Testing data")[1].split("###")[0]


def test_several_evaluation_sets(tmp_path):
    run = trainer(tmp_path)
    run.eval_dataset = {"a": run.eval_dataset, "b": run.eval_dataset[:2]}
    run.train()
    run.evaluate()
    card = build_card(run)
    assert float(row(card, "a_loss")) > 0 and float(row(card, "b_loss")) > 0 and "Rows: 2." not in card.text


def test_nothing_says_that_an_untouched_model_was_tuned():
    card = build_card(make_tiny_llama())
    assert card.text.count("fine-tuned") == 0 and "# LlamaForCausalLM\n" in card.text


def test_line_breaks_do_not_break_tables():
    card = build_card(lora_model(), developers="Two\npeople", metrics={"a\nb": 1.0})
    assert row(card, "Developed by") == "Two people" and row(card, "a b") == "1"
