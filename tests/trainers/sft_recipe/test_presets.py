"""Presets: the numbers of the study, batches that come out exactly, and a floor under the steps of an epoch."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.trainers.sft_recipe import PRESETS, plan_batch, sft_recipe
from hf_ext.trainers.sft_recipe.presets import batch_for


def effective(args, world_size=1):
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size


@pytest.mark.parametrize(
    ("name", "batch", "schedule"),
    [
        ("lab", 3840, "constant"),
        ("lab_8k", 7680, "constant"),
        ("tulu", 128, "linear"),
        ("small_data", 256, "constant"),
    ],
)
def test_the_numbers_of_the_study(tmp_path, name, batch, schedule):
    args = sft_recipe(name, str(tmp_path), 1_000_000, world_size=8, per_device=4, bf16=False)
    assert effective(args, 8) == batch and args.per_device_train_batch_size == 4
    assert args.lr_scheduler_type == schedule and args.learning_rate == PRESETS[name].learning_rate
    assert (args.weight_decay, args.adam_beta2) == (0.0, 0.95)
    assert args.warmup_steps == (0.03 if name == "tulu" else 0) and args.get_warmup_steps(1000) in (0, 30)


def test_settings_can_be_replaced(tmp_path):
    args = sft_recipe("lab", str(tmp_path), 1_000_000, learning_rate=1e-6, num_train_epochs=2, bf16=False)
    assert (args.learning_rate, args.num_train_epochs) == (1e-6, 2)


@pytest.mark.parametrize(("samples", "batch"), [(100, 32), (700, 64), (5_000, 128), (50_000, 256)])
def test_the_batch_grows_with_the_data(samples, batch):
    assert batch_for(samples) == batch


def test_small_data_do_not_get_large_batches(tmp_path):
    with pytest.warns(
        UserWarning, match=r"1000 samples in batches of 3840 would be 0.3 steps per epoch: the batch is 48"
    ):
        args = sft_recipe("lab", str(tmp_path), 1000, bf16=False)
    assert effective(args) == 48 and args.per_device_train_batch_size == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert effective(sft_recipe("tulu", str(tmp_path), 128 * 20, bf16=False)) == 128


@given(share=st.integers(1, 500), world_size=st.integers(1, 16), per_device=st.integers(1, 64))
def test_the_plan_is_exact(share, world_size, per_device):
    size, accumulation = plan_batch(share * world_size, world_size, per_device)
    assert size * accumulation == share and size <= per_device
    assert not any(share % larger == 0 for larger in range(size + 1, min(per_device, share) + 1))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: plan_batch(10, 4, 2), "effective=10 samples cannot be shared by 4 processes: take 8 or 12"),
        (lambda: plan_batch(0, 1, 1), "effective=0"),
        (lambda: plan_batch(4, 1, 0), "per_device=0"),
        (
            lambda: sft_recipe("best", "out", 10),
            "the recipe 'best' is unknown: choose one of lab, lab_8k, tulu, small_data",
        ),
        (lambda: sft_recipe("lab", "out", 3, world_size=4), "samples=3 is less than one for each of 4 processes"),
    ],
)
def test_bad_input(call, named):
    with pytest.raises(ValueError, match=named):
        call()
