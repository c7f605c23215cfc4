"""What a card says about LoRA, RoseLoRA and full models, and about training runs."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ext import BaftConfig, LorVpConfig, NeatConfig, _compat, disaggregate
from hf_ext.model_cards import build_card, score, validate
from hf_ext.model_cards.rules.sections import SECTIONS
from hf_ext.registry import METHODS, OVERTONE, ROSELORA
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import AUTHOR, BASE, MEASURED, WORDS, lora_model, roselora_model, tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden" / "lora.md"
HEADINGS = (
    "Model details",
    "Method",
    "Uses",
    "How to get started with the model",
    "Training details",
    "Evaluation",
    "Bias, risks and limitations",
    "Environmental impact",
    "Technical specifications",
)


def row(card: ModelCard, name: str) -> str:
    """The value of a table row."""
    found = re.search(rf"^\| `?{re.escape(name)}`? \| `?(.*?)`? \|$", card.text, re.MULTILINE)
    assert found, f"no row {name!r} in\n{card.text}"
    return found[1]


def rules(card: ModelCard) -> set[str]:
    assert validate(card).errors == []
    return {finding.rule for finding in validate(card).warnings}


def section(card: ModelCard, heading: str) -> str:
    return card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def given_card() -> ModelCard:
    """Of a LoRA adapter whose author has said everything."""
    return build_card(
        lora_model(r=4, lora_alpha=16),
        base_model="user/tiny-base",
        license="mit",
        language="en",
        datasets="user/facts",
        metrics={"efficacy (teacher-forced)": 0.75, "locality (teacher-forced)": float("nan")},
        evaluated_on="user/probe@abc",
        **WORDS,
        developers="Two people",
        contact="Open an issue.",
        extra_sections={"History": "None yet."},
    )


def without_versions(card: ModelCard) -> str:
    return re.sub(r"(?m)^(- [\w-]+) \d\S*$", r"\1 VERSION", str(card))


@pytest.fixture(scope="module")
def lora_card():
    return given_card()


def test_the_golden_card(lora_card):
    """Whole, but for versions. After a change that is meant, `python -m tests.model_cards.test_card` renews it: read the difference."""
    assert without_versions(lora_card) == GOLDEN.read_text(encoding="utf-8")


DETAILS, CAVEATS = "model details", "caveats and recommendations"


def test_every_section_is_filled_and_nothing_is_a_placeholder(lora_card):
    for card, stated in (
        (lora_card, {section.name for section in SECTIONS}),
        (build_card(lora_model()), {DETAILS}),
        (build_card(roselora_model()), {DETAILS, CAVEATS}),
        (build_card(make_tiny_llama()), {DETAILS}),
    ):
        for heading in HEADINGS:
            assert section(card, heading).strip()
        assert "More Information Needed" not in card.text and "None" not in card.text.replace("None yet", "")
        found = score(card)
        assert all(found.values()) and found.stated == stated
        assert str(found) == f"9 of 9 sections are there, {len(stated)} stated"
        assert validate(card).errors == []
        assert str(ModelCard(str(card))) == str(card)
        assert "\n\n\n" not in card.text


def test_lora_metadata(lora_card):
    data = lora_card.data.to_dict()
    assert data["base_model"] == "user/tiny-base" and data["library_name"] == "peft"
    assert (data["license"], data["language"], data["datasets"]) == ("mit", "en", ["user/facts"])
    assert data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["hf_ext", "lora", "base_model:adapter:user/tiny-base"]
    assert rules(lora_card) == {"no-interval", "snippet-not-run"}


def test_results_are_in_text_and_metadata(lora_card):
    assert row(lora_card, "efficacy (teacher-forced)") == "0.75"
    assert row(lora_card, "locality (teacher-forced)") == "nan"
    (result,) = lora_card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("efficacy (teacher-forced)", 0.75)
    assert (result.dataset_type, result.task_type) == ("user/probe", "text-generation")
    assert result.dataset_revision == "abc"
    assert "[user/probe](https://huggingface.co/datasets/user/probe) (revision `abc`)" in lora_card.text


def test_results_on_unnamed_data_stay_out_of_the_metadata():
    card = build_card(lora_model(), metrics={"accuracy": 1})
    assert card.data.eval_results is None
    assert "The evaluation data was not named." in section(card, "Evaluation")


def test_report_objects_bring_their_own_table():
    class Report:
        metrics = MappingProxyType({"accuracy": 0.5})

        def table(self):
            return "| accuracy | 0.5 ± 0.1 |"

    card = build_card(lora_model(), metrics=Report(), evaluated_on="Held-out facts, 2026")
    assert "0.5 ± 0.1" in card.text
    assert card.data.eval_results[0].dataset_type == "held_out_facts_2026"


def test_results_by_group():
    """Every group is a metric of its own in the metadata: the Hub keeps the arguments of one data set only."""
    languages = ["en"] * 60 + ["sw"] * 40
    report = disaggregate([1] * 90 + [0] * 10, [1] * 100, {"language": languages, "device": ["phone", "laptop"] * 50})
    card = build_card(
        lora_model(), base_model=BASE, license="mit", metrics=report, evaluated_on="you/probe@abc", **WORDS
    )
    card = ModelCard(str(card))
    told = {result.metric_name: result for result in card.data.eval_results}
    assert set(told) == set(report.metrics) and told["accuracy (language=sw)"].metric_value == 0.75
    assert {result.metric_type for result in told.values()} == {"accuracy"}
    arguments = told["accuracy (language=sw)"].metric_args
    assert arguments["group"] == {"language": "sw"} and arguments["n"] == 40 and len(arguments["ci95"]) == 2
    text = section(card, "Evaluation")
    assert "- language: en (60), sw (40)" in text and "Wilson" in text
    assert text.index("#### One factor at a time") < text.index("#### Combinations of factors")
    assert "| language=sw, device=phone | 20 | accuracy | n too small |" in text
    assert rules(card) == {"section-training-data", "snippet-not-run"}


def test_text_given_by_the_author(lora_card):
    assert "Tests of model cards." in section(lora_card, "Uses")
    assert "- Knows nothing." in section(lora_card, "Bias, risks and limitations")
    assert section(lora_card, "Contact").strip() == "Open an issue.\n\n<!-- hf_ext:end card -->"
    assert section(lora_card, "History").strip() == "None yet."
    assert row(lora_card, "Developed by") == "Two people"


def test_adapter_facts(lora_card):
    assert (row(lora_card, "r"), row(lora_card, "lora_alpha")) == ("4", "16")
    assert row(lora_card, "target_modules") == "q_proj, v_proj"
    # Two layers; q_proj 64 -> 64 and v_proj 64 -> 32, rank 4.
    assert row(lora_card, "Parameters of the adapter").startswith(f"{2 * 4 * (64 + 64 + 64 + 32):,} ")


def test_snippet_uses_the_repository_id():
    code = section(
        build_card(lora_model(), base_model="user/b", repo_id="user/a"), "How to get started with the model"
    )
    assert 'name = "user/a"' in code and 'from_pretrained("user/b")' in code and "import hf_ext" not in code


def test_what_cards_say_of_exports_exists():
    for method in METHODS:
        if method.lora_export:
            module, _, name = method.lora_export.rpartition(".")
            assert callable(getattr(importlib.import_module(module), name))
    baft = get_peft_model(make_tiny_llama(), BaftConfig())
    assert "LoRA adapter with the same outputs" not in str(build_card(baft))


def test_the_snippet_of_a_prompted_image_model_runs(tmp_path, monkeypatch):
    """The classifier of the base has other classes than the one that is saved with the prompt."""
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    ViTForImageClassification(ViTConfig(**small, num_labels=7)).save_pretrained(tmp_path / "user" / "base")
    options = {"num_labels": 3, "ignore_mismatched_sizes": True}
    base = ViTForImageClassification.from_pretrained(tmp_path / "user" / "base", **options)
    model = get_peft_model(base, LorVpConfig(pixel_scale=2.0, init_weights=False)).eval()
    card = build_card(model, base_model="user/base")
    assert card.data.pipeline_tag == "image-classification" and "lorvp" in card.data.tags
    model.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = section(card, "How to get started with the model").split("```python")[1].split("```")[0]
    found: dict = {}
    exec(code, found)
    pixels = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(found["model"].eval()(pixel_values=pixels).logits, model(pixel_values=pixels).logits)


def test_roselora_card():
    card = build_card(roselora_model(sparsity=0.9), base_model="user/tiny-base")
    assert card.data.tags == ["hf_ext", "roselora", "base_model:adapter:user/tiny-base"]
    assert "import hf_ext" in section(card, "How to get started with the model")
    assert "save_as_lora" in section(card, "How to get started with the model")
    neat = get_peft_model(make_tiny_llama(), NeatConfig(target_modules=["q_proj"]))
    assert "hf_ext.tuners.neat.save_as_lora" in section(build_card(neat), "How to get started with the model")
    assert ROSELORA.paper_url in section(card, "Method") and ROSELORA.changes in section(card, "Method")
    assert ROSELORA.citation in section(card, "Citation")
    for limit in ROSELORA.limits:
        assert limit in section(card, "Bias, risks and limitations")
    assert (row(card, "sparsity"), row(card, "beta")) == ("0.9", "0.8")
    assert "of 8,192 entries" in row(card, "Weights the merged adapter changes")


def test_method_by_name():
    card = build_card(lora_model(), method=["roselora", "overtone"])
    assert {"roselora", "overtone"} < set(card.data.tags)
    assert OVERTONE.arxiv in card.text and ROSELORA.arxiv in card.text
    with pytest.raises(ValueError, match=r"method='none'.*roselora"):
        build_card(lora_model(), method="none")


def test_method_is_found_from_trainer_tags(tmp_path):
    class TaggedTrainer(Trainer):
        _tag_names = ("overtone",)

    trainer = TaggedTrainer(lora_model(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    assert "overtone" in build_card(trainer).data.tags


def test_full_model():
    card = build_card(make_tiny_llama(), license="mit")
    assert card.data.library_name == "transformers"
    assert "AutoModelForCausalLM.from_pretrained(name)" in card.text


def test_injected_adapter():
    from peft import LoraConfig

    model = make_tiny_llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    card = build_card(model, base_model="user/tiny-base")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"


def test_local_base_is_described_by_digest_and_never_by_path(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "secret-place")
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "secret-place")
    card = build_card(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")))
    assert str(tmp_path) not in str(card) and "secret-place" not in str(card)
    weights = tmp_path / "secret-place" / "model.safetensors"
    digest = subprocess.run(["sha256sum", weights], capture_output=True, text=True, check=True).stdout.split()[0]
    assert row(card, "Base model") == f"local checkpoint, sha256 `{digest}"
    assert "base_model" not in card.data.to_dict()
    assert {"no-license", "no-base-model"} <= rules(card)


def test_licence_of_a_local_base_is_taken_over(tmp_path):
    from peft import LoraConfig, get_peft_model

    make_tiny_llama().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), LoraConfig(task_type="CAUSAL_LM"))
    data = build_card(model).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "x", "LICENSE")
    assert build_card(model, license="mit").data.license == "mit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_model": "/home/x/model"}, "base_model='/home/x/model' is not a Hub id"),
        ({"metrics": {"accuracy": "high"}}, r"metrics\['accuracy'\]='high' is not a number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_card(lora_model(), **arguments)


def test_wrong_kind_of_model():
    with pytest.raises(ValueError, match="model_or_trainer is a Linear"):
        build_card(torch.nn.Linear(2, 2))


def test_sft_run(tmp_path):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}] * 4)
    arguments = SFTConfig(
        str(tmp_path / "secret-run"),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=3e-4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        hub_token="hf_" + "a" * 34,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(
        make_tiny_llama(),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    trainer.train()
    card = build_card(trainer, base_model="user/tiny-base", license="mit")
    procedure = section(card, "Training details")
    assert "`SFTTrainer`, 2 optimizer steps (1 epochs), 2 sequences per step" in procedure
    assert "optimizer AdamW, seed 42" in procedure and "last logged training loss: " in procedure
    fingerprint = _compat.dataset_fingerprint(trainer.train_dataset)
    assert f"Training rows: 4, fingerprint `{fingerprint}` as the trainer read them." in procedure
    assert (row(card, "learning_rate"), row(card, "lr_scheduler_type")) == ("0.0003", "linear")
    assert float(row(card, "loss")) > 0
    assert {"trl", "sft"} < set(card.data.tags)
    assert "CPU" in section(card, "Environmental impact") and "Training time" in section(card, "Environmental impact")
    assert "secret-run" not in str(card) and "hf_a" not in str(card)
    told = card.data.to_dict()
    assert "Tokens seen: " in procedure and "Throughput: " in procedure
    # The loss was measured, on rows whose origin nobody named.
    assert "model-index" not in told and "loss, entropy, mean_token_accuracy, num_tokens. No uncertainty" in section(
        card, "Evaluation"
    )
    missing = {"section-evaluation-data", "section-training-data", "section-caveats-and-recommendations"}
    assert rules(card) == {*AUTHOR, *missing, "snippet-not-run"}
    assert score(card).stated == {DETAILS, "metrics", "quantitative analyses"}
    assert len(score(build_card(trainer, base_model="user/tiny-base", **WORDS, **MEASURED)).stated) == 9


def test_overtone_run_with_an_editing_report(tmp_path):
    from datasets import Dataset

    from hf_ext import OvertoneConfig, OvertoneTrainer
    from hf_ext.metrics.editing.report import EditingReport

    rows = Dataset.from_list([{"prompt": "a b", "completion": " c d"}] * 2)
    arguments = OvertoneConfig(str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, bf16=False)
    model = roselora_model()
    trainer = OvertoneTrainer(model, arguments, train_dataset=rows, processing_class=tiny_tokenizer())
    trainer.train()
    scores = {"final": {"generate_exact": {"reliability": {"rewrite": [1.0]}}}}
    report = EditingReport({"protocols": ["generate_exact"], "answer_policy": "any"}, [{"id": "1", "scores": scores}])
    card = build_card(trainer, base_model="user/tiny-base", license="mit", metrics=report, evaluated_on="one edit")
    assert {"roselora", "overtone"} < set(card.data.tags)
    assert "`OvertoneTrainer`" in section(card, "Training details")
    assert row(card, "stop_when_saturated") in ("True", "False")
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value) == ("reliability/generate_exact", 1.0)
    assert result.metric_type == "reliability_generate_exact"
    assert report.table() in card.text
    assert OVERTONE.citation in card.text and ROSELORA.citation in card.text
    assert rules(card) == {*AUTHOR, "section-training-data", "snippet-not-run"}


if __name__ == "__main__":
    GOLDEN.write_text(without_versions(given_card()), encoding="utf-8")
