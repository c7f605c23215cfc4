"""Pictures: codes and back, the parts of first-party pipelines, and the posterior of VQ-Diffusion."""

import json

import numpy as np
import pytest
import torch
from diffusers import AmusedPipeline, VQModel
from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
    LearnedClassifierFreeSamplingEmbeddings,
    VQDiffusionPipeline,
)
from PIL import Image

from hf_ext.pipelines.dice import DiceMaskedImagePipeline, DiceVQDiffusionPipeline
from hf_ext.pipelines.dice.reference import LEAST, Kernel, log_posterior
from tests.pipelines.dice.kinds import KINDS, inverted, pipeline, seeded
from tests.pipelines.dice.models import amused_parts, vq_diffusion_parts

both_kinds = pytest.mark.parametrize("name", ["aMUSEd", "VQ-Diffusion"])


@both_kinds
def test_pictures_of_every_kind_are_the_same_codes(name):
    pipe = pipeline(name)
    values = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    given = {
        "PIL": [Image.fromarray(each) for each in values],
        "array": values.astype("float32") / 255,
        "tensor": torch.tensor(values).movedim(-1, 1) / 255,
    }
    codes = {kind: pipe.codes(image) for kind, image in given.items()}
    assert codes["PIL"].shape == (2, 8, 8) and codes["PIL"].dtype == torch.int64
    assert torch.equal(codes["PIL"], codes["array"]) and torch.equal(codes["PIL"], codes["tensor"])
    assert torch.equal(pipe.codes(codes["PIL"]), codes["PIL"])
    assert torch.equal(pipe.codes(given["PIL"][0]), codes["PIL"][:1])


@both_kinds
def test_codes_are_painted_as_diffusers_does(name):
    pipe, codes = pipeline(name), KINDS[name].sources()
    vqvae: VQModel = pipe.vqvae
    with torch.no_grad():
        latents = vqvae.quantize.get_codebook_entry(codes, (2, 8, 8, 8))
        plain = vqvae.decoder(vqvae.post_quant_conv(latents))
    expected = plain.clip(0, 1) if name == "aMUSEd" else (plain / 2 + 0.5).clip(0, 1)
    torch.testing.assert_close(pipe.pictures(codes, "pt"), expected)


def test_masks_that_are_left_are_painted():
    pipe = pipeline("VQ-Diffusion")
    codes = KINDS["VQ-Diffusion"].sources().clone()
    codes[:, 0] = 16
    assert pipe.pictures(codes, "pt").isfinite().all()


@both_kinds
def test_codes_out_of_the_codebook(name):
    for codes in (torch.full((1, 8, 8), 16), torch.full((1, 8, 8), -1), torch.zeros(8, 8, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"codes must be int64 \(B, h, w\) in \[0, 16\)"):
            pipeline(name).invert(codes, "red")


def test_a_decoder_that_cannot_do_with_half_precision():
    parts = amused_parts()
    parts["vqvae"].register_to_config(force_upcast=True)
    pipe = DiceMaskedImagePipeline(**parts).to(torch.float16)
    codes = pipe.codes(torch.rand(1, 3, 16, 16, generator=seeded(1)[0]))
    assert torch.equal(codes, pipeline("aMUSEd").codes(torch.rand(1, 3, 16, 16, generator=seeded(1)[0])))
    assert pipe.pictures(codes, "pt").dtype == torch.float32
    assert pipe.vqvae.dtype == torch.float16


def test_parts_of_first_party_pipelines():
    first = AmusedPipeline(**amused_parts())
    own = DiceMaskedImagePipeline.from_pipe(first)
    assert own.transformer is first.transformer and own.config.tau == 1.0
    own.set_progress_bar_config(disable=True)
    found = own.edit(
        inverted("aMUSEd", own, guidance_scale=1.0), "blue", lambda1=0.3, generator=seeded(), output_type="seq"
    )
    pipe = pipeline("aMUSEd")
    expected = pipe.edit(inverted("aMUSEd"), "blue", lambda1=0.3, generator=seeded(), output_type="seq")
    assert torch.equal(found.sequences, expected.sequences)
    learned = LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=16, length=8)
    parts = {**vq_diffusion_parts(), "learned_classifier_free_sampling_embeddings": learned}
    second = DiceVQDiffusionPipeline.from_pipe(VQDiffusionPipeline(**parts))
    assert second.learned_classifier_free_sampling_embeddings is learned
    trace = inverted("VQ-Diffusion", second, guidance_scale=3.0)
    assert torch.equal(trace.negative["encoder_hidden_states"], torch.zeros(2, 8, 16))


def test_learned_embeddings_come_back(tmp_path):
    """They are not a class that diffusers exports; a pipeline with them is saved and loaded all the same."""
    learned = LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=16, length=8)
    torch.nn.init.normal_(learned.embeddings)
    pipe = DiceVQDiffusionPipeline(**vq_diffusion_parts(), learned_classifier_free_sampling_embeddings=learned)
    pipe.save_pretrained(tmp_path)
    again = DiceVQDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.learned_classifier_free_sampling_embeddings.embeddings, learned.embeddings)


