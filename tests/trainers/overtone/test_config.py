"""Configuration: defaults, preset, and every rejected value."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from accelerate import ParallelismConfig
from datasets import Dataset
from transformers import HfArgumentParser, Trainer
from trl import SFTConfig

from hf_ext.trainers.overtone import (
    OvertoneConfig,
    OvertoneCurveCallback,
    OvertoneLoss,
    OvertoneSaturationCallback,
    OvertoneSettings,
    OvertoneStatistics,
)
from hf_ext.trainers.overtone.trainer import _reject_sequence_parallelism
from tests.trainers.overtone.helpers import make_args, make_trainer

OWN_FIELDS = {field.name for field in fields(OvertoneConfig)} - {field.name for field in fields(SFTConfig)}


def test_defaults_agree_with_the_loss_and_every_field_is_documented(tmp_path):
    config = make_args(tmp_path)
    assert config.overtone_settings() == OvertoneSettings()
    assert {
        *(field.name for field in fields(OvertoneSettings)),
        "edit_append_eos",
        "skip_saturated_steps",
        "stop_when_saturated",
        "saturation_min_steps",
        "saturation_patience",
    } == OWN_FIELDS
    help_texts = {field.name: field.metadata["help"] for field in fields(OvertoneConfig) if field.name in OWN_FIELDS}
    assert all(help_texts.values()) and not any("%" in text for text in help_texts.values())
    assert all(f"{name} (`" in OvertoneConfig.__doc__ for name in OWN_FIELDS)


def test_paper_like_preset_can_be_overridden(tmp_path):
    config = OvertoneConfig.paper_like(str(tmp_path), use_cpu=True, bf16=False, clip_epsilon=0.1)
    assert config.overtone_settings() == OvertoneSettings(0.1, 0.1, 0.5, require_top1=False)


def test_command_line_and_round_trip(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--mix_lambda", "0.3", "--n_sigma", "inf"]
    (config,) = HfArgumentParser(OvertoneConfig).parse_args_into_dataclasses(words)
    assert config.mix_lambda == 0.3 and math.isinf(config.n_sigma)
    stored = json.loads(config.to_json_string())
    assert {name: stored[name] for name in OWN_FIELDS} == {name: getattr(config, name) for name in OWN_FIELDS}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mix_lambda": -0.1}, "mix_lambda=-0.1 .* choose a value in"),
        ({"mix_lambda": 1.5}, "mix_lambda=1.5"),
        ({"clip_epsilon": -0.1}, "clip_epsilon=-0.1 .* >= 0"),
        ({"n_sigma": 0.0}, "n_sigma=0.0 .* > 0"),
        ({"valid_vocab_size": -3}, "valid_vocab_size=-3"),
        ({"saturation_patience": 0}, "saturation_patience=0: give at least 1"),
        ({"saturation_min_steps": -1}, "saturation_min_steps=-1"),
        ({"saturation_min_steps": 3, "stop_when_saturated": False}, "saturation_min_steps=3 has no effect"),
        ({"saturation_patience": 2, "stop_when_saturated": False}, "saturation_patience=2 has no effect"),
        ({"loss_type": "dft"}, "loss_type='dft': OVERTONE replaces the loss"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: OVERTONE replaces the loss"),
        ({"optim": "lomo"}, "optim=lomo .* set skip_saturated_steps=False"),
        ({"optim": "galore_adamw_layerwise"}, "optim=galore_adamw_layerwise"),
        ({"fp16": True, "max_grad_norm": 0.0}, "max_grad_norm=0 with fp16"),
    ],
)
def test_bad_values_are_named_with_a_remedy(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **overrides)


def test_remedies_work(tmp_path):
    make_args(tmp_path, optim="lomo", skip_saturated_steps=False)
    make_args(tmp_path, fp16=True, max_grad_norm=0.0, skip_saturated_steps=False)
    make_args(tmp_path, mix_lambda=0.0)


def test_trainer_rejects_what_it_would_ignore(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func: OVERTONE replaces the loss"):
        make_trainer(tmp_path, compute_loss_func=lambda *_, **__: None)
    plain = SFTConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="args is a SFTConfig: OvertoneTrainer takes OvertoneConfig"):
        type(make_trainer(tmp_path))(make_trainer(tmp_path).model, plain, train_dataset=Dataset.from_list([{}]))


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}, "already tokenised"),
        ({"messages": [{"role": "user", "content": "w1"}]}, "chat template"),
        ({"prompt": "w1 ", "completion": "w2", "images": "x.png"}, "vision dataset"),
    ],
)
def test_eos_option_is_rejected_where_it_has_no_effect(tmp_path, row, reason):
    with pytest.raises(ValueError, match=f"edit_append_eos=False has no effect: .*{reason}"):
        make_trainer(tmp_path, data=Dataset.from_list([row]), overrides={"edit_append_eos": False})


def test_eos_option_is_rejected_without_preparation(tmp_path):
    overrides = {"edit_append_eos": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(ValueError, match="skips the preparation"):
        make_trainer(tmp_path, overrides=overrides)


def test_deepspeed_sequence_parallelism_and_skipping_are_rejected(tmp_path, monkeypatch):
    config = ParallelismConfig(sp_size=2)
    with pytest.raises(ValueError, match="sp_size=2: OVERTONE replaces the loss"):
        _reject_sequence_parallelism(config)
    _reject_sequence_parallelism(None)
    _reject_sequence_parallelism(ParallelismConfig(cp_size=2))
    trainer = make_trainer(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="skip_saturated_steps=True: DeepSpeed"):
        trainer._reject_deepspeed_skipping()


def test_callbacks_and_criterion_reject_bad_arguments(tmp_path):
    statistics = OvertoneStatistics()
    with pytest.raises(ValueError, match="patience=0"):
        OvertoneSaturationCallback(statistics, patience=0)
    with pytest.raises(ValueError, match="positions=0"):
        OvertoneCurveCallback(statistics, positions=0)
    with pytest.raises(RuntimeError, match="no OVERTONE loss was recorded"):
        statistics.close_step(0)
    with pytest.raises(ValueError, match="not both"):
        OvertoneLoss(OvertoneSettings(), mix_lambda=0.3)
    with pytest.raises(ValueError, match="needs labels"):
        OvertoneLoss()({"logits": None}, None)
    assert issubclass(type(make_trainer(tmp_path)), Trainer)
