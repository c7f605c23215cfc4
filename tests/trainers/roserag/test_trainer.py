"""The trainer: recorded numbers, the losses it equals in their limits, and TRL's own behaviour around them."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from itertools import pairwise

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_ext import RoseLoraConfig
from hf_ext.model_cards import build_card, save
from hf_ext.pipelines.roserag import RagPrompts
from hf_ext.trainers.roserag import (
    PreferenceLoss,
    RoseRAGConfig,
    RoseRAGDatasetBuilder,
    RoseRAGTrainer,
    register_preference_loss,
)
from hf_ext.trainers.roserag.loss import PREFERENCE_LOSSES
from tests.oracles import ORACLES
from tests.trainers.roserag.helpers import ScriptedBackend, preference_rows, question_rows, tiny_policy

RECORDED = json.loads((ORACLES / "roserag/tiny_expected.json").read_text())
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "lr_scheduler_type": "constant",
    "activation_checkpointing": False,
}


def trained(tmp_path, trainer_class=RoseRAGTrainer, model=None, rows=None, tokenizer=None, train=True, **options):
    policy, own = tiny_policy()
    arguments = {name: options.pop(name) for name in ("peft_config", "ref_model", "eval_dataset") if name in options}
    config = RoseRAGConfig if issubclass(trainer_class, RoseRAGTrainer) else DPOConfig
    trainer = trainer_class(
        policy if model is None else model,
        args=config(str(tmp_path), **{**PLAIN, **options}),
        train_dataset=rows if isinstance(rows, Dataset) else Dataset.from_list(rows or preference_rows()),
        processing_class=tokenizer or own,
        **arguments,
    )
    if train:
        trainer.train()
    return trainer


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


# -- recorded numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "loss_orpo_lam0p5_sequence"),
        ({"nll_normalization": "token"}, "loss_orpo_lam0p5_token"),
        ({"nll_normalization": "none"}, "odds_term_lam0p5"),
        ({"nll_normalization": "full_token"}, "trl_orpo_total_beta0p5"),
    ],
)
def test_recorded_losses(tmp_path, options, expected):
    model = AutoModelForCausalLM.from_pretrained(ORACLES / "roserag/tiny_model", attn_implementation="eager")
    trainer = trained(tmp_path, model=model, train=False, orpo_lambda=0.5, **options)
    batch = load_file(ORACLES / "roserag/tiny_batch.safetensors")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}
    loss = trainer.compute_loss(trainer.model, inputs)
    assert float(loss) == pytest.approx(RECORDED[expected], rel=1e-6)
    if expected == "loss_orpo_lam0p5_sequence":
        loss.backward()
        for name, norm in RECORDED["grad_norms_sequence"].items():
            assert float(trainer.model.get_parameter(name).grad.norm()) == pytest.approx(norm, rel=1e-5), name


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "precomputed", "fresh LoRA", "trained LoRA"])
def test_margin_dpo_without_a_margin_is_trls_dpo(tmp_path, kind):
    def run(trainer_class, **options):
        model, _ = tiny_policy()
        arguments = {}
        if kind == "full":
            arguments["ref_model"] = copy.deepcopy(model)
        elif kind == "precomputed":
            arguments |= {"ref_model": copy.deepcopy(model), "precompute_ref_log_probs": True}
        elif kind == "fresh LoRA":
            arguments["peft_config"] = LoraConfig(target_modules=["q_proj", "v_proj"])
        else:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        return trained(tmp_path, trainer_class, model, **arguments, **options)

    theirs = run(DPOTrainer)
    ours = run(RoseRAGTrainer, loss_type=["margin_dpo"], nll_weight=0.0, beta=0.1)
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-6, abs=1e-6), name
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=0, atol=1e-6)


def test_native_losses_are_trls_own(tmp_path):
    model, _ = tiny_policy()
    options = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    ours = trained(tmp_path, ref_model=copy.deepcopy(model), **options)
    theirs = trained(tmp_path, DPOTrainer, ref_model=copy.deepcopy(model), **options)
    assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-6)
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=0, atol=2e-6)


def test_without_the_odds_it_is_the_likelihood_alone(tmp_path):
    ours = trained(tmp_path, orpo_lambda=0.0, nll_normalization="token")
    theirs = trained(tmp_path, loss_type=["sft"])
    torch.testing.assert_close(weights_of(ours), weights_of(theirs), rtol=0, atol=2e-6)


def test_terms_add_up(tmp_path):
    trainer = trained(
        tmp_path, loss_type=["rose_rag", "simpo", "sft"], loss_weights=[2.0, 0.5, 0.1], beta=2.0, max_steps=1
    )
    (row,) = [row for row in trainer.state.log_history if "loss/simpo" in row]
    chosen_tokens = row["loss"] - 2 * 0.5 * row["loss/rose_rag"] - 0.5 * row["loss/simpo"] - row["nll_loss"]
    # What remains is TRL's own "sft", a mean over tokens.
    assert chosen_tokens == pytest.approx(0.1 * row["nll_loss"], rel=0.05)
    assert math.isfinite(row["log_odds"]) and math.isfinite(row["margins/token"])


def test_one_margin_for_all_is_the_margin(tmp_path):
    rows = [{**row, "gap": 0.7} for row in preference_rows()]
    column = trained(tmp_path, rows=rows, margin_column="gap")
    assert weights_of(column).equal(weights_of(trained(tmp_path, margin=0.7)))
    assert not weights_of(column).equal(weights_of(trained(tmp_path)))
    rows = [{**row, "gap": float(n)} for n, row in enumerate(preference_rows())]
    assert not weights_of(trained(tmp_path, rows=rows, margin_column="gap")).equal(weights_of(column))


def test_it_learns(tmp_path):
    trainer = trained(tmp_path, max_steps=60, learning_rate=3e-3)
    assert logged(trainer, "margins/token")[-1] > logged(trainer, "margins/token")[0] + 0.3
    assert logged(trainer, "loss")[-1] < 0.5 * logged(trainer, "loss")[0]


# -- around ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [(4, 2), (2, 4), (1, 8)])
def test_micro_batches_change_nothing(tmp_path, split):
    size, accumulation = split
    whole = trained(tmp_path, per_device_train_batch_size=8)
    parts = trained(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"loss_type": ["simpo"]}])
@pytest.mark.parametrize("wrapped", [False, True])
def test_without_a_reference_nothing_is_loaded(tmp_path, monkeypatch, options, wrapped):
    model, _ = tiny_policy()
    if wrapped:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.create_model_from_path", lambda *args, **kwargs: pytest.fail("loaded")
    )
    trainer = trained(tmp_path, model=model, max_steps=1, **options)
    assert trainer.ref_model is None
    assert not wrapped or list(trainer.model.peft_config) == ["default"]
    assert math.isfinite(trainer.evaluate(Dataset.from_list(preference_rows(4)))["eval_loss"])


TUNERS = {
    "LoRA": LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "LoRA on embeddings": LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
    "IA3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "RoseLoRA": RoseLoraConfig(target_modules=["q_proj", "v_proj"], t_init=2, t_final=5),
}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("name", TUNERS)
def test_the_reference_of_a_trained_adapter_is_that_adapter(tmp_path, name, precompute):
    model, _ = tiny_policy()
    adapted = get_peft_model(model, copy.deepcopy(TUNERS[name]))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    trainer = trained(
        tmp_path,
        model=adapted,
        loss_type=["margin_dpo"],
        nll_weight=0.0,
        max_steps=1,
        precompute_ref_log_probs=precompute,
    )
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("normalization", ["sequence", "full_token"])
def test_virtual_tokens(tmp_path, normalization):
    """They stand before the prompt, and are no part of it."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    options = {"nll_normalization": normalization, "orpo_lambda": 0.0, "per_device_train_batch_size": 8}
    trainer = trained(tmp_path, peft_config=config, max_steps=1, train=False, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, mask = batch["input_ids"][:8], batch["attention_mask"][:8]
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] : -1]
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    read = (batch["completion_mask"][:8] if normalization == "sequence" else mask)[:, 1:]
    sums, counts = (logps * read).sum(-1), read.sum(-1)
    expected = -(sums / counts).mean() if normalization == "sequence" else -sums.sum() / counts.sum()
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(float(expected), rel=1e-5)