@pytest.mark.parametrize("library", ["vq_diffusion", "diffusers"])
def test_embeddings_of_published_checkpoints(library, tmp_path):
    """They name the module that diffusers has moved, or diffusers itself."""
    learned = LearnedClassifierFreeSamplingEmbeddings(learnable=True, hidden_size=16, length=8)
    name = "learned_classifier_free_sampling_embeddings"
    DiceVQDiffusionPipeline(**vq_diffusion_parts(), **{name: learned}).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index[name] = [library, "LearnedClassifierFreeSamplingEmbeddings"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = DiceVQDiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.learned_classifier_free_sampling_embeddings.embeddings, learned.embeddings)


def test_prompts_are_needed():
    for name in ("aMUSEd", "VQ-Diffusion"):
        pipe = pipeline(name)
        with pytest.raises(ValueError, match="source_prompt=None: give a prompt"):
            pipe(KINDS[name].sources(), target_prompt="blue")
        with pytest.raises(ValueError, match=r"target_prompt=.*None.*: give a prompt"):
            pipe(KINDS[name].sources(), source_prompt="red")


def test_dropout_is_off_while_residuals_are_recorded():
    parts = vq_diffusion_parts()
    for module in parts["transformer"].modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    parts["transformer"].train()
    pipe = DiceVQDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    one, two = (inverted("VQ-Diffusion", pipe, store_residuals=True).residuals for _ in range(2))
    assert torch.equal(one, two)


def test_sizes_that_the_model_does_not_paint():
    with pytest.raises(ValueError, match=r"image has \(4, 4\) codes and the model paints \(8, 8\)"):
        pipeline("VQ-Diffusion").invert(torch.rand(1, 3, 8, 8), "red")
    wide = pipeline("aMUSEd").invert(torch.rand(1, 3, 8, 32), "red", num_inference_steps=2)
    assert wide.notes["grid"] == [4, 16]
    assert pipeline("aMUSEd").reconstruct(wide, output_type="pt").images.shape == (1, 3, 8, 32)


@torch.no_grad()
@pytest.mark.parametrize("time", [1, 5, 11])
def test_posterior(time):
    """diffusers' posterior, with what it leaves at minus infinity bounded, is the one that was checked against the authors' code."""
    pipe = pipeline("VQ-Diffusion")
    trace = inverted("VQ-Diffusion", guidance_scale=1.0)
    tokens = trace.state(time)
    found = pipe._scores(trace, tokens, trace.source, time)
    steps = pipe.scheduler
    logs = (steps.log_at, steps.log_bt, steps.log_ct, steps.log_cumprod_at, steps.log_cumprod_bt, steps.log_cumprod_ct)
    kernel = Kernel(*(each.double().exp() for each in logs))
    log_x0 = pipe._denoise(trace, tokens, trace.source, time).double()
    expected = log_posterior(log_x0, tokens, time, kernel)
    assert found.min() >= LEAST and found.isfinite().all()
    # What is all but impossible is so in both.
    likely = expected > -15
    torch.testing.assert_close(found.double()[likely], expected[likely], rtol=0, atol=2e-3)
    assert (found[~likely] < -14).all()


@torch.no_grad()
def test_states_are_draws_of_the_forward_process():
    """In the first state little is noise, in the last all is masked; each is drawn on its own."""
    trace = inverted("VQ-Diffusion", sources=torch.randint(16, (8, 8, 8), generator=seeded(1)[0]))
    same = [(trace.state(number) == trace.tokens).float().mean().item() for number in range(12)]
    masked = [(trace.state(number) == 16).float().mean().item() for number in range(12)]
    assert same[0] > 0.99 and masked[-1] > 0.99
    for number in range(12):
        assert masked[number] == pytest.approx(number / 11, abs=0.08)
        assert same[number] == pytest.approx(1 - number / 11, abs=0.08)
    # Of the tokens masked in a state, some are not in the next: they are not nested.
    assert ((trace.state(5) == 16) & (trace.state(6) != 16)).any()


def test_truncation_is_applied_in_both_directions():
    for rate in (0.3, 0.8):
        trace = inverted("VQ-Diffusion", truncation_rate=rate)
        found = pipeline("VQ-Diffusion").reconstruct(trace, output_type="seq").sequences
        assert torch.equal(found.flatten(1), trace.tokens)
    results = [
        pipeline("VQ-Diffusion")
        .edit(
            inverted("VQ-Diffusion", truncation_rate=rate), "blue", lambda1=0.0, generator=seeded(), output_type="seq"
        )
        .sequences
        for rate in (0.2, 1.0)
    ]
    assert not torch.equal(*results)


def test_micro_conditioning_is_kept():
    trace = inverted("aMUSEd", micro_conditioning_aesthetic_score=3, micro_conditioning_crop_coord=(1, 2))
    assert trace.source["micro_conds"].tolist() == [[16, 16, 1, 2, 3]] * 2
    told = pipeline("aMUSEd")._conditions(trace, ["blue", "blue"])
    assert torch.equal(told["micro_conds"], trace.source["micro_conds"])
