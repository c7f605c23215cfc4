"""What the card of an unlearned model admits, and publishing it with the adapter merged."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ext import FlatConfig, FlatTrainer, UnlearnConfig, UnlearnTrainer, evaluate_unlearning
from hf_ext.metrics.unlearning import PromptFormat, UnlearningReport
from hf_ext.model_cards import build_card, save, validate
from hf_ext.registry import FLAT
from tests.conftest import make_tiny_llama
from tests.model_cards.test_card import row, section
from tests.model_cards.tiny import AUTHOR, lora_model, tiny_tokenizer

FACTS = {"base_model": "user/tiny-base", "license": "mit"}
SPLITS = {
    "forget": [{"prompt": "a b", "answer": "c"}, {"prompt": "d e", "answer": "f"}],
    "retain": [{"prompt": "g h", "answer": "i"}, {"prompt": "j k", "answer": "l"}],
}
ATTACKS = {"adapter_off": {}, "quantization": {"bits": (4,)}, "relearning": {"steps": (1, 2)}}


def trained(folder, loss_type="flat", adapter=True):
    """A trainer that has made one step."""
    kind, config = (FlatTrainer, FlatConfig) if loss_type == "flat" else (UnlearnTrainer, UnlearnConfig)
    trainer = kind(
        make_tiny_llama(),
        config(str(folder), loss_type=loss_type, max_steps=1, report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a b", "completion": " c"}] * 2),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if adapter else None,
    )
    trainer.train()
    return trainer


def measured(model, retrained=None) -> UnlearningReport:
    return evaluate_unlearning(
        model, tiny_tokenizer(), SPLITS, retrained, attacks=ATTACKS, max_new_tokens=2, format=PromptFormat()
    )


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def report(trainer):
    return measured(trainer.model, make_tiny_llama(seed=1))


def test_an_adapter_is_warned_about(trainer, report):
    card = build_card(trainer, metrics=report, evaluated_on="two questions", **FACTS)
    text = section(card, "Unlearning")
    assert "**This adapter can be switched off, and what was forgotten is back.**" in text
    assert "merged=True" in text and "save_merged" in text
    found = {finding.rule for finding in validate(card).warnings}
    assert found == {*AUTHOR, "section-training-data", "snippet-not-run", "unlearned-adapter"}
    assert validate(card).errors == []
    for limit in FLAT.limits:
        assert f"FLAT: {limit}" in section(card, "Bias, risks and limitations")
    assert {"flat", "unlearning", "lora"} < set(card.data.tags) and "dpo" not in card.data.tags
    assert str(ModelCard(str(card))) == str(card) and "\n\n\n" not in card.text


def test_numbers_of_the_report_are_in_the_section(trainer, report):
    card = build_card(trainer, metrics=report, **FACTS)
    text = section(card, "Unlearning")
    for label, name in {
        "answers to forget, ROUGE-L": "forget_Q_A_ROUGE",
        "answers to keep (retain), ROUGE-L": "retain_Q_A_ROUGE",
        "answers to forget, ROUGE-L, after rounding to 4 bits": "4bit/forget_Q_A_ROUGE",
        "answers to forget, ROUGE-L, with the adapter switched off": "adapter_off/forget_Q_A_ROUGE",
        "exact memorization of one half while the other half is learnt again, mean over 2 steps": "relearning",
    }.items():
        beside = report.retrained.get(name)
        other = "–" if beside is None else f"{beside['agg_value']:.3g}"
        assert row(card, label) == f"{report.metrics[name]:.3g} | {other}"
    assert "retrained model never saw" in text
    missing = "paraphrased prompts, in context, sampling, gradient norm"
    assert f"Attacks that were not made: {missing}." in text
    assert report.table() in section(card, "Evaluation")


def test_without_a_retrained_model_the_card_says_so(trainer):
    text = section(build_card(trainer, metrics=measured(trainer.model), **FACTS), "Unlearning")
    assert "No retrained model was given" in text and "| measured | this model |\n" in text


@pytest.mark.parametrize("metrics", [None, {"accuracy": 0.5}])
def test_unmeasured_forgetting_counts_as_none(trainer, metrics):
    text = section(build_card(trainer, metrics=metrics, **FACTS), "Unlearning")
    assert "Forgetting was not measured." in text
    assert "in context, sampling, relearning, gradient norm." in text


def test_merged_weights_are_saved_and_described(trainer, report, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*unlearned-adapter")
        save(trainer, tmp_path / "out", merged=True, metrics=report, **FACTS)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert not any("adapter" in name for name in files)
    tokens = torch.arange(3, 11)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = trainer.model.eval()(tokens).logits
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    with trainer.model.disable_adapter():
        assert not torch.allclose(trainer.model(tokens).logits, expected, atol=1e-3)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model == "user/tiny-base"
    assert "AutoModelForCausalLM.from_pretrained(name)" in card.text
    text = section(card, "Unlearning")
    assert "merged into these weights, so it cannot be switched off here" in text
    assert "what\nthe weights knew without it, before the merge" in text
    assert "`FlatTrainer`, 1 optimizer steps" in card.text
    assert row(card, "Adapter, merged into the weights").startswith("LORA`: `r` 8, ")
    assert int(row(card, "Parameters in all").replace(",", "")) == make_tiny_llama().num_parameters()
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))


def test_another_loss_is_named_and_cited(tmp_path):
    card = build_card(trained(tmp_path, "npo"), **FACTS)
    assert "# NPO adapter for user/tiny-base" in card.text
    assert "https://huggingface.co/papers/2404.05868" in section(card, "Method")
    assert "eprint        = {2404.05868}" in section(card, "Citation")
    assert {"npo", "unlearning"} < set(card.data.tags) and not {"flat", "dpo"} & set(card.data.tags)
    assert f"NPO: {FLAT.limits[0]}" in section(card, "Bias, risks and limitations")


def test_a_model_without_an_adapter(tmp_path):
    text = section(build_card(trained(tmp_path, adapter=False), **FACTS), "Unlearning")
    assert "adapter" not in text and "Whoever has the model from before still has what was forgotten." in text
    assert "Attacks that were not made: quantization, " in text


def test_a_reloaded_model_is_recognised_by_method_or_report(report):
    for arguments in ({"method": "flat"}, {"metrics": report}):
        card = build_card(make_tiny_llama(), **arguments, **FACTS)
        assert "unlearning" in card.data.tags and section(card, "Unlearning").strip()
    assert "## Unlearning" not in build_card(lora_model(), **FACTS).text


def test_what_cannot_be_merged():
    quantised = lora_model()
    quantised.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    prompts = get_peft_model(make_tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for model, message in (
        (make_tiny_llama(), "has no adapter to merge"),
        (prompts, "prompt learning adds no weights"),
        (quantised, "the base is quantised"),
    ):
        with pytest.raises(ValueError, match=f"merged=True.*{re.escape(message)}"):
            build_card(model, merged=True, **FACTS)
