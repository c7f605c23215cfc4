"""The divergences: conjugacy, slopes, bounds, the recorded grid, and Lambert's W."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.trainers.flat.divergences import DIVERGENCES, flat_weights, get_divergence, lambert_w
from hf_ext.trainers.flat.loss import flat_loss
from tests.oracles import ORACLES

# The names that the recorded data uses.
RECORDED = {
    "KL": "kl",
    "Jenson-Shannon": "js",
    "Total-Variation": "tv",
    "Pearson": "pearson",
    "Jeffrey": "jeffrey",
    "Reverse-KL": "reverse_kl",
    "Squared-Hellinger": "squared_hellinger",
    "Neyman": "neyman",
}
# Bounds of (lambda_e, lambda_f) over probabilities in [0, 1].
BOUNDS = {
    "kl": ((1, 1), (math.exp(-1), 1)),
    "js": ((1 / (1 + math.e), 0.5), (0.5, 1 / (1 + math.exp(-1)))),
    "tv": ((0.5 / math.cosh(1) ** 2, 0.5), (0.5 / math.cosh(1) ** 2, 0.5)),
    "pearson": ((1, 1), (1, 1.5)),
    "jeffrey": ((1, 1), (1, 1 / 0.5671432904097838)),
    "reverse_kl": ((math.exp(-1), 1), (1, 1)),
    "squared_hellinger": ((math.exp(-1), 1), (1, math.e)),
    "neyman": ((math.exp(-1), 1), (math.exp(-0.5), 1)),
}
PROBABILITIES = torch.linspace(0, 1, 101, dtype=torch.float64)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def slope(function, v):
    v = v.clone().requires_grad_()
    return torch.autograd.grad(function(v).sum(), v)[0]


def test_the_eight_names():
    assert set(DIVERGENCES) == set(RECORDED.values()) == set(BOUNDS)
    with pytest.raises(ValueError, match="divergence='KL' is unknown: choose one of kl, js, tv, pearson"):
        get_divergence("KL")


@every_divergence
def test_the_conjugate_is_the_largest_gap_on_a_grid(name):
    chosen = DIVERGENCES[name]
    u = torch.logspace(-2, 2, 20_001, dtype=torch.float64)
    gaps = u * chosen.activation(PROBABILITIES)[:, None] - chosen.generator(u)
    torch.testing.assert_close(gaps.amax(1), chosen.conjugate(PROBABILITIES), rtol=0, atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(DIVERGENCES)), st.floats(0, 1), st.floats(1e-6, 1e6))
def test_fenchel_and_young(name, v, u):
    chosen = DIVERGENCES[name]
    v, u = (torch.tensor(x, dtype=torch.float64) for x in (v, u))
    # f*(t) >= u t - f(u), with equality at u = f*'(t), which is the ratio of the two slopes.
    bound = u * chosen.activation(v) - chosen.generator(u)
    assert chosen.conjugate(v) >= bound - 1e-12 * (1 + u)
    best = chosen.conjugate_slope(v) / chosen.activation_slope(v)
    reached = best * chosen.activation(v) - chosen.generator(best)
    torch.testing.assert_close(reached, chosen.conjugate(v), rtol=0, atol=1e-14)


@every_divergence
def test_generators_are_zero_at_one_and_convex(name):
    u = torch.linspace(0.05, 5, 200, dtype=torch.float64)
    values = DIVERGENCES[name].generator(u)
    assert torch.all(values[2:] - 2 * values[1:-1] + values[:-2] > -1e-12)
    torch.testing.assert_close(DIVERGENCES[name].generator(u.new_ones(1)), u.new_zeros(1), rtol=0, atol=1e-15)


@every_divergence
def test_slopes_are_those_of_autograd_and_stay_in_their_bounds(name):
    chosen = DIVERGENCES[name]
    weights = flat_weights(PROBABILITIES, PROBABILITIES, name)
    for weight, function, (low, high) in zip(
        weights, (chosen.activation, chosen.conjugate), BOUNDS[name], strict=True
    ):
        torch.testing.assert_close(weight, slope(function, PROBABILITIES), rtol=1e-14, atol=1e-14)
        assert weight.min().item() == pytest.approx(low) and weight.max().item() == pytest.approx(high)


def test_weights_are_full_precision_and_carry_no_gradient():
    half = torch.tensor([0.25, 0.5], dtype=torch.bfloat16, requires_grad=True)
    for weight in flat_weights(half, half, "js"):
        assert weight.dtype == torch.float32 and not weight.requires_grad


def test_the_recorded_grid():
    rows = json.loads((ORACLES / "flat/flat_expected.json").read_text())["scalar_grid"]["rows"]
    assert {row[0] for row in rows} == set(RECORDED)
    for name, p_template, p_forget, loss, by_template, by_forget, _ in rows:
        pair = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in (p_template, p_forget)]
        found = flat_loss(*pair, RECORDED[name])
        gradients = torch.autograd.grad(found, pair)
        assert found.item() == pytest.approx(loss, rel=0, abs=1e-14)
        for gradient, expected in zip(gradients, (by_template, by_forget), strict=True):
            assert gradient.item() == pytest.approx(expected, rel=1e-14, abs=1e-14)
        assert gradients[0] <= 0 < gradients[1]


def test_exact_jeffrey_against_the_polynomial_of_the_authors():
    polynomial = PROBABILITIES + PROBABILITIES**2 / 4 + PROBABILITIES**3 / 16
    error = (DIVERGENCES["jeffrey"].conjugate(PROBABILITIES) - polynomial).abs()
    assert error[PROBABILITIES <= 0.5].max() < 2e-3
    assert 0.015 < error[-1] < 0.02


def test_lambert_w():
    x = torch.cat([torch.zeros(1), torch.logspace(-300, 300, 2001, dtype=torch.float64)])
    w = lambert_w(x)
    # w + log w = log x does not overflow where w e^w would.
    torch.testing.assert_close(w[1:] + w[1:].log(), x[1:].log(), rtol=1e-14, atol=1e-13)
    assert w[0] == 0 and torch.all(w.diff() > 0)
    known = lambert_w(torch.tensor([1.0, math.e, 2 * math.e**2], dtype=torch.float64))
    torch.testing.assert_close(
        known, torch.tensor([0.5671432904097838, 1, 2], dtype=torch.float64), rtol=0, atol=1e-15
    )
    assert lambert_w(torch.tensor([1.0, 2.0])).dtype == torch.float32


def test_lambert_w_is_twice_differentiable():
    x = torch.tensor([0.0, 0.1, 1.0, 2.7, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambert_w, x) and torch.autograd.gradgradcheck(lambert_w, x)