def test_checkpointing_and_bf16(tmp_path):
    plain = trained(tmp_path)
    saved = trained(tmp_path, activation_checkpointing=True)
    torch.testing.assert_close(weights_of(saved), weights_of(plain), rtol=0, atol=1e-6)
    rounded = trained(tmp_path, bf16=True)
    assert logged(rounded, "loss") == pytest.approx(logged(plain, "loss"), rel=0.05)


def test_texts_without_a_template(tmp_path):
    model, tokenizer = tiny_policy(template=None)
    trainer = trained(tmp_path, model=model, tokenizer=tokenizer, rows=preference_rows(template=None))
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


def test_it_is_saved_loaded_and_told(tmp_path):
    trainer = trained(tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]), max_steps=1)
    trainer.save_model(str(tmp_path / "adapter"))
    model, tokenizer = tiny_policy()
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter")
    ids = tokenizer("w1 w2 Answer:", return_tensors="pt").input_ids
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "2502.10993" in card and "roserag" in card


@pytest.mark.parametrize("folder", [None, "pairs"])
def test_cards_tell_how_the_pairs_were_made(tmp_path, folder):
    """TRL's and ours; the data know it, in memory and from a file."""
    target = None if folder is None else tmp_path / folder
    backend = ScriptedBackend()
    backend.identity = str(tmp_path / "my-model@1")
    builder = RoseRAGDatasetBuilder(backend, n_unhinted=6, selection="easiest")
    data = builder.build(question_rows(), target)
    data = data if target is None else load_from_disk(target)
    trainer = trained(tmp_path / "run", rows=data, max_steps=1)
    trainer.create_model_card()
    for text in ((tmp_path / "run" / "README.md").read_text(), build_card(trainer).text):
        assert "from 4 questions (made a pair: 4)" in text
        assert "by `my-model@1` at temperature 1 and top_p 1" in text and str(tmp_path) not in text
        assert "8 per question with the answer known, 6 without" in text and "(match: exact)" in text
        assert "Selection `easiest` by the mean of log-probabilities under `my-model@1`." in text
    assert trained(tmp_path / "other", train=False).data_notes == ()


