"""Our trainers leave the whole card wherever TRL leaves one, and PEFT's template never covers it."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from hf_ext.model_cards import validate
from hf_ext.trainers.cards import CardMixin, SFTTrainer
from tests.conftest import make_tiny_llama
from tests.trainers.overtone.helpers import make_trainer


@pytest.fixture
def trainer(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "secret")
    trainer = make_trainer(
        tmp_path / "run",
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "secret"),
        peft_config=LoraConfig(target_modules=["q_proj"]),
        overrides={"max_steps": 1, "save_strategy": "steps", "save_steps": 1},
    )
    trainer.train()
    return trainer


def read(folder) -> str:
    return (folder / "README.md").read_text()


def test_saving_again_keeps_our_card_and_what_people_wrote(trainer, tmp_path):
    folder = tmp_path / "run"
    trainer.save_model()
    assert "hf_ext:begin card" in read(folder) and "secret" not in read(folder) and validate(folder).errors == []
    (folder / "README.md").write_text(read(folder) + "\nOur note.\n")
    for _ in range(2):
        trainer.save_model()
        text = read(folder)
        assert text.endswith("\nOur note.\n") and text.count("hf_ext:begin card") == 1
        assert "Framework versions" not in text and "secret" not in text and "More Information Needed" not in text
    trainer.save_model(str(tmp_path / "other"))
    assert "1 optimizer steps" in read(tmp_path / "other")


def test_arguments_of_the_card(trainer, tmp_path):
    trainer.create_model_card("mine", "you/facts", "a-tag", license="mit", intended_use="Tests.")
    card = ModelCard.load(tmp_path / "run" / "README.md")
    assert (card.data.license, card.data.datasets, card.data.model_name) == ("mit", ["you/facts"], "mine")
    assert {"a-tag", "overtone", "lora"} <= set(card.data.tags) and "Tests." in card.text


def test_a_card_that_cannot_be_built_does_not_lose_the_model(trainer, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "README.md").write_text("---\n---\n<!-- hf_ext:end card -->\n")
    with pytest.warns(UserWarning, match="no card was written into .*broken"):
        trainer.save_model(str(tmp_path / "broken"))
    assert (tmp_path / "broken" / "adapter_model.safetensors").is_file()


def test_a_card_that_cannot_be_read_stays(tmp_path):
    text = "---\nmodel-index: 5\n---\nOurs.\n"
    trainer = make_trainer(tmp_path / "run", model=make_tiny_llama())
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "README.md").write_text(text)
    with pytest.warns(UserWarning, match="no card was written into .*saved: the metadata cannot be read"):
        trainer.save_model(str(tmp_path / "saved"))
    assert read(tmp_path / "saved") == text and (tmp_path / "saved" / "model.safetensors").is_file()


def test_every_trainer_has_it():
    from hf_ext import AdaptiveSVDTrainer, BaftTrainer, FlatTrainer, OvertoneTrainer, RoseRAGTrainer, UnlearnTrainer

    for cls in (
        AdaptiveSVDTrainer,
        BaftTrainer,
        FlatTrainer,
        OvertoneTrainer,
        RoseRAGTrainer,
        UnlearnTrainer,
        SFTTrainer,
    ):
        assert issubclass(cls, CardMixin)
