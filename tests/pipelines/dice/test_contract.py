"""What every pipeline of DICE keeps to."""

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import PipelineCallback

from hf_ext.pipelines.dice import DiceTrace
from tests.pipelines.dice.kinds import KINDS, every_kind, inverted, pipeline, seeded, sequences

# One of texts, one of pictures, one of multinomial diffusion.
some_kinds = pytest.mark.parametrize("name", ["masked text", "aMUSEd, guided", "VQ-Diffusion"])


def original(trace):
    return trace.tokens.unflatten(-1, trace.notes["grid"]) if "grid" in trace.notes else trace.tokens


# -- reconstruction ----------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2])
def test_reconstruction_is_exact(name, dtype, rows):
    """Models with random weights repeat nothing of what they see."""
    pipe = pipeline(name) if dtype == torch.float32 else KINDS[name].pipeline().to(dtype)
    trace = inverted(name, pipe, KINDS[name].sources()[:rows])
    found = pipe.reconstruct(trace, output_type="seq").sequences
    assert torch.equal(found, original(trace))
    # The model alone, with the same noise, comes to something else.
    assert not torch.equal(sequences(name, trace, pipe, lambda1=0.0), original(trace))


MASKED = [name for name in KINDS if not name.startswith("VQ")]


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize(
    "options",
    [
        dict(anchor="corrected", tau=1.0),
        dict(anchor="onehot", tau=0.05),
        dict(anchor="onehot", anchor_floor=-0.5, mask_schedule="cosine"),
        dict(anchor="corrected", temperatures=(0.2, 1.2), mask_schedule="root"),
        dict(guidance_scale=4.0, temperatures=(1.2, 0.2), mask_schedule="early_root"),
        dict(carry_over=True, tau=1.0),
        dict(carry_over=True, tau=0.6, anchor="corrected", mask_schedule="cosine"),
        dict(num_inference_steps=1, tau=1.0, mask_schedule="late_cosine"),
    ],
    ids=str,
)
def test_reconstruction_is_exact_with_all_settings(name, options):
    if name == "DiffusionGemma" and "guidance_scale" in options:
        with pytest.raises(ValueError, match="has no guidance; leave it at 1"):
            inverted(name, **options)
        return
    trace = inverted(name, **options)
    found = pipeline(name).reconstruct(trace, output_type="seq").sequences
    assert torch.equal(found, original(trace))


@pytest.mark.parametrize("name", MASKED)
def test_the_published_anchor_loses_what_the_model_does_not_repeat(name):
    trace = inverted(name, anchor="model")
    assert not torch.equal(pipeline(name).reconstruct(trace, output_type="seq").sequences, original(trace))


@every_kind
def test_a_model_in_training_mode_is_asked_without_dropout(name):
    pipe = KINDS[name].pipeline()
    pipe._denoiser().train()
    trace = inverted(name, pipe)
    assert torch.equal(pipe.reconstruct(trace, output_type="seq").sequences, original(trace))
    assert torch.equal(sequences(name, trace, pipe), sequences(name, inverted(name)))
    assert pipe._denoiser().training


# -- editing -----------------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("lambda1", [0.0, 0.3, 1.0])
def test_stored_residuals_give_the_same(name, lambda1):
    lazy, stored = inverted(name), inverted(name, store_residuals=True)
    assert lazy.residuals is None and stored.residuals.isfinite().all()
    states, rows, count, values = stored.residuals.shape
    assert (states, rows, count) == (len(lazy.states), *lazy.tokens.shape)
    assert stored.nbytes - lazy.nbytes == 4 * states * rows * count * values
    assert torch.equal(sequences(name, lazy, lambda1=lambda1), sequences(name, stored, lambda1=lambda1))


@every_kind
def test_a_batch_is_its_rows(name):
    sources = KINDS[name].sources()
    together = inverted(name)
    found = sequences(name, together, lambda1=0.2)
    for row in range(2):
        alone = inverted(name, sources=sources[row : row + 1], generator=seeded(1, row))
        own = sequences(name, alone, lambda1=0.2, generator=seeded(1, 5 + row))
        count = own.shape[1] if KINDS[name].is_text else None
        assert torch.equal(found[row : row + 1, :count], own)
        assert torch.equal(together.tokens[row, :count], alone.tokens[0])