def test_prompts_are_published_with_the_model(tmp_path):
    trainer = trained(tmp_path / "run", max_steps=1)
    trainer.prompts = RagPrompts(marker="So:")
    save(trainer, tmp_path / "saved", license="apache-2.0", base_model="user/tiny")
    assert RagPrompts.from_file(tmp_path / "saved" / "rag_config.json") == trainer.prompts
    # As a folder that `save` wrote, it can be written again.
    save(trainer, tmp_path / "saved", license="apache-2.0", base_model="user/tiny")


def test_dpo_without_a_likelihood_that_falls_is_told(tmp_path, caplog):
    # Pairs that differ in one word at the end, so that pushing one down pushes the other.
    rows = [
        {**row, "rejected": [{"role": "assistant", "content": row["chosen"][0]["content"] + " w9"}]}
        for row in preference_rows()
    ]
    options = {"loss_type": ["margin_dpo"], "max_steps": 12, "learning_rate": 1e-2, "ref_model": tiny_policy()[0]}
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path / "a", rows=rows, nll_weight=1.0, **options)
        assert "logps/chosen fell" not in caplog.text
        trainer = trained(tmp_path / "b", rows=rows, nll_weight=0.0, **options)
    falls = [later < earlier for earlier, later in pairwise(logged(trainer, "logps/chosen"))]
    assert any(all(falls[n : n + 4]) for n in range(len(falls)))
    assert len(re.findall(r"logps/chosen fell from -\d+\.\d to -\d+\.\d over 5 logs", caplog.text)) == 1


def test_a_loss_of_ones_own(tmp_path):
    register_preference_loss("likelihood", PreferenceLoss(lambda chosen, rejected, beta, gamma: -chosen.means_B))
    try:
        ours = trained(tmp_path, loss_type=["likelihood"])
        nll = trained(tmp_path, orpo_lambda=0.0)
        torch.testing.assert_close(weights_of(ours), weights_of(nll), rtol=0, atol=1e-6)
    finally:
        del PREFERENCE_LOSSES["likelihood"]


