"""Arguments: defaults, the command line, and every rejected value."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields

import pytest
from trl import DPOConfig, TrlParser

from hf_ext.trainers.flat import FlatConfig, UnlearnConfig, baselines
from hf_ext.trainers.flat.config import _WITHOUT_EFFECT
from hf_ext.trainers.flat.methods import COEFFICIENTS, METHODS
from tests.trainers.flat.helpers import make_args

INHERITED = {field.name: field for field in fields(DPOConfig)}
OWN_FIELDS = {field.name for field in fields(UnlearnConfig)} - set(INHERITED) | {"learning_rate", "loss_type"}


def test_every_field_is_documented():
    help_texts = {field.name: field.metadata["help"] for field in fields(UnlearnConfig) if field.name in OWN_FIELDS}
    assert help_texts.keys() == OWN_FIELDS
    assert all(help_texts.values()) and not any("%" in text for text in help_texts.values())
    assert all(f"{name} (`" in UnlearnConfig.__doc__ for name in OWN_FIELDS)
    assert all(f'"{name}"' in UnlearnConfig.__doc__ for name in METHODS)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("flat", "ceu", "rmu")])
def test_defaults_are_those_of_the_pure_functions(tmp_path, name):
    function = {"gradient_difference": "gradient_ascent"}.get(name, name)
    parameters = inspect.signature(getattr(baselines, function)).parameters.values()
    numbers = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not None}
    assert make_args(tmp_path, loss_type=name).forget_arguments() == numbers
    assert COEFFICIENTS[name] == baselines.DEFAULT_COEFFICIENTS[name]


def test_defaults_of_flat(tmp_path):
    config = FlatConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert config.forget_arguments() == {
        "divergence": "kl",
        "template_probability": "mean",
        "forget_probability": "mean",
        "padded_length": None,
        "template_coef": 1.0,
        "forget_coef": 1.0,
    }
    assert config.learning_rate == 1e-5 and config.weights(False) == (1.0, 0.0) and config.weights(True) == (1.0, 1.0)


def test_weights_follow_the_method_and_the_user(tmp_path):
    assert make_args(tmp_path, loss_type="simnpo").weights(True) == (0.125, 1.0)
    assert make_args(tmp_path, loss_type="ceu").weights(True) == (1.0, 0.0)
    own = make_args(tmp_path, loss_type="satimp", forget_coef=0.5, retain_coef=2.0)
    assert own.weights(True) == (0.5, 2.0) and own.weights(False) == (0.5, 0.0)


def test_command_line_and_round_trip(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--loss_type", "npo"]
    words += ["--loss_kwargs", '{"beta": 0.3}', "--retain_coef", "0.5", "--retain_loss", "kl"]
    (config,) = TrlParser(UnlearnConfig).parse_args_and_config(words)
    assert config.loss_type == "npo" and config.forget_arguments() == {"beta": 0.3}
    assert (config.retain_coef, config.retain_loss) == (0.5, "kl")
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--divergence", "tv"]
    words += ["--template_answers", "refusals.txt", "--padded_length", "2048", "--templates_per_example", "3"]
    (config,) = TrlParser(FlatConfig).parse_args_and_config(words)
    assert config.template_answers == "refusals.txt" and config.forget_arguments()["padded_length"] == 2048
    stored = json.loads(config.to_json_string())
    assert {name: stored[name] for name in OWN_FIELDS} == {name: getattr(config, name) for name in OWN_FIELDS}


def test_configuration_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nloss_type: idk_dpo\nloss_kwargs:\n  beta: 0.2\n"
        'template_answers:\n  - "I don\'t know."\n  - Ask someone else.\n'
    )
    (config,) = TrlParser(UnlearnConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    assert config.forget_arguments() == {"beta": 0.2} and config.template_answers[1] == "Ask someone else."


@pytest.mark.parametrize("name", _WITHOUT_EFFECT)
def test_inherited_fields_without_effect_are_rejected(tmp_path, name):
    values = {
        "loss_weights": [0.5],
        "f_divergence_type": "js_divergence",
        "ld_alpha": 0.5,
        "ref_model_sync_steps": 7,
        "use_weighting": True,
        "sync_ref_model": True,
        "precompute_ref_log_probs": True,
    }
    with pytest.raises(ValueError, match=f"{name}=.* has no effect on FLAT, which is reference-free"):
        make_args(tmp_path, **{name: values.get(name, 0.77)})
    with pytest.raises(ValueError, match=f"{name}=.* has no effect on npo: use loss_kwargs"):
        make_args(tmp_path, loss_type="npo", **{name: values.get(name, 0.77)})


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"loss_kwargs": {"beta": 1.0}}, "no effect on flat, which has fields of its own: divergence"),
        ({"divergence": "chi"}, "divergence='chi' is unknown: choose one of kl, js"),
        ({"template_probability": "sum"}, "template_probability='sum' is unknown: choose one of mean, geometric"),
        ({"forget_probability": "sum"}, "forget_probability='sum'"),
        ({"template_coef": -1.0}, "template_coef=-1.0 turns its term round"),
        ({"forget_coef": -1.0}, "forget_coef=-1.0"),
        ({"retain_coef": float("nan")}, "retain_coef=nan"),
        ({"templates_per_example": 0}, "templates_per_example=0"),
        ({"template_answers": []}, "template_answers is empty"),
        ({"retain_loss": "mse"}, "retain_loss='mse' is unknown: choose one of nll, kl"),
        ({"padded_length": 100}, "padded_length=100 is shorter than max_length=1024 less one"),
        (
            {"padded_length": 20, "max_length": 21, "pad_to_multiple_of": 32},
            "padded_length=20 is shorter than max_length=21 padded to a multiple of 32 and less one",
        ),
        ({"padded_length": 100, "max_length": None}, "padded_length=100 is shorter than max_length=None"),
        ({"padded_length": 2000, "template_probability": "geometric"}, "padded_length=2000 .*excludes the geometric"),
        ({"loss_type": "npo", "loss_kwargs": {"beta": 0}}, r"loss_kwargs\['beta'\]=0: npo needs a number > 0"),
        ({"loss_type": "wga", "loss_kwargs": {"beta": -1}}, "wga needs a number >= 0"),
        ({"loss_type": "wga", "loss_kwargs": {"beta": "1"}}, r"loss_kwargs\['beta'\]='1'"),
        ({"loss_type": "wga", "loss_kwargs": {"gamma": 1}}, "unknown name.* gamma for wga, which takes: beta"),
        ({"loss_type": "gradient_ascent", "loss_kwargs": {"beta": 1}}, "which takes: none"),
        ({"loss_type": "rmu", "loss_kwargs": {"layer": 1.5}}, "rmu needs an integer >= 0"),
        ({"loss_type": "ceu", "loss_kwargs": {"ignore_first": True}}, "ceu needs an integer >= 0"),
        ({"loss_type": "rmu", "retain_loss": "kl"}, "retain_loss='kl' has no effect on rmu"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0: give a number > 0"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "='group_by_length' sorts by .*: choose random or sequential",
        ),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy='batch_rebalance'"),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size=4 has no effect on flat, which computes no"),
        ({"loss_type": "undial", "precompute_ref_batch_size": 4}, "has no effect on undial"),
        ({"loss_type": "npo", "divergence": "tv"}, "divergence='tv' belongs to flat and has no effect on npo"),
        ({"loss_type": "npo", "templates_per_example": 2}, "has no effect on npo, which uses no refusals"),
    ],
)
def test_bad_values_are_named_with_a_remedy(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **overrides)


@pytest.mark.parametrize("loss_type", ["sigmoid", ["flat"], None])
def test_unknown_losses_are_listed(tmp_path, loss_type):
    with pytest.raises(ValueError, match=r"is unknown: choose one of flat, gradient_ascent, .*, rmu\."):
        UnlearnConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type=loss_type)


def test_flat_config_is_flat(tmp_path):
    with pytest.raises(ValueError, match="loss_type='npo': FlatConfig is FLAT; use UnlearnConfig"):
        FlatConfig(str(tmp_path), use_cpu=True, bf16=False, loss_type="npo")


def test_remedies_work(tmp_path):
    make_args(tmp_path, padded_length=1023)
    make_args(tmp_path, padded_length=20, max_length=21)
    make_args(tmp_path, padded_length=31, max_length=21, pad_to_multiple_of=32)
    make_args(tmp_path, loss_type="npo", precompute_ref_batch_size=4)
    make_args(tmp_path, train_sampling_strategy="sequential")
    assert "less one" in UnlearnConfig.__dataclass_fields__["padded_length"].metadata["help"]
    make_args(tmp_path, loss_type="wga", loss_kwargs={"beta": 0})
    make_args(tmp_path, loss_type="ceu", loss_kwargs='{"ignore_first": 0}')