@every_kind
def test_one_inversion_many_edits(name):
    """Prompts and strengths in one batch, with the residuals of one row."""
    source, (before, after) = KINDS[name].sources()[:1], KINDS[name].prompts
    trace = inverted(name, sources=source)
    prompts, strengths = [after, before, after], [0.1, 0.3, 1.0]
    found = sequences(name, trace, target_prompt=prompts, lambda1=strengths, generator=seeded(3))
    for row in range(3):
        own = sequences(name, trace, target_prompt=prompts[row], lambda1=strengths[row], generator=seeded(1, row))
        assert torch.equal(found[row : row + 1], own)
    swept = sequences(name, trace, lambda1=strengths, lambda2=0.0, generator=None)
    assert len(swept) == 3 and torch.equal(swept[1:2], sequences(name, trace, lambda1=0.3, lambda2=0.0))


@every_kind
def test_strength_by_position(name):
    trace = inverted(name)
    count = trace.tokens.shape[1]
    half = torch.full((1, count), 0.3)
    assert torch.equal(sequences(name, trace, lambda1=half), sequences(name, trace, lambda1=0.3))
    # Full strength and no noise under the recorded prompt, but for the first positions.
    kept = torch.ones(1, count)
    kept[:, :3] = 0.0
    found = sequences(name, trace, lambda1=kept, target_prompt=KINDS[name].prompts[0]).flatten(1)
    assert not torch.equal(found[:, :3], trace.tokens[:, :3])


@every_kind
def test_padding_and_what_is_not_edited_stays(name):
    trace = inverted(name)
    found = sequences(name, trace, lambda1=0.0).flatten(1)
    assert torch.equal(found[~trace.editable], trace.tokens[~trace.editable])
    if KINDS[name].is_text:
        assert (~trace.editable).any()
        usual = set(pipeline(name)._ordinary.tolist())
        assert set(found[trace.editable].tolist()) <= usual


@pytest.mark.parametrize("name", MASKED)
def test_what_is_carried_over(name):
    """What no state replaces stays, and what a state leaves is not predicted again."""
    trace = inverted(name, carry_over=True, tau=0.5)
    found = sequences(name, trace, lambda1=0.0).flatten(1)
    never = trace.uniforms > 0.5
    assert torch.equal(found[never], trace.tokens[never]) and not torch.equal(found, trace.tokens)
    steps = (
        pipeline(name)
        .edit(
            trace, KINDS[name].prompts[1], lambda1=0.0, generator=seeded(), output_type="seq", return_trajectory=True
        )
        .trajectory.flatten(2)
    )
    if name != "DiffusionGemma":
        for step, number in enumerate(reversed(range(1, len(trace.states)))):
            settled = trace.uniforms > trace.states[number - 1].fraction
            assert torch.equal(steps[step][settled], steps[-1][settled])


@every_kind
def test_injections_and_schedules(name):
    trace = inverted(name)
    variants = {
        (injection, schedule): sequences(name, trace, lambda1=0.4, injection=injection, lambda_schedule=schedule)
        for injection in ("add", "variance_preserving", "max")
        for schedule in ("constant", "linear", "exp")
    }
    assert len({each.flatten().numpy().tobytes() for each in variants.values()}) > 1
    whole = dict(lambda1=1.0, lambda2=0.0)
    assert torch.equal(
        sequences(name, trace, **whole, injection="variance_preserving"), sequences(name, trace, **whole)
    )


