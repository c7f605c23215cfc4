"""Losses: recorded values, the limits in which they are other losses, and laws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.trainers.roserag.loss import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
    Responses,
    log1mexp,
    log_odds,
    margin_dpo,
    negative_log_likelihood,
    odds_ratio,
    register_preference_loss,
    simpo,
)

ORACLES = Path(__file__).parents[2] / "oracles" / "roserag"
RECORDED = json.loads((ORACLES / "losses.json").read_text())
VALUES = load_file(ORACLES / "losses.safetensors")


def sides(dtype):
    found = []
    for side in ("chosen", "rejected"):
        logps = VALUES[f"{side}_token_logps"].to(dtype).clone().requires_grad_()
        reference = VALUES[f"ref_{side}_logps"].to(dtype)
        found.append(Responses(logps, VALUES[f"{side}_mask"].bool(), reference))
    return found


def evaluate(settings, dtype):
    """(loss, terms per pair, gradients of both sides) of a recorded variant."""
    chosen, rejected = sides(dtype)
    gamma = settings["gamma"]
    gamma = VALUES[gamma].to(dtype) if isinstance(gamma, str) else gamma
    if settings["kind"] == "orpo":
        terms = odds_ratio(chosen, rejected, gamma)
        loss = settings["lam"] * terms.mean()
        if settings["nll_norm"] != "none":
            loss = loss + negative_log_likelihood(chosen, settings["nll_norm"])
    else:
        function = margin_dpo if settings["kind"] == "dpo" else simpo
        terms = function(chosen, rejected, settings["beta"], gamma)
        loss = terms.mean()
    loss.backward()
    return loss.detach(), terms.detach(), chosen.logps_BT.grad, rejected.logps_BT.grad


@pytest.mark.parametrize(
    ("dtype", "value", "slope"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-10, 1e-10)], ids=["fp32", "fp64"]
)
@pytest.mark.parametrize("name", RECORDED["variants"])
def test_recorded_values(name, dtype, value, slope):
    settings = RECORDED["variants"][name]
    loss, terms, *gradients = evaluate(settings, dtype)
    assert float(loss) == pytest.approx(settings["loss"], rel=value)
    torch.testing.assert_close(terms.double(), VALUES[f"{name}.per_pair"].double(), rtol=10 * value, atol=value)
    for side, gradient in zip(("chosen", "rejected"), gradients, strict=True):
        recorded = VALUES[f"{name}.grad_{side}"].double()
        mask = VALUES[f"{side}_mask"].bool()
        error = ((gradient.double() - recorded) * mask).norm() / recorded.norm()
        assert float(error) < slope


def test_trl_has_the_same_numbers():
    anchors = RECORDED["trl_anchors_float32"]
    chosen, rejected = sides(torch.float32)
    found = 0.5 * odds_ratio(chosen, rejected).mean()
    assert float(found) == pytest.approx(anchors["trl_orpo_beta0.5"]["minus_mean_losses"], rel=1e-6)
    for gamma in (0.0, 1.0):
        recorded = anchors[f"trl_cpo_simpo_beta2.0_gamma{gamma}"]["per_pair"]
        # TRL divides gamma by beta inside the bracket, which comes to the same.
        torch.testing.assert_close(
            simpo(chosen, rejected, 2.0, gamma).detach(), torch.tensor(recorded), rtol=1e-5, atol=1e-6
        )


means = st.lists(st.floats(-80, 0, width=32), min_size=4, max_size=4)


def from_means(values):
    return Responses(torch.tensor(values)[:, None], torch.ones(len(values), 1, dtype=torch.bool))


@given(means, means, st.floats(0, 3), st.floats(0.01, 3))
def test_laws(ours, theirs, gamma, more):
    chosen, rejected = from_means(ours), from_means(theirs)
    plain = odds_ratio(chosen, rejected, gamma)
    assert plain.isfinite().all()
    assert (odds_ratio(chosen, rejected, gamma + more) >= plain).all()
    torch.testing.assert_close(odds_ratio(chosen, rejected, torch.full((4,), gamma)), plain)
    difference = log_odds(chosen.means_B) - log_odds(rejected.means_B)
    torch.testing.assert_close(odds_ratio(rejected, chosen), torch.nn.functional.softplus(difference))


@given(st.floats(-1e4, 0, width=32))
def test_odds_and_their_gradients_are_finite(mean):
    logps = torch.tensor([[mean]], requires_grad=True)
    odds_ratio(Responses(logps, torch.ones(1, 1, dtype=torch.bool)), from_means([-1.0])).sum().backward()
    assert bool(logps.grad.isfinite().all())


def test_log1mexp_is_exact_on_both_sides():
    x = torch.tensor([-1e-7, -1e-4, -0.6, -0.7, -5.0, -60.0], dtype=torch.float64)
    # Each of the two common forms is exact on its side.
    exact = torch.where(x > -0.65, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
    torch.testing.assert_close(log1mexp(x), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(log1mexp(x.float()).double(), exact, rtol=2e-6, atol=1e-30)


def test_a_constant_on_both_sides_changes_dpo_nothing():
    chosen, rejected = sides(torch.float64)
    shifted = [
        Responses(side.logps_BT, side.mask_BT, side.reference_B + 3.0)
        for side in (chosen, rejected)
        if side.reference_B is not None
    ]
    torch.testing.assert_close(margin_dpo(*shifted, 0.1), margin_dpo(chosen, rejected, 0.1))


def test_a_loss_of_ones_own():
    loss = PreferenceLoss(lambda chosen, rejected, beta, gamma: beta * rejected.means_B)
    register_preference_loss("push_down", loss)
    try:
        assert PREFERENCE_LOSSES["push_down"] is loss
        for name in ("push_down", "sigmoid"):
            with pytest.raises(ValueError, match=f"name='{name}'"):
                register_preference_loss(name, loss)
    finally:
        del PREFERENCE_LOSSES["push_down"]
