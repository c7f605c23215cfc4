"""What every pipeline of DICE refuses, and says why."""

import inspect
import math

import pytest
import torch
from diffusers import AmusedScheduler, VQDiffusionScheduler
from safetensors.torch import save_file

from hf_ext.pipelines.dice import DiceTrace
from tests.pipelines.dice.kinds import KINDS, every_kind, inverted, pipeline, seeded, sequences


@every_kind
def test_traces_of_another_model_are_refused(name):
    trace = inverted(name)
    other = KINDS[name].pipeline()
    with torch.no_grad():
        next(each for each in other._denoiser().parameters() if each.ndim > 1).add_(1.0)
    with pytest.raises(ValueError, match="recorded with another model"):
        sequences(name, trace, other)
    with pytest.raises(ValueError, match="recorded with another pipeline"):
        different = "aMUSEd" if KINDS[name].is_text else "masked text"
        sequences(different, trace)


def test_traces_of_another_scheduler_are_refused():
    others = {
        "aMUSEd": AmusedScheduler(mask_token_id=0),
        "VQ-Diffusion": VQDiffusionScheduler(num_vec_classes=17, num_train_timesteps=12, alpha_cum_start=0.9),
    }
    for name, scheduler in others.items():
        other = KINDS[name].pipeline()
        other.scheduler = scheduler
        with pytest.raises(ValueError, match=r"recorded with another .*scheduler"):
            sequences(name, inverted(name), other)


@every_kind
def test_arguments_of_edit_are_checked(name):
    trace, pipe = inverted(name), pipeline(name)

    def refused(match, target_prompt="x", **options):
        with pytest.raises(ValueError, match=match):
            pipe.edit(trace, target_prompt, **options)

    refused("lambda1=-0.1: give a finite number", lambda1=-0.1)
    refused("lambda2=nan: give a finite number", lambda2=math.nan)
    refused("lambda1=1.5 is above 1", lambda1=1.5)
    refused(r"lambda1 has the shape \(2, 3\)", lambda1=torch.ones(2, 3))
    refused("lambda1 has 3 rows", lambda1=[0.1, 0.2, 0.3])
    refused("target_prompt has 3 rows", target_prompt=["x", "y", "z"])
    refused("generator has 3 entries and there are 2 rows", generator=seeded(3))
    refused("injection='sum' is unknown", injection="sum")
    refused("lambda_schedule='cosine' is unknown", lambda_schedule="cosine")
    refused("output_type='latent' is unknown", output_type="latent")
    refused("callback_on_step_end_tensor_inputs='x' is unknown", callback_on_step_end_tensor_inputs=["x"])


@every_kind
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tau": 0.0}, r"tau=0.0: give a number in \(0, 1\]"),
        ({"tau": 1.5}, r"tau=1.5: give a number in \(0, 1\]"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf: give a finite number"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan: give a finite number"),
        ({"anchor_floor": 1.0}, "anchor_floor=1.0: give a negative number"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: give a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5: give a whole number"),
        ({"mask_schedule": "square"}, "mask_schedule='square' is unknown"),
        ({"anchor": "none"}, "anchor='none' is unknown"),
        ({"temperatures": (0.0, 1.0)}, "give two positive numbers"),
        ({"truncation_rate": 0.0}, r"truncation_rate=0.0: give a number in \(0, 1\]"),
        ({"generator": seeded(3)}, "generator has 3 entries and there are 2 rows"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_arguments_of_invert_are_checked(name, options, match):
    """Each pipeline takes what it can use, and nothing else."""
    accepted = inspect.signature(KINDS[name].cls.invert).parameters
    kind, expected = (ValueError, match) if set(options) <= set(accepted) else (TypeError, "unexpected keyword")
    with pytest.raises(kind, match=expected):
        inverted(name, **options)


def test_files_that_are_no_traces(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no trace of format 1"):
        DiceTrace.load(tmp_path / "other.safetensors")
    inverted("masked text").save(tmp_path / "trace.safetensors")
    whole = (tmp_path / "trace.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no trace, or only a part of one"):
        DiceTrace.load(tmp_path / "half.safetensors")
    with pytest.raises(FileNotFoundError):
        DiceTrace.load(tmp_path / "absent.safetensors")
