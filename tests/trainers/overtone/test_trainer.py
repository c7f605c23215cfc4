"""OvertoneTrainer against its host's contract: equality with SFT, accumulation, saturation, PEFT, quantisation, saving."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from hf_ext.trainers.overtone import OvertoneTrainer, overtone_reference
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import FAMILIES, column, largest_difference, lora, make_tokenizer, quantised_llama, weights
from tests.trainers.overtone.helpers import make_facts, make_trainer, trained

CROSS_ENTROPY = {"mix_lambda": 1.0, "clip_epsilon": 0.0}
# Everything counts as learnt: no token ever has a gradient.
SATURATED = {"clip_epsilon": 1e9, "require_top1": False}


def batch_of(trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("family", FAMILIES)
def test_lambda_one_without_clip_is_the_sft_run(tmp_path, family):
    overrides = {"router_aux_loss_coef": 0.1} if family == "mixtral_experts" else {}
    torch.manual_seed(0)
    model = FAMILIES[family]()
    peer = trained(tmp_path, model=copy.deepcopy(model), trainer_class=SFTTrainer, overrides=overrides)
    ours = trained(tmp_path, model=model, overrides=CROSS_ENTROPY | overrides)
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
        assert column(ours, name) == pytest.approx(column(peer, name), rel=1e-4), name
    if family == "mixtral_experts":
        assert column(ours, "aux_loss") == pytest.approx(column(peer, "aux_loss"), rel=1e-4)
    # Adam turns the last digit of a gradient near zero into a full step, so the weights agree less closely.
    assert largest_difference(weights(ours.model), weights(peer.model)) < 2e-2


def test_loss_is_the_definition_and_eval_loss_is_plain(tmp_path):
    trainer = make_trainer(tmp_path, overrides={"mix_lambda": 0.3, "n_sigma": 0.7})
    peer = make_trainer(tmp_path, model=make_tiny_llama(), trainer_class=SFTTrainer)
    batch = batch_of(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(7))
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    truth = overtone_reference(logits[keep].double(), labels[keep], trainer.overtone_settings)
    assert loss.item() == pytest.approx(truth.loss.sum().item() / 7, rel=1e-5)
    facts = make_facts()
    assert trainer.evaluate(facts)["eval_loss"] == pytest.approx(peer.evaluate(facts)["eval_loss"], rel=1e-6)


def test_accumulation_equals_one_large_batch(tmp_path):
    runs = []
    for size, steps in ((8, 1), (4, 2), (1, 8)):
        overrides = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": steps,
            "optim": "sgd",
            "learning_rate": 0.5,
        }
        runs.append(trained(tmp_path, overrides=overrides))
    for other in runs[1:]:
        assert column(other, "loss") == pytest.approx(column(runs[0], "loss"), rel=1e-5)
        assert largest_difference(weights(other.model), weights(runs[0].model)) < 1e-5
        for name in ("active_fraction", "accepted_fraction", "kl", "nll"):
            key = f"overtone/{name}"
            assert column(other, key) == pytest.approx(column(runs[0], key), rel=1e-4), key


def test_metrics_are_logged_in_training_only(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=make_facts(4), overrides={"eval_strategy": "steps", "eval_steps": 2})
    trainer.train()
    fractions = column(trainer, "overtone/active_fraction")
    assert len(fractions) == 4 and all(0 <= value <= 1 for value in fractions)
    assert len(column(trainer, "eval_loss")) == 2
    assert not any("overtone" in key for row in trainer.state.log_history if "eval_loss" in row for key in row)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_saturated_steps_do_not_move_the_weights(tmp_path, optim):
    overrides = SATURATED | {
        "stop_when_saturated": False,
        "optim": optim,
        "weight_decay": 0.5,
        "gradient_accumulation_steps": 2,
    }
    trainer = make_trainer(tmp_path, overrides=overrides)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 4
    assert largest_difference(weights(trainer.model), before) == 0.0
    moved = make_trainer(tmp_path, overrides=overrides | {"skip_saturated_steps": False})
    before = weights(moved.model)
    moved.train()
    assert largest_difference(weights(moved.model), before) > 0.0


def test_training_goes_on_for_the_steps_that_an_adapter_needs(tmp_path):
    trainer = trained(tmp_path, overrides=SATURATED | {"max_steps": 50, "saturation_min_steps": 6})
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("patience, expected", [(None, 2), (1, 1), (3, 3)])
def test_training_stops_when_saturated(tmp_path, patience, expected):
    # Eight facts in batches of four: an epoch has two steps.
    trainer = trained(tmp_path, overrides=SATURATED | {"max_steps": 50, "saturation_patience": patience})
    assert trainer.state.global_step == expected


def test_one_fact_is_learnt_and_training_ends_by_itself(tmp_path):
    overrides = {"max_steps": 200, "lr_scheduler_type": "constant"}
    trainer = trained(tmp_path, data=make_facts(1), overrides=overrides)
    assert 2 < trainer.state.global_step < 100
    assert column(trainer, "overtone/active_fraction")[0] == 1.0
    assert column(trainer, "overtone/active_fraction")[-1] == 0.0
    assert column(trainer, "mean_token_accuracy")[-1] == 1.0


def test_end_token_is_optional(tmp_path):
    data = Dataset.from_list([{"prompt": "w1 w2 ", "completion": "w3 w4 "}])
    kept = make_trainer(tmp_path, data=data)
    dropped = make_trainer(tmp_path, data=data, overrides={"edit_append_eos": False})
    assert kept.train_dataset[0]["labels"] == [-100, -100, 7, 8, 2]
    assert dropped.train_dataset[0]["labels"] == [-100, -100, 7, 8]
    text = Dataset.from_list([{"text": "w1 w2 "}])
    assert make_trainer(tmp_path, data=text).train_dataset[0]["input_ids"] == [5, 6, 2]
    plain = make_trainer(tmp_path, data=text, overrides={"edit_append_eos": False})
    assert plain.train_dataset[0]["input_ids"] == [5, 6]


@pytest.mark.parametrize("overrides", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["v_proj"], "r": 1}])
def test_lora_saves_and_loads(tmp_path, overrides):
    trainer = make_trainer(tmp_path, peft_config=lora(**overrides), overrides={"activation_checkpointing": True})
    base = {name: value for name, value in weights(trainer.model).items() if "lora" not in name}
    trainer.train()
    after = weights(trainer.model)
    changed = {name for name, value in base.items() if not torch.equal(value, after[name])}
    assert all("modules_to_save.default" in name for name in changed)
    assert bool(changed) == ("modules_to_save" in overrides)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model(ids).logits)


def test_adapter_on_the_head_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(tmp_path, peft_config=lora(target_modules=["lm_head"]))


def test_peft_model_and_second_adapter(tmp_path):
    model = get_peft_model(make_tiny_llama(), lora())
    model.add_adapter("other", lora())
    model.set_adapter("other")
    before = weights(model)
    trainer = trained(tmp_path, model=model)
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, before[name])}
    assert changed and all(".other." in name for name in changed)


def test_prompt_tuning(tmp_path):
    trainer = make_trainer(tmp_path, peft_config=PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    before = weights(trainer.model)
    trainer.train()
    assert largest_difference(weights(trainer.model), before) > 0.0


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(tmp_path, bits):
    model = quantised_llama(tmp_path / "base", bits)
    trainer = trained(tmp_path, model=model, peft_config=lora(), data=make_facts(4), overrides={"max_steps": 8})
    # The target moves with the model, so the loss itself need not fall from step to step.
    nll = column(trainer, "overtone/nll")
    assert nll[-1] < nll[0]


def test_valid_vocab_size_beyond_the_head_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="valid_vocab_size=100 exceeds the model's vocabulary of 99"):
        make_trainer(tmp_path, overrides={"valid_vocab_size": 100})


def test_quantised_head_is_rejected(tmp_path):
    trainer = make_trainer(tmp_path)
    head = trainer.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"stored as torch\.uint8"):
        make_trainer(tmp_path, model=trainer.model)


@pytest.mark.parametrize("options", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "bf16 weights"])
def test_bfloat16(tmp_path, options):
    model = make_tiny_llama().to(options.get("dtype", torch.float32))
    trainer = trained(tmp_path, model=model, overrides={"bf16": options.get("bf16", False), "max_steps": 12})
    nll = column(trainer, "overtone/nll")
    assert nll[-1] < nll[0]


def test_packing(tmp_path):
    overrides = {
        "packing": True,
        "max_length": 32,
        "per_device_train_batch_size": 1,
        "mix_lambda": 1.0,
        "clip_epsilon": 0.0,
    }
    ours = trained(tmp_path, overrides=overrides)
    peer_overrides = {name: overrides[name] for name in ("packing", "max_length", "per_device_train_batch_size")}
    peer = trained(tmp_path, trainer_class=SFTTrainer, overrides=peer_overrides)
    assert column(ours, "loss") == pytest.approx(column(peer, "loss"), rel=1e-4)


def test_shift_labels_are_used_as_they_are(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = batch_of(trainer)
    trainer.model.train()
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "fused_lm_head": True}
    plain = trainer.model(**inputs, labels=batch["labels"])
    ready = trainer.model(**inputs, shift_labels=shifted)
    assert ready.log_probs.shape == batch["labels"].shape
    torch.testing.assert_close(ready.log_probs[:, :-1], plain.log_probs)
    torch.testing.assert_close(ready.loss, plain.loss)


def test_streaming_data(tmp_path):
    trainer = trained(tmp_path, data=make_facts().to_iterable_dataset(), overrides=SATURATED | {"max_steps": 9})
    assert trainer.state.global_step == 2  # one epoch: eight facts in batches of four


def test_fully_masked_micro_batch(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, -100]},
    ]
    overrides = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainer = trained(tmp_path, data=Dataset.from_list(rows), overrides=overrides)
    assert all(torch.isfinite(torch.tensor(column(trainer, "loss"))))


def test_errors_name_the_label_and_the_step(tmp_path):
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 99]}]
    overrides = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(IndexError, match="label 99 is outside the vocabulary of 99 tokens"):
        trained(tmp_path, data=Dataset.from_list(rows), overrides=overrides)
    broken = make_trainer(tmp_path)
    with torch.no_grad():
        broken.model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="optimizer step 0: non-finite logits"):
        broken.train()


def test_a_new_trainer_on_the_same_model_does_not_stack_patches(tmp_path):
    model = make_tiny_llama()
    depths = []
    for _ in range(3):
        trainer = make_trainer(tmp_path, model=model)
        forward = vars(model)["forward"]
        cells = [cell.cell_contents for cell in forward.__func__.__closure__ or ()]
        stock = next(cell for cell in cells if callable(cell) and getattr(cell, "__name__", "") == "forward")
        original = next(
            cell.cell_contents
            for cell in stock.__func__.__closure__
            if getattr(cell.cell_contents, "__name__", "") == "forward"
        )
        depths.append(original.__func__ is type(model).forward)
    assert depths == [True] * 3
    trainer.train()
    assert trainer.model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape[1] <= 4


def test_full_model_saves_resumes_and_writes_a_card(tmp_path):
    overrides = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
    whole = trained(tmp_path / "run", overrides=overrides)
    resumed = make_trainer(tmp_path / "again", overrides=overrides)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert largest_difference(weights(whole.model), weights(resumed.model)) < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert largest_difference(weights(whole.model), weights(loaded)) < 1e-6
    card = (tmp_path / "run" / "README.md").read_text()
    assert "overtone" in card and "2502.00602" in card and "OVERTONE" in card


def test_default_arguments_name_the_run_after_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL trains in bfloat16 unless told otherwise, and transformers asks for a GPU then.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    model = make_tiny_llama()
    model.config.name_or_path = "someone/tiny"
    trainer = OvertoneTrainer(model, train_dataset=make_facts(), processing_class=make_tokenizer())
    assert trainer.args.output_dir == "tiny-OVERTONE"


@pytest.mark.slow
def test_torch_compile_eager_backend(tmp_path):
    overrides = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2}
    compiled = trained(tmp_path, overrides=overrides)
    plain = trained(tmp_path, overrides={"max_steps": 2})
    assert column(compiled, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)


def test_sequential_edits_with_one_trainer_each(tmp_path):
    model = make_tiny_llama()
    for row in itertools.islice(make_facts(), 2):
        trainer = trained(tmp_path, model=model, data=Dataset.from_list([row]), overrides={"max_steps": 60})
    assert column(trainer, "overtone/active_fraction")[-1] == 0.0
