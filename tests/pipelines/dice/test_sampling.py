"""Without the residual, DICE is ordinary sampling: that of masked models, and that of diffusers' own scheduler."""

import pytest
import torch
from diffusers.schedulers import scheduling_vq_diffusion
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import pad

from hf_ext.pipelines.dice.noise import lengths_of, uniform_rows
from tests.pipelines.dice.kinds import KINDS, inverted, pipeline, seeded


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_masked_sampling(schedule):
    """Predict all tokens, draw them, put noise back on fewer positions; written out for one text."""
    pipe, target = pipeline("masked text"), KINDS["masked text"].prompts[1]
    trace = inverted("masked text", sources=["the film was so good ."], mask_schedule=schedule, tau=0.8)
    found = pipe.edit(trace, target, lambda1=0.0, lambda2=1.0, generator=seeded(1)).sequences
    ids = pipe.tokenizer(target, "the film was so good .", return_tensors="pt")["input_ids"]
    place = slice(ids.shape[1] - 1 - trace.tokens.shape[1], -1)
    generator = torch.Generator().manual_seed(0)
    shares = torch.linspace(0, 0.8, 5, dtype=torch.float64)
    if schedule == "cosine":
        shares = 1 - torch.cos(torch.pi * shares / 2)
    tokens = torch.where(trace.uniforms <= shares[-1], trace.noise, trace.tokens)
    usual = pipe._ordinary
    for step in reversed(range(5)):
        ids[:, place] = tokens
        logits = pipe.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, place][..., usual]
        uniforms = torch.rand(tokens.shape[1], len(pipe.tokenizer), generator=generator)
        noise = -torch.log(-torch.log(uniforms + 1e-20) + 1e-20)
        tokens = usual[(logits + noise[:, usual]).argmax(-1)]
        if step:
            tokens = torch.where(trace.uniforms <= shares[step - 1], trace.noise, tokens)
    assert torch.equal(found, tokens)


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_multinomial_sampling_is_that_of_the_scheduler(guidance_scale, monkeypatch):
    pipe, target = pipeline("VQ-Diffusion"), KINDS["VQ-Diffusion"].prompts[1]
    trace = inverted("VQ-Diffusion", guidance_scale=guidance_scale)
    draws = []
    own = pipe._gumbel

    def recorded(*arguments):
        draws.append(own(*arguments))
        return draws[-1]

    monkeypatch.setattr(pipe, "_gumbel", recorded)
    found = pipe.edit(
        trace, target, lambda1=0.0, lambda2=1.0, generator=seeded(), return_trajectory=True, output_type="seq"
    )
    noise = iter(draws)
    monkeypatch.setattr(
        scheduling_vq_diffusion,
        "gumbel_noised",
        lambda logits, generator: logits + next(noise).mT[:, : logits.shape[1]],
    )
    told, null = pipe._condition([target] * 2), pipe._condition([""] * 2)
    tokens = trace.state(len(trace.states) - 1)
    for step, time in enumerate(reversed(range(len(trace.states)))):
        at = torch.tensor(time)
        log = pipe.transformer(tokens, timestep=at, **told).sample
        if guidance_scale != 1:
            other = pipe.transformer(tokens, timestep=at, **null).sample
            log = (other + guidance_scale * (log - other)).log_softmax(1)
        tokens = pipe.scheduler.step(log.clamp(-70), time, tokens).prev_sample
        assert torch.equal(found.trajectory[step].flatten(1), tokens)


@pytest.mark.parametrize("name", ["masked text", "aMUSEd", "VQ-Diffusion"])
def test_guidance_of_one_is_none(name):
    same_anchor = {} if name == "VQ-Diffusion" else {"anchor": "onehot"}
    traces = [inverted(name, guidance_scale=scale, **same_anchor) for scale in (1.0, 1.0 + 1e-7)]
    assert [bool(trace.negative) for trace in traces] == [False, True]
    options = dict(lambda1=0.3, output_type="seq")
    found = [pipeline(name).edit(each, KINDS[name].prompts[1], generator=seeded(), **options) for each in traces]
    assert torch.equal(found[0].sequences, found[1].sequences)


def test_residuals_of_a_guided_model_are_guided():
    """With guidance, a residual is that of guided logits, and the negative prompt matters."""
    pipe = pipeline("aMUSEd")
    stored = {
        prompt: inverted("aMUSEd", guidance_scale=3.0, negative_prompt=prompt, store_residuals=True).residuals
        for prompt in ("", "ugly")
    }
    assert not torch.allclose(stored[""], stored["ugly"])
    trace = inverted("aMUSEd", guidance_scale=3.0)
    with torch.no_grad():
        told = pipe._denoise(trace, trace.state(2), trace.source, 0.0)
        null = pipe._denoise(trace, trace.state(2), trace.negative, 0.0)
    onehot = torch.full_like(told, -21.0).scatter_(-1, trace.tokens[..., None], 0.0)
    torch.testing.assert_close(stored[""][2], onehot - (null + 3 * (told - null)), rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 10**6))
def test_random_numbers_of_a_row_do_not_depend_on_the_others(lengths, width, seed):
    count = max(lengths)
    together = uniform_rows(
        lengths,
        count,
        width,
        [torch.Generator().manual_seed(seed + row) for row in range(len(lengths))],
        torch.device("cpu"),
    )
    for row, length in enumerate(lengths):
        alone = uniform_rows([length], length, width, [torch.Generator().manual_seed(seed + row)], torch.device("cpu"))
        assert torch.equal(together[row], pad(alone[0], (0, 0, 0, count - length), value=0.5))
    editable = torch.arange(count) < torch.tensor(lengths)[:, None]
    assert lengths_of(editable) == lengths
