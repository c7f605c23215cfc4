"""The contract of the host library: adapters, quantised bases, low precision, saving, resuming, cards, data."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOTrainer

from hf_ext.model_cards import validate
from hf_ext.registry import FLAT
from hf_ext.trainers.flat import FlatTrainer
from hf_ext.trainers.flat.methods import METHODS
from tests.conftest import make_tiny_llama
from tests.trainers.flat.helpers import make_preference, make_retain, make_trainer, random_adapter, trained
from tests.trainers.helpers import column, largest_difference, lora, make_tokenizer, quantised_llama, weights


@pytest.mark.parametrize("name", ["flat", "npo", "undial", "rmu"])
def test_wrapped_model_keeps_exactly_its_adapters(tmp_path, name):
    model = random_adapter(get_peft_model(make_tiny_llama(), lora()))
    model.add_adapter("other", lora())
    names = {key for key, _ in model.named_parameters()}
    before = weights(model)
    trainer = make_trainer(tmp_path, model, overrides={"loss_type": name, "max_steps": 2})
    assert {key for key, _ in trainer.model.named_parameters()} == names
    assert set(trainer.model.peft_config) == {"default", "other"}
    trainer.train()
    changed = {key for key, value in weights(trainer.model).items() if not torch.equal(value, before[key])}
    assert changed and all(".default." in key for key in changed)


@pytest.mark.parametrize("config", [lora(), IA3Config(task_type="CAUSAL_LM"), lora(modules_to_save=["lm_head"])])
def test_adapters_save_load_and_merge(tmp_path, config):
    overrides = {"activation_checkpointing": True}
    trainer = trained(tmp_path, overrides=overrides, peft_config=config, trainer_class=FlatTrainer)
    before = weights(trainer.model)
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.save_merged(str(tmp_path / "merged"))
    assert largest_difference(weights(trainer.model), before) == 0
    assert isinstance(trainer.model, PeftModel)
    ids = torch.tensor([[5, 6, 7, 8]])
    truth = trainer.model.eval()(ids).logits
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(ids).logits, truth)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not list((tmp_path / "merged").glob("adapter*"))
    torch.testing.assert_close(merged.eval()(ids).logits, truth, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("w1")["input_ids"] == [5]
    trainer.train()


@pytest.mark.parametrize("name", ["undial", "rmu"])
def test_prompt_learning_with_hidden_states(tmp_path, name):
    prompt = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    common = dict(overrides={"loss_type": name, "retain_coef": 1.0}, retain_dataset=make_retain())
    trained(tmp_path, peft_config=prompt, **common)


def test_adapter_on_the_head_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["lm_head"]))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(tmp_path, bits):
    model = quantised_llama(tmp_path / "base", bits)
    overrides = {"max_steps": 6, "loss_type": "undial", "retain_coef": 1.0, "retain_loss": "kl"}
    trainer = trained(tmp_path, model=model, peft_config=lora(), overrides=overrides, retain_dataset=make_retain())
    assert column(trainer, "loss/forget")[-1] < column(trainer, "loss/forget")[0]
    flat = trained(tmp_path, model=trainer.model.unload(), peft_config=lora(), overrides={"max_steps": 2})
    with pytest.raises(ValueError, match="the base is quantised: merging would round"):
        flat.save_merged(str(tmp_path / "merged"))


@pytest.mark.parametrize("options", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "bf16 weights"])
@pytest.mark.parametrize("name", ["flat", "undial"])
def test_bfloat16(tmp_path, name, options):
    overrides = {"loss_type": name, "retain_coef": 1.0, "max_steps": 8, "learning_rate": 1e-3}
    exact = trained(tmp_path, overrides=overrides, retain_dataset=make_retain())
    model = make_tiny_llama().to(options.get("dtype", torch.float32))
    overrides["bf16"] = options.get("bf16", False)
    rounded = trained(tmp_path, model=model, overrides=overrides, retain_dataset=make_retain())
    assert column(rounded, "loss") == pytest.approx(column(exact, "loss"), rel=0.02)
    assert column(rounded, "loss")[-1] < column(rounded, "loss")[0]


@pytest.mark.parametrize("name", ["flat", "npo", "rmu"])
def test_resuming_gives_the_same_run(tmp_path, name):
    overrides = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "constant",
        "loss_type": name,
    }
    if name == "flat":
        overrides["templates_per_example"] = 3
    common = dict(overrides=overrides, retain_dataset=make_retain())
    whole = trained(tmp_path / "run", **common)
    resumed = make_trainer(tmp_path / "again", **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert largest_difference(weights(whole.model), weights(resumed.model)) < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert largest_difference(weights(whole.model), weights(loaded)) < 1e-6


def test_card_names_the_paper(tmp_path):
    trainer = make_trainer(tmp_path / "run", trainer_class=FlatTrainer)
    trainer.create_model_card("run")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "2410.11143" in card and "FLAT" in card and "unlearning" in card
    assert trainer._paper["citation"] == FLAT.citation in card and FLAT.slug in trainer.model.model_tags


@pytest.mark.parametrize("name", METHODS)
def test_card_names_the_paper_of_the_loss(tmp_path, name):
    trainer = make_trainer(tmp_path, overrides={"loss_type": name, "retain_coef": 1.0}, retain_dataset=make_retain())
    trainer.create_model_card("run")
    card, method = (tmp_path / "README.md").read_text(), METHODS[name]
    link = f"[{method.paper.title}](https://huggingface.co/papers/{method.paper.id})"
    assert (
        f"**{method.name}** ({link})" in card and f"eprint        = {{{method.paper.id}}}" in card
    ) or name == "flat"
    others = {other.paper.id for other in METHODS.values()} | {DPOTrainer._paper["id"]}
    assert not [paper for paper in others - {method.paper.id} if paper in card]
    assert {"trl", "hf-ext", "unlearning", name} == set(trainer.model.model_tags)
    assert all(f"- {tag}\n" in card for tag in trainer.model.model_tags) and validate(card).errors == []


def test_epochs_reach_the_collator(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, overrides={"max_steps": 5, "templates_per_example": 2})
    collate = trainer.data_collator.set_epoch
    trainer.data_collator.set_epoch = lambda epoch: (seen.append(epoch), collate(epoch))
    trainer.train()
    assert seen == [0, 1, 2]


def test_preference_data_trains_and_own_collators_are_used(tmp_path):
    trainer = make_trainer(tmp_path, data=make_preference(), overrides={"template_answers": None})
    calls = []

    def collate(examples):
        calls.append(len(examples))
        return trainer.data_collator(examples)

    other = make_trainer(tmp_path, data=make_preference(), overrides={"template_answers": None}, data_collator=collate)
    trainer.train()
    other.train()
    assert calls and column(other, "loss") == pytest.approx(column(trainer, "loss"), rel=1e-6)


def test_default_arguments_name_the_run_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL trains in bfloat16 unless told otherwise, and transformers asks for a GPU then.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = make_tiny_llama()
    model.config.name_or_path = "someone/tiny"
    data = Dataset.from_list([{"prompt": "w1 ", "completion": "w2"}])
    trainer = FlatTrainer(model, train_dataset=data, processing_class=make_tokenizer())
    assert trainer.args.output_dir == "tiny-FLAT"
