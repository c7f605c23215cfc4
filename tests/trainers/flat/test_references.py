"""The model before unlearning: what is computed of it, when, and which arguments have no use for it."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PromptTuningConfig
from transformers import LlamaForCausalLM
from trl import DPOConfig

from hf_ext.trainers.flat import FlatTrainer, UnlearnTrainer
from hf_ext.trainers.flat.reading import check_adapter_leaves_the_base
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


@pytest.mark.parametrize(
    "peft_config",
    [lora(init_lora_weights=False), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")],
    ids=["random start", "prompt"],
)
def test_sums_are_those_of_the_model_without_the_fresh_adapter(tmp_path, peft_config):
    plain = make_trainer(tmp_path, overrides={"loss_type": "idk_dpo"})
    tuned = make_trainer(tmp_path, overrides={"loss_type": "idk_dpo", "max_steps": 1}, peft_config=peft_config)
    batch_of(plain)
    tuned.train()
    later = tuned._with_reference_sums(tuned.train_dataset.remove_columns(["ref_forget_logps", "ref_template_logps"]))
    for data in (tuned.train_dataset, later):
        for name in ("ref_forget_logps", "ref_template_logps"):
            found, truth = torch.tensor(list(data[name])), torch.tensor(list(plain.train_dataset[name]))
            torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)


def test_sums_are_cut_where_training_cuts_and_nothing_drops_out(tmp_path):
    overrides = {"loss_type": "npo", "max_length": 4, "precompute_ref_batch_size": 3}
    model = make_tiny_llama()
    drop_out(model)
    with pytest.warns(UserWarning, match="were truncated"):
        trainer = make_trainer(tmp_path, model, overrides=overrides)
    model.train()
    stored = trainer._with_reference_sums(trainer.train_dataset)
    assert model.training
    fresh = make_tiny_llama()
    for row in stored:
        ids = torch.tensor([row["prompt_ids"] + row["forget_ids"]])[:, :4]
        log_p = fresh(ids).logits[0, :-1].log_softmax(-1)
        truth = sum(log_p[t - 1, ids[0, t]].item() for t in range(len(row["prompt_ids"]), ids.shape[1]))
        assert row["ref_forget_logps"] == pytest.approx(truth, rel=1e-5)


def drop_out(model) -> None:
    """Dropout inside of the attention, which is no module that TRL could disable."""
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def test_the_reference_of_a_step_does_not_drop_out(tmp_path):
    model = make_tiny_llama()
    drop_out(model)
    trainer = make_trainer(tmp_path, model, overrides={"loss_type": "undial"}, peft_config=lora())
    batch = batch_of(trainer)
    del batch["completion_mask"]
    trainer.model.train()
    (seen, _), (again, _) = (trainer._reference(dict(batch), {"forget": slice(0, 4)}) for _ in range(2))
    assert torch.equal(seen["hidden"]["forget"], again["hidden"]["forget"])
    fresh = make_tiny_llama()(**batch, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(seen["hidden"]["forget"], fresh)
    assert all(module.training for module in trainer.model.modules())
    trainer.model.eval()
    trainer._reference(dict(batch), {"forget": slice(0, 4)})
    assert not any(module.training for module in trainer.model.modules())


def test_sums_of_another_trainer_are_not_used(tmp_path):
    overrides = {"loss_type": "npo", "max_steps": 1}
    other = trained(tmp_path, overrides=overrides)
    trainer = trained(tmp_path, model=make_tiny_llama(seed=7), data=other.train_dataset, overrides=overrides)
    assert column(trainer, "loss") == pytest.approx([2 / 0.1 * 0.6931472], rel=1e-5)
    # Its own are, although the model they belong to is gone.
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 13.8
    with pytest.raises(ValueError, match="the model before unlearning is gone"):
        trainer.evaluate(other.train_dataset)


@pytest.mark.parametrize("name", ["npo", "flat"])
def test_predictions_need_a_reference_too(tmp_path, name):
    trainer = make_trainer(tmp_path, overrides={"loss_type": name}, eval_dataset=make_forget(4))
    losses = [trainer.predict(data).metrics["test_loss"] for data in (trainer.eval_dataset, make_forget(4))]
    assert losses[0] == losses[1] == pytest.approx(trainer.evaluate()["eval_loss"])


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
    for init in ("pissa", "OLoRA", "olora"):
        for name in ("undial", "npo", "idk_dpo"):
            with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the base weights"):
                make_trainer(tmp_path, overrides={"loss_type": name}, peft_config=lora(init_lora_weights=init))
    with pytest.raises(ValueError, match="init_lora_weights='lora_ga' changes the base weights"):
        check_adapter_leaves_the_base(LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()))
    for init in (True, False, "gaussian", "orthogonal"):
        check_adapter_leaves_the_base(lora(init_lora_weights=init))
    with pytest.raises(TypeError, match="args is a DPOConfig: UnlearnTrainer takes UnlearnConfig, which has the same"):
        UnlearnTrainer(make_tiny_llama(), DPOConfig(str(tmp_path), use_cpu=True, bf16=False), make_forget())
    with pytest.raises(TypeError, match="args is a UnlearnConfig: FlatTrainer takes FlatConfig, which has the same"):
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