def test_one_trainer_after_another_does_not_stack(tmp_path):
    def depth(model):
        count, forward = 0, vars(model).get("forward")
        while forward is not None:
            count, forward = count + 1, vars(forward).get("__wrapped__")
        return count

    model, _ = tiny_policy()
    depths = [depth(trained(tmp_path, model=model, max_steps=1).model) for _ in range(3)]
    assert depths[0] == depths[2]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            {"loss_type": ["rose"]},
            r"loss_type=\['rose'\]: choose among \['rose_rag', 'margin_dpo', 'simpo', 'sigmoid'",
        ),
        ({"loss_type": []}, "choose among"),
        ({"loss_type": ["simpo", "simpo"]}, "names a loss twice"),
        ({"loss_weights": [1.0, 2.0]}, "give one for each"),
        ({"orpo_lambda": -1.0}, "orpo_lambda=-1.0"),
        ({"orpo_lambda": math.nan}, "orpo_lambda=nan"),
        ({"margin": math.inf}, "margin=inf"),
        ({"margin": 1.0, "margin_column": "gap"}, "has no effect beside margin_column"),
        ({"margin": 1.0, "loss_type": ["sigmoid"]}, "a margin has no effect"),
        ({"nll_normalization": "mean"}, "nll_normalization='mean'"),
        ({"nll_weight": -0.5}, "nll_weight=-0.5"),
        ({"nll_weight": 1.0, "nll_normalization": "none"}, "has no effect with nll_normalization='none'"),
        ({"ld_alpha": 0.5}, "would ignore them"),
        ({"label_smoothing": 0.1}, "label_smoothing has no effect"),
        ({"sync_ref_model": True}, "has no reference"),
        ({"use_weighting": True}, "would ignore them"),
    ],
)
def test_bad_settings(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        RoseRAGConfig(str(tmp_path), **{**PLAIN, **options})


def test_bad_arguments(tmp_path):
    model, tokenizer = tiny_policy()
    data = Dataset.from_list(preference_rows())
    with pytest.raises(TypeError, match="takes RoseRAGConfig"):
        RoseRAGTrainer(model, DPOConfig(str(tmp_path), **PLAIN), data, processing_class=tokenizer)
    with pytest.raises(ValueError, match="ref_model: loss_type="):
        trained(tmp_path, ref_model=copy.deepcopy(model), train=False)
    with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
        trained(tmp_path, precompute_ref_log_probs=True, train=False)
    with pytest.raises(ValueError, match="margin_column='gap': the train dataset has the columns"):
        trained(tmp_path, margin_column="gap", train=False)
    rows = [{**row, "gap": math.nan if n == 3 else 1.0} for n, row in enumerate(preference_rows())]
    with pytest.raises(ValueError, match="train dataset, row 3: gap=nan"):
        trained(tmp_path, rows=rows, margin_column="gap", train=False)
    with pytest.raises(ValueError, match="the prompts of 8 of 8 rows fill max_length=4"):
        trained(tmp_path, max_length=4, train=False)
    with pytest.raises(ValueError, match="lm_head"):
        trained(tmp_path, peft_config=LoraConfig(target_modules=["lm_head"]), train=False)


def test_responses_that_will_be_cut_are_counted(tmp_path, caplog):
    lengths = trained(tmp_path, train=False).train_dataset
    limit = max(len(ids) for ids in lengths["prompt_ids"]) + 2
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, max_length=limit, train=False)
    assert f"of 8 of 8 rows are longer than max_length={limit} and are cut" in caplog.text


def test_prompts_are_saved_with_the_model(tmp_path):
    model, tokenizer = tiny_policy()
    args = RoseRAGConfig(str(tmp_path), **{**PLAIN, "save_strategy": "steps", "save_steps": 1, "max_steps": 1})
    prompts = RagPrompts(marker="Antwort:")
    data = Dataset.from_list(preference_rows())
    RoseRAGTrainer(model, args, data, processing_class=tokenizer, prompts=prompts).train()
    assert RagPrompts.from_file(tmp_path / "checkpoint-1" / "rag_config.json") == prompts


def test_rows_that_do_not_fit_are_counted(tmp_path, caplog):
    rows = preference_rows()
    rows[0]["prompt"][0]["content"] = "w1 " * 300
    with caplog.at_level(logging.WARNING):
        trainer = trained(tmp_path, rows=rows, train=False)
    assert len(trainer.train_dataset) == 7 and "the prompts of 1 of 8 rows fill max_length=256" in caplog.text
