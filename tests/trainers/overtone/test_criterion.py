"""OvertoneLoss and OvertoneMixin in a plain transformers.Trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_ext.trainers.overtone import (
    OvertoneLoss,
    OvertoneMixin,
    OvertoneSaturationCallback,
    OvertoneSettings,
    overtone_reference,
)
from tests.conftest import make_tiny_llama
from tests.trainers.helpers import column, largest_difference, weights
from tests.trainers.overtone.helpers import make_trainer

SATURATED = OvertoneSettings(clip_epsilon=1e9, require_top1=False)


def plain_arguments(folder, **overrides) -> TrainingArguments:
    settings = dict(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.5,
        optim="sgd",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return TrainingArguments(**{**settings, **overrides})


def plain_trainer(folder, criterion, overrides=None, trainer_class=Trainer, **kwargs) -> Trainer:
    prepared = make_trainer(folder, overrides={"max_steps": 1})
    return trainer_class(
        make_tiny_llama(),
        plain_arguments(folder, **(overrides or {})),
        train_dataset=prepared.train_dataset,
        data_collator=prepared.data_collator,
        compute_loss_func=criterion,
        **kwargs,
    )


def test_value_gradient_and_normalisation():
    criterion = OvertoneLoss(mix_lambda=0.3, n_sigma=0.8)
    logits = torch.randn(2, 6, 30, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(30, (2, 6))
    labels[0, :3] = -100
    loss = criterion(CausalLMOutput(logits=logits), labels, num_items_in_batch=5)
    (gradient,) = torch.autograd.grad(loss, logits)
    keep = labels[:, 1:] != -100
    truth = overtone_reference(logits[:, :-1][keep], labels[:, 1:][keep], criterion.settings)
    (expected,) = torch.autograd.grad(truth.loss.sum() / 5, logits)
    assert loss.item() == pytest.approx(truth.loss.sum().item() / 5)
    torch.testing.assert_close(gradient, expected)
    mean = criterion({"logits": logits}, labels)
    assert mean.item() == pytest.approx(truth.loss.mean().item())
    with torch.no_grad():
        evaluation = criterion({"logits": logits}, labels)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1][keep], labels[:, 1:][keep])
    assert evaluation.item() == pytest.approx(nll.item())


def test_plain_trainer_equals_overtone_trainer(tmp_path):
    overrides = {"optim": "sgd", "learning_rate": 0.5}
    ours = make_trainer(tmp_path, overrides=overrides)
    ours.train()
    for size, steps in ((4, 1), (1, 4)):
        plain = plain_trainer(
            tmp_path,
            OvertoneLoss(),
            {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps},
        )
        plain.train()
        assert column(plain, "loss") == pytest.approx(column(ours, "loss"), rel=1e-4)
        assert largest_difference(weights(plain.model), weights(ours.model)) < 1e-5


def test_saturation_callback_in_a_plain_trainer(tmp_path):
    criterion = OvertoneLoss(SATURATED)
    trainer = plain_trainer(
        tmp_path,
        criterion,
        {"max_steps": 20, "optim": "adamw_torch", "weight_decay": 0.5},
        callbacks=[OvertoneSaturationCallback(criterion.statistics)],
    )
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2 and largest_difference(weights(trainer.model), before) == 0.0


def test_mixin_in_another_trainer(tmp_path):
    class MixedTrainer(OvertoneMixin, Trainer):
        loss_is_scaled_for_ga = True

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.overtone_setup(OvertoneSettings())

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")[:, 1:]
            losses = self.overtone_per_token(model(**inputs).logits[:, :-1], labels)
            return losses.loss.sum() / num_items_in_batch

    mixed = plain_trainer(tmp_path, None, trainer_class=MixedTrainer)
    mixed.train()
    plain = plain_trainer(tmp_path, OvertoneLoss())
    plain.train()
    assert column(mixed, "loss") == pytest.approx(column(plain, "loss"), rel=1e-5)
    assert len(column(mixed, "overtone/active_fraction")) == 4