@every_kind
def test_seeds(name):
    trace = inverted(name)
    one, again, other = (
        sequences(name, trace, lambda1=0.1, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    middle = len(trace.states) // 2
    states = [inverted(name, generator=torch.Generator().manual_seed(seed)).state(middle) for seed in (1, 1, 2)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


# -- callbacks, outputs ------------------------------------------------------------------------------------------------------


@every_kind
def test_trajectory_and_callbacks(name):
    trace = inverted(name)
    pipe, target = pipeline(name), KINDS[name].prompts[1]
    seen = []

    def look(own, step, time, given):
        assert own is pipe and set(given) == {"tokens", "logits", "residual"}
        assert given["logits"].shape == given["residual"].shape == (*given["tokens"].shape, given["logits"].shape[-1])
        seen.append((step, given["tokens"]))

    names = ["tokens", "logits", "residual"]
    options = dict(generator=seeded(2, 5), lambda1=0.2)
    found = pipe.edit(
        trace, target, return_trajectory=True, output_type="seq", callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names, **options,
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(len(found.trajectory)))
    assert torch.equal(found.trajectory[-1].flatten(1), found.sequences.flatten(1))
    if name != "DiffusionGemma":
        for (_, tokens), expected in zip(seen, found.trajectory, strict=True):
            assert torch.equal(tokens, expected.flatten(1))
    shown = pipe.edit(trace, target, return_trajectory=True, generator=seeded(2, 5), lambda1=0.2)
    assert len(shown.trajectory) == len(found.trajectory) and len(shown.trajectory[0]) == 2
    as_tuple = pipe.edit(trace, target, return_dict=False, generator=seeded(2, 5), lambda1=0.2)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], found.sequences)


@every_kind
def test_callbacks_may_change_tokens_and_strengths(name):
    trace, pipe, source = inverted(name), pipeline(name), KINDS[name].prompts[0]

    def back(own, step, time, given):
        return {"tokens": torch.ones_like(given["tokens"])}

    found = pipe.edit(trace, source, lambda1=0.5, callback_on_step_end=back, output_type="seq", generator=seeded())
    tokens = found.sequences.flatten(1)
    assert (tokens[trace.editable] == 1).all() and torch.equal(tokens[~trace.editable], trace.tokens[~trace.editable])

    class Full(PipelineCallback):
        tensor_inputs: ClassVar[list[str]] = ["tokens"]

        def callback_fn(self, own, step, time, given):
            own._lambda1, own._lambda2 = 0.0, 1.0
            return given

    changed = sequences(name, trace, lambda1=1.0, lambda2=0.0, callback_on_step_end=Full())
    assert not torch.equal(changed, sequences(name, trace, lambda1=1.0, lambda2=0.0))


def test_outputs():
    kind = KINDS["aMUSEd"]
    trace, pipe = inverted("aMUSEd"), pipeline("aMUSEd")
    pictures = {each: pipe.reconstruct(trace, output_type=each).images for each in ("pil", "np", "pt")}
    assert pictures["pt"].shape == (2, 3, 16, 16) and pictures["np"].shape == (2, 16, 16, 3)
    assert pictures["pil"][0].size == (16, 16)
    assert torch.equal(
        pipe.invert(pictures["pt"], kind.prompts[0], num_inference_steps=2).tokens,
        pipe.codes(pictures["pt"]).flatten(1),
    )
    assert pipeline("masked text").reconstruct(inverted("masked text")).texts == KINDS["masked text"].sources()


@every_kind
def test_call_is_invert_and_edit(name):
    kind, pipe = KINDS[name], pipeline(name)
    key = "text" if kind.is_text else "image"
    options = dict(output_type="seq", lambda1=0.3)
    found = pipe(
        **{key: kind.sources()}, source_prompt=kind.prompts[0], target_prompt=kind.prompts[1],
        generator=seeded(), **options, **kind.inversion,
    )  # fmt: skip
    generators = seeded()
    trace = inverted(name, generator=generators)
    assert torch.equal(found.sequences, sequences(name, trace, generator=generators, **options))
    assert torch.equal(
        pipe(trace=trace, target_prompt=kind.prompts[1], generator=seeded(), **options).sequences,
        sequences(name, trace, generator=seeded(), **options),
    )
    with pytest.raises(ValueError, match=f"give either {key}= or trace="):
        pipe(target_prompt="x")
    with pytest.raises(ValueError, match=f"give either {key}= or trace="):
        pipe(kind.sources(), trace=trace, target_prompt="x")
    with pytest.raises(ValueError, match="tau, source_prompt: a trace has its own"):
        pipe(trace=trace, source_prompt="x", target_prompt="x", tau=0.5)


# -- files -------------------------------------------------------------------------------------------------------------------


@every_kind
def test_traces_are_saved_and_loaded(name, tmp_path):
    for number, options in enumerate([{}, {"store_residuals": True}]):
        trace = inverted(name, **options)
        trace.save(tmp_path / f"{number}.safetensors")
        assert [each.name for each in tmp_path.iterdir() if each.suffix != ".safetensors"] == []
        loaded = DiceTrace.load(tmp_path / f"{number}.safetensors")
        assert type(loaded) is type(trace) and loaded.settings == trace.settings and loaded.notes == trace.notes
        assert torch.equal(sequences(name, loaded), sequences(name, trace))


@every_kind
def test_pipelines_are_saved_and_loaded(name, tmp_path):
    trace = inverted(name)
    expected = sequences(name, trace)
    KINDS[name].pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == KINDS[name].cls.__name__ and index["tau"] == pipeline(name).config.tau
    for cls in (KINDS[name].cls, DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path)
        assert type(loaded) is KINDS[name].cls
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(sequences(name, trace, loaded), expected)


# -- what else pipelines can do ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aMUSEd, guided", "VQ-Diffusion"])
def test_group_offload(name):
    pipe = KINDS[name].pipeline()
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(sequences(name, inverted(name, pipe), pipe), sequences(name, inverted(name)))


@some_kinds
def test_device_map(name, tmp_path):
    KINDS[name].pipeline().save_pretrained(tmp_path)
    pipe = KINDS[name].cls.from_pretrained(tmp_path, device_map="balanced")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(sequences(name, inverted(name, pipe), pipe), sequences(name, inverted(name)))


@some_kinds
def test_compiled_models(name):
    pipe = KINDS[name].pipeline()
    part = "model" if KINDS[name].is_text else "transformer"
    setattr(pipe, part, torch.compile(getattr(pipe, part), backend="eager"))
    trace = inverted(name, pipe)
    assert torch.equal(sequences(name, trace, pipe), sequences(name, inverted(name)))
    # The same weights, so that the trace fits the model that is not compiled, too.
    assert torch.equal(sequences(name, trace), sequences(name, inverted(name)))
    torch._dynamo.reset()


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("offload", [False, True])
def test_on_an_accelerator(name, offload):
    """Generators of the CPU draw the same there; a trace is replayed wherever the pipeline is."""
    if not torch.cuda.is_available():
        pytest.skip("needs an accelerator")
    pipe = KINDS[name].pipeline()
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda")
    trace = inverted(name, pipe)
    half = torch.full((1, trace.tokens.shape[1]), 0.5)
    assert torch.equal(pipe.reconstruct(trace, output_type="seq").sequences.cpu(), original(trace).cpu())
    found = sequences(name, trace, pipe, lambda1=half)
    assert found.device.type == "cuda" and torch.equal(trace.state(1).cpu(), inverted(name).state(1))
    assert torch.equal(pipe.reconstruct(inverted(name), output_type="seq").sequences.cpu(), original(trace).cpu())


@every_kind
def test_a_trace_of_another_precision(name):
    """What the model was told is told again in the precision of the model."""
    pipe = KINDS[name].pipeline().to(torch.bfloat16)
    found = pipe.reconstruct(inverted(name), output_type="seq").sequences
    assert torch.equal(found, original(inverted(name)))


def test_values_of_numpy(tmp_path):
    trace = inverted("masked text", tau=np.float32(0.5), num_inference_steps=5.0)
    trace.save(tmp_path / "trace.safetensors")
    assert DiceTrace.load(tmp_path / "trace.safetensors").settings.num_inference_steps == 5
    one = inverted("masked text", sources=["good film ."])
    strengths = np.array([0.1, 0.5, 0.9])
    found = sequences("masked text", one, lambda1=strengths, generator=tuple(seeded(3)))
    assert torch.equal(found, sequences("masked text", one, lambda1=[0.1, 0.5, 0.9], generator=seeded(3)))
