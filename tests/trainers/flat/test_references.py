"""The model before unlearning: what is computed of it, when, and which arguments have no use for it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM
from trl import DPOConfig

from hf_ext.trainers.flat import FlatTrainer, UnlearnTrainer
from tests.conftest import make_tiny_llama
from tests.trainers.flat.helpers import (
    batch_of,
    loss_of,
    make_args,
    make_forget,
    make_retain,
    make_trainer,
    random_adapter,
    trained,
)
from tests.trainers.helpers import column, largest_difference, lora, weights


def count_forwards(model) -> list[int]:
    calls: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", ["flat", "gradient_ascent", "simnpo", "wga", "satimp", "ceu"])
def test_nothing_but_the_policy_runs(tmp_path, name):
    model = make_tiny_llama()
    calls = count_forwards(model)
    trainer = make_trainer(tmp_path, model, overrides={"loss_type": name, "max_steps": 3})
    assert trainer.ref_model is None and not calls
    trainer.train()
    assert len(calls) == 3


def test_no_reference_is_loaded_for_a_model_by_name(tmp_path, monkeypatch):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    built = []
    start = LlamaForCausalLM.__init__
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda self, *a, **k: built.append(1) or start(self, *a, **k))
    trainer = make_trainer(tmp_path, str(tmp_path / "base"))
    assert trainer.ref_model is None and len(built) == 1
    trainer.train()
    assert len(built) == 1


def test_npo_computes_its_reference_once(tmp_path):
    model = make_tiny_llama()
    calls = count_forwards(model)
    overrides = {"loss_type": "npo", "max_steps": 3, "precompute_ref_batch_size": 8}
    trainer = make_trainer(tmp_path, model, overrides=overrides, eval_dataset=make_forget(4))
    assert trainer.ref_model is None and not calls
    trainer.train()
    # One pass over eight forget rows and one over four rows for evaluation.
    assert len(calls) == 3 + 2
    trainer.train()
    assert len(calls) == 2 * 3 + 2
    fresh = make_tiny_llama()
    stored = trainer.train_dataset[1]
    ids = torch.tensor([stored["prompt_ids"] + stored["forget_ids"]])
    log_p = fresh(ids).logits[0, :-1].log_softmax(-1)
    start = len(stored["prompt_ids"])
    truth = sum(log_p[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1]))
    assert stored["ref_forget_logps"] == pytest.approx(truth, rel=1e-5)
    # At the reference, NPO is 2/beta log 2.
    assert column(trainer, "loss")[0] > 0
    first = trained(tmp_path, overrides=overrides)
    assert column(first, "loss")[0] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)


def test_evaluation_sets_need_a_reference_too(tmp_path):
    overrides = {"loss_type": "idk_dpo"}
    trainer = make_trainer(tmp_path, overrides=overrides, eval_dataset={"a": make_forget(4), "b": make_forget(2)})
    before = trainer.evaluate()
    assert before["eval_a_loss"] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)
    assert trainer.evaluate(make_forget(3))["eval_loss"] == pytest.approx(2 / 0.1 * 0.6931472, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_a_loss"] != before["eval_a_loss"]
    with pytest.raises(
        ValueError, match="idk_dpo: the model before unlearning is gone, so this dataset has no reference"
    ):
        trainer.evaluate(make_forget(3))
    adapter = trained(tmp_path, overrides=overrides, peft_config=lora())
    kept = adapter.evaluate(make_forget(4))["eval_loss"]
    again = make_trainer(tmp_path, overrides=overrides, peft_config=lora(), eval_dataset=make_forget(4))
    again.train()
    assert again.evaluate()["eval_loss"] == pytest.approx(kept, rel=1e-5)


@pytest.mark.parametrize("name", ["undial", "rmu"])
def test_frozen_copy_stays(tmp_path, name):
    trainer = make_trainer(tmp_path, overrides={"loss_type": name, "retain_coef": 1.0}, retain_dataset=make_retain())
    before = weights(trainer.ref_model)
    assert largest_difference(before, weights(trainer.model)) == 0
    trainer.train()
    assert largest_difference(before, weights(trainer.ref_model)) == 0
    assert largest_difference(before, weights(trainer.model)) > 0
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


def test_four_ways_to_the_reference_agree(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    overrides = {"loss_type": "undial", "retain_coef": 1.0, "retain_loss": "kl"}
    common = dict(overrides=overrides, retain_dataset=make_retain())
    trainers = [
        make_trainer(tmp_path, make_tiny_llama(), **common),
        make_trainer(tmp_path, str(tmp_path / "base"), **common),
        make_trainer(tmp_path, make_tiny_llama(), ref_model=make_tiny_llama(), **common),
        make_trainer(tmp_path, make_tiny_llama(), peft_config=lora(), **common),
    ]
    assert trainers[3].ref_model is None
    random_adapter(trainers[3].model)
    merged = copy.deepcopy(trainers[3].model).merge_and_unload()
    with torch.no_grad():
        for trainer in trainers[:3]:
            for name, parameter in trainer.model.named_parameters():
                parameter.copy_(merged.get_parameter(name))
    losses = [loss_of(trainer, batch_of(trainers[0])).item() for trainer in trainers]
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_unused_references_and_retain_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ref_model: flat does not read a reference"):
        make_trainer(tmp_path, ref_model=make_tiny_llama())
    make_trainer(tmp_path, ref_model=make_tiny_llama(), overrides={"loss_type": "npo"})
    with pytest.raises(
        ValueError, match="retain_dataset has no effect: undial has no retain term with retain_coef=None"
    ):
        make_trainer(tmp_path, retain_dataset=make_retain(), overrides={"loss_type": "undial"})
    with pytest.raises(ValueError, match="gradient ascent with a retain term: give a retain_dataset"):
        make_trainer(tmp_path, overrides={"loss_type": "gradient_difference"})
    with pytest.raises(ValueError, match=r"retain_coef=1\.0 needs a retain_dataset"):
        make_trainer(tmp_path, overrides={"retain_coef": 1.0})
    with pytest.raises(ValueError, match="retain_loss='kl' needs a retain_dataset"):
        make_trainer(tmp_path, overrides={"retain_loss": "kl"})
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the base weights"):
        make_trainer(tmp_path, overrides={"loss_type": "undial"}, peft_config=lora(init_lora_weights="pissa"))
    with pytest.raises(TypeError, match="args is a DPOConfig; UnlearnTrainer takes UnlearnConfig, which has the same"):
        UnlearnTrainer(make_tiny_llama(), DPOConfig(str(tmp_path), use_cpu=True, bf16=False), make_forget())
    with pytest.raises(TypeError, match="args is a UnlearnConfig; FlatTrainer takes FlatConfig, which has the same"):
        FlatTrainer(make_tiny_llama(), make_args(tmp_path), make_forget())


@pytest.mark.parametrize("attribute", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharding_is_refused_where_the_head_is_read(tmp_path, attribute):
    trainer = make_trainer(tmp_path, overrides={"loss_type": "ceu"})
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=r"loss_type='ceu' .*reads the output layer or a reference outside"):
        trainer._refuse_sharding()
    flat = make_trainer(tmp_path)
    setattr(flat, attribute, True)
    flat._refuse_sharding()
