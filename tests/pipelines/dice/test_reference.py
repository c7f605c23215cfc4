"""DICE's formulas: recorded outputs of the authors' code, and the laws that they follow."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.pipelines.dice import reference as dice
from tests.oracles import ORACLES

META = json.loads((ORACLES / "dice/meta.json").read_text())


def test_multinomial():
    recorded, settings = load_file(ORACLES / "dice/multinomial.safetensors"), META["multinomial"]
    kernel = dice.Kernel(*(recorded[f"schedule.{name}"] for name in ("at", "bt", "ct", "att", "btt", "ctt")))
    values = settings["K"] + 1
    # The recorded kernel is rounded to float32.
    close = dict(rtol=0, atol=1e-6)
    for time in settings["times"]:
        found = {
            name: recorded[f"t{time}.{name}"] for name in ("gumbel", "x_t", "log_p_x0", "log_posterior", "x_prev", "z")
        }
        forward = dice.log_noised(recorded["x0"], time, kernel, values)
        torch.testing.assert_close(forward, recorded[f"t{time}.log_q_xt_given_x0"].mT, **close)
        drawn = (forward + found["gumbel"].mT).argmax(-1)
        assert torch.equal(drawn[:, 3:], found["x_t"][:, 3:])  # the first were chosen by hand
        posterior = dice.log_posterior(found["log_p_x0"].mT, found["x_t"], time, kernel)
        torch.testing.assert_close(posterior, found["log_posterior"].mT, **close)
        assert posterior.isfinite().all()
        z = dice.residual(dice.log_onehot(found["x_prev"], values), posterior, 1.0)
        torch.testing.assert_close(z, found["z"].mT, **close)
        # Full strength and no noise: the recorded token comes back.
        back = dice.injected(posterior, z, torch.zeros_like(z), 1.0, 0.0).argmax(-1)
        assert torch.equal(back, found["x_prev"])


# -- laws --------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.1, 3.0))
def test_anchors_lead_to_the_tokens(seed, margin):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, 9, generator=generator)
    tokens = torch.randint(9, (2, 6), generator=generator)
    assert torch.equal(dice.anchor_logits(logits, tokens, "model"), logits)
    corrected = dice.anchor_logits(logits, tokens, "corrected", margin=margin)
    assert torch.equal(corrected.argmax(-1), tokens)
    best, next_best = corrected.topk(2).values.unbind(-1)
    assert (best - next_best >= margin - 1e-5).all()
    others = torch.nn.functional.one_hot(tokens, 9) == 0
    assert torch.equal(corrected[others], logits[others])
    # Where the token is far above the rest, nothing is corrected.
    assert torch.equal(dice.anchor_logits(corrected, tokens, "corrected", margin=margin / 2), corrected)
    onehot = dice.anchor_logits(logits, tokens, "onehot", floor=-4.0)
    assert torch.equal(onehot.exp().argmax(-1), tokens) and set(onehot.unique().tolist()) == {-4.0, 0.0}


@given(st.integers(0, 10**6), st.integers(2, 30), st.floats(0.05, 1.0), st.sampled_from(sorted(dice.MASK_SCHEDULES)))
def test_noise_stays_noise(seed, steps, tau, schedule):
    u = torch.rand(4000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    fractions = [state.fraction for state in dice.trajectory(steps, tau, schedule)]
    assert fractions == sorted(fractions) and min(fractions) >= -1e-12 and max(fractions) <= 1 + 1e-12
    masks = [u <= fraction for fraction in fractions]
    assert all((before <= after).all() for before, after in itertools.pairwise(masks))
    for mask, fraction in zip(masks, fractions, strict=True):
        assert abs(mask.float().mean().item() - fraction) < 0.05


def test_schedules_and_injections():
    def strengths(value, kind):
        return [dice.scheduled(value, step, 3, kind) for step in range(3)]

    assert strengths(0.7, "constant") == [0.7] * 3
    assert strengths(0.8, "linear") == pytest.approx([0.8, 0.4, 0.0])
    assert strengths(0.25, "exp") == pytest.approx([0.25, 0.5, 1.0])
    assert [dice.scheduled(0.3, 0, 1, kind) for kind in ("constant", "linear", "exp")] == [0.3] * 3
    assert torch.equal(strengths(torch.tensor([1.0, 0.5]), "linear")[1], torch.tensor([0.5, 0.25]))
    y, z, g = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    added = dice.injected(y, z, g, 1.0, 0.0)
    torch.testing.assert_close(dice.injected(y, z, g, 1.0, 0.0, "variance_preserving"), added)
    torch.testing.assert_close(dice.injected(y, z, g, 0.25, 0.75, "variance_preserving"), y + 0.5 * z + 0.75**0.5 * g)
    torch.testing.assert_close(dice.injected(y, z, g, 0.3, 0.7, "max"), y + torch.maximum(0.3 * z, 0.7 * g))
    torch.testing.assert_close(dice.guided(y, z, 1.0), y)
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = dice.gumbel(u)
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01) and noise.isfinite().all()
    assert dice.gumbel(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all()


@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_truncation_keeps_the_likeliest(seed, rate):
    log = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
    found = dice.truncated(log, rate)
    kept = found > dice.LEAST
    share = (log.exp() * kept).sum(-1)
    least = log.exp().masked_fill(~kept, 1.0).amin(-1)
    # Enough is kept, and without the last of it, it would not be enough.
    assert (share >= rate - 1e-9).all() and (share - least < rate).all()
    assert torch.equal(found[kept], log[kept]) and kept.any(-1).all()
    assert torch.equal(dice.truncated(log, 1.0), log)
