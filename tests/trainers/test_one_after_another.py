"""One model and several trainers in a row: only its weights matter, and patches of its forward do not pile up."""

from __future__ import annotations

import sys

import pytest
import torch
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, SFTTrainer

from tests.conftest import make_tiny_llama
from tests.trainers.flat import helpers as flat
from tests.trainers.helpers import CPU_RUN, column, lora, make_tokenizer
from tests.trainers.overtone import helpers as overtone

IDS = torch.tensor([[5, 6, 7, 8]])
TWO_STEPS = {"max_steps": 2}


def unlearn(folder, model, **kwargs):
    overrides = TWO_STEPS | kwargs.pop("overrides", {})
    return flat.trained(folder, model=model, overrides=overrides, eval_dataset=flat.make_forget(4), **kwargs)


def edit(folder, model):
    return overtone.trained(folder, model=model, overrides=TWO_STEPS, eval_dataset=overtone.make_facts(4))


def fine_tune(folder, model):
    return overtone.trained(folder, model=model, overrides=TWO_STEPS, trainer_class=SFTTrainer)


def prefer(folder, model):
    args = DPOConfig(**{"output_dir": str(folder), **TWO_STEPS, **CPU_RUN})
    data, reference = flat.make_preference(), make_tiny_llama()
    trainer = DPOTrainer(model, reference, args, train_dataset=data, processing_class=make_tokenizer())
    trainer.train()
    return trainer


def fresh(model):
    """A model with these weights that no trainer has seen."""
    other = make_tiny_llama()
    other.load_state_dict(model.state_dict())
    return other


def depth(model) -> int:
    """Python frames between the caller of a model and its embedding."""
    depths = []

    def count(*_):
        frame, frames = sys._getframe(), 0
        while frame := frame.f_back:
            frames += 1
        depths.append(frames)

    handle = model.get_input_embeddings().register_forward_hook(count)
    model(IDS)
    handle.remove()
    return depths[0]


EARLIER = [(unlearn,), (edit,), (fine_tune,), (prefer,), (fine_tune, unlearn, edit, prefer)]


@pytest.mark.parametrize("earlier", EARLIER, ids=lambda runs: "+".join(run.__name__ for run in runs))
@pytest.mark.parametrize("last", [unlearn, edit])
def test_a_used_model_trains_evaluates_and_answers_like_a_fresh_one(tmp_path, earlier, last):
    model = make_tiny_llama()
    for run in earlier:
        run(tmp_path, model)
    new = last(tmp_path, fresh(model))
    used = last(tmp_path, model)
    assert column(used, "loss") == column(new, "loss")
    assert used.evaluate()["eval_loss"] == new.evaluate()["eval_loss"]
    answers = [m.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS) for m in (model, fresh(model))]
    assert torch.equal(answers[0].logits, answers[1].logits) and answers[0].loss == answers[1].loss
    texts = [m.generate(IDS, max_new_tokens=4, do_sample=False) for m in (model, fresh(model).eval())]
    assert torch.equal(*texts)


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "peft model"])
@pytest.mark.parametrize("rounds", [(unlearn,), (unlearn, edit), (unlearn, fine_tune)], ids=lambda r: r[-1].__name__)
def test_patches_do_not_pile_up(tmp_path, rounds, wrapped):
    model = get_peft_model(make_tiny_llama(), lora()) if wrapped else make_tiny_llama()
    depths = []
    for _ in range(2):
        for run in rounds:
            run(tmp_path, model)
        depths.append(depth(model))
    assert depths[0] == depths[1]


def test_patches_of_a_given_reference_do_not_pile_up(tmp_path):
    reference, depths = make_tiny_llama(), []
    for _ in range(2):
        unlearn(tmp_path, make_tiny_llama(), overrides={"loss_type": "undial"}, ref_model=reference)
        depths.append(depth(reference))
    assert depths[0] == depths[1]


@pytest.mark.parametrize("earlier", [unlearn, edit, fine_tune, prefer])
def test_the_frozen_copy_runs_its_own_weights(tmp_path, earlier):
    model = make_tiny_llama()
    earlier(tmp_path, model)
    before = model.eval()(IDS).logits.detach()
    trainer = unlearn(tmp_path, model, overrides={"loss_type": "undial"})
    assert torch.equal(trainer.ref_model(IDS).logits, before)
    assert not torch.equal(model.eval()(IDS).logits, before)
