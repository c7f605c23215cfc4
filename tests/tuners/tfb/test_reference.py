"""The noise of TFB and the search for its size: recorded values, and the laws that they follow."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.tuners.tfb.reference import flipout, largest_accepted, noise_map, output_std, reference_search
from tests.oracles import ORACLES

RECORDED = load_file(ORACLES / "tfb/tfb.safetensors")
SEARCHES = json.loads((ORACLES / "tfb/search.json").read_text())
SIGMA, SCALING = 0.01, float(RECORDED["scaling"])


def factors(seed: int, inputs: int = 12, outputs: int = 20, r: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(outputs, r, generator=generator, dtype=torch.float64),
        torch.randn(r, inputs, generator=generator, dtype=torch.float64),
    )


def test_the_map_is_that_of_the_recorded_factors():
    b_NR, rotated = RECORDED["lora_B"].double(), RECORDED["ref_B_prime"].double()
    map_RR = noise_map(b_NR)
    d = rotated.norm(dim=0)
    torch.testing.assert_close(
        d.sort().values, RECORDED["singular_values_B"].double().sort().values, rtol=1e-5, atol=0
    )
    # B times the map is U, whose projection does not depend on signs and order.
    u = b_NR @ map_RR
    torch.testing.assert_close(u @ u.mT, (rotated / d) @ (rotated / d).mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close((SIGMA / d)[:, None].expand(4, 24), RECORDED["ref_sigma_A"].double(), rtol=1e-4, atol=0)


def test_noise_in_the_space_of_the_weights_is_that_of_the_rotated_factors():
    rotated = RECORDED["ref_B_prime"].double()
    normals = RECORDED["flipout_eps"][0].double()
    theirs = SCALING * rotated @ (RECORDED["ref_sigma_A"].double() * normals)
    torch.testing.assert_close(theirs, RECORDED["delta_w_noise_of_eps0"].double(), rtol=0, atol=1e-5)
    b_NR = RECORDED["lora_B"].double()
    map_RR = noise_map(b_NR)
    # In our basis: the same normals, rotated by an orthogonal matrix.
    turn = (b_NR @ map_RR).mT @ (rotated / rotated.norm(dim=0))
    torch.testing.assert_close(turn @ turn.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    ours = SCALING * b_NR @ (SIGMA * map_RR @ (turn @ normals))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_recorded_flipout_draws():
    x = RECORDED["x"].double()
    for k in range(6):
        noise = RECORDED["ref_sigma_A"].double() * RECORDED["flipout_eps"][k].double()
        signs = (RECORDED[f"flipout_sign_{name}"][k].double() for name in ("in", "rank"))
        y = RECORDED["y_mean"].double() + SCALING * flipout(x, noise, *signs) @ RECORDED["ref_B_prime"].double().mT
        torch.testing.assert_close(y, RECORDED["flipout_y"][k].double(), rtol=0, atol=1e-5)


def test_the_recorded_standard_deviation():
    found = output_std(RECORDED["x"], RECORDED["lora_B"], SIGMA, SCALING)
    torch.testing.assert_close(found, RECORDED["analytic_noise_std"].double(), rtol=1e-4, atol=1e-7)


def test_moments_of_the_noise_on_a_weight():
    b_NR, _ = factors(0)
    map_RR = noise_map(b_NR)
    normals = torch.randn(40000, 4, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = 2.0 * b_NR @ (0.3 * map_RR @ normals)  # (draws, N, two columns)
    u = b_NR @ map_RR
    for column in (0, 1):
        covariance = noise[:, :, column].mT @ noise[:, :, column] / len(noise)
        expected = (2.0 * 0.3) ** 2 * u @ u.mT
        assert (covariance - expected).norm() < 0.02 * expected.norm()
    across = noise[:, :, 0].mT @ noise[:, :, 1] / len(noise)
    assert across.norm() < 0.03 * (0.6**2 * u @ u.mT).norm()


@given(st.integers(0, 10**6))
def test_the_distribution_belongs_to_the_product_of_the_factors(seed):
    """Another pair of factors with the same product has the same noise, and U may come from any decomposition."""
    b_NR, _ = factors(seed)
    mix = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    mix = mix @ torch.diag(torch.tensor([0.2, 1.0, 3.0, 7.0], dtype=torch.float64))
    u, mixed = b_NR @ noise_map(b_NR), (b_NR @ mix) @ noise_map(b_NR @ mix)
    torch.testing.assert_close(mixed @ mixed.mT, u @ u.mT, rtol=0, atol=1e-9)
    q = torch.linalg.qr(b_NR)[0]
    torch.testing.assert_close(q @ q.mT, u @ u.mT, rtol=0, atol=1e-9)


def test_directions_that_b_does_not_have_get_no_noise():
    b_NR, _ = factors(1)
    b_NR[:, 3] = b_NR[:, 0] - b_NR[:, 1]
    u = b_NR.float() @ noise_map(b_NR.float()).float()
    torch.testing.assert_close((u.mT @ u).diagonal().sort().values, torch.tensor([0.0, 1, 1, 1]), rtol=0, atol=1e-5)
    assert not noise_map(torch.zeros(5, 3)).any()


@pytest.mark.parametrize("case", SEARCHES, ids=lambda case: f"{case['metric']}-{case['threshold']}-{case['gain']}")
def test_the_recorded_searches(case):
    base, direction = (RECORDED[f"search_{name}"].double() for name in ("base_logits", "direction"))
    predicted = base.argmax(1)

    def nll(logits):
        return float(torch.nn.functional.cross_entropy(logits, predicted))

    def change(sigma):
        logits = base + case["gain"] * sigma * direction
        if case["metric"] == "acc":
            return float((logits.argmax(1) != predicted).float().mean())  # 0.05 in float32 is above 0.05
        return abs(nll(logits) - nll(base)) / nll(base) / 100

    found = reference_search(
        change,
        case["threshold"],
        (case["low0"], case["high0"]),
        case["max_iters"],
        5e-4 if case["metric"] == "acc" else 0.0,
    )
    assert [trial.sigma for trial in found.trials] == pytest.approx(case["visited"], abs=1e-12)
    assert found.sigma == pytest.approx(case["reference_result"], abs=1e-12)


@given(st.floats(2e-4, 0.99))
def test_the_largest_accepted_size_is_found(limit):
    found = largest_accepted(lambda sigma: sigma, limit, max_iters=40, precision=0.01)
    assert found.sigma <= limit < found.sigma * 1.02 and found.bounded and found.monotone
    assert found == largest_accepted(lambda sigma: sigma, limit, max_iters=40, precision=0.01)


def test_the_ends_of_the_bracket_are_told():
    free = largest_accepted(lambda sigma: 0.0, 0.01, (0.001, 0.5))
    assert free.sigma == 0.5 and not free.bounded and free.monotone
    none = largest_accepted(lambda sigma: 1.0, 0.01, (0.001, 0.5))
    assert none.sigma == 0 and none.bounded and len(none.trials) == 1


def test_evaluations_are_counted_and_disorder_is_told():
    assert len(largest_accepted(lambda sigma: sigma, 0.3, max_iters=5).trials) == 5
    odd = largest_accepted(lambda sigma: abs(sigma - 0.05), 0.2, (0.001, 1))
    assert not odd.monotone and odd.sigma == pytest.approx(0.25, rel=0.05)


def test_a_criterion_without_a_value_is_named():
    with pytest.raises(ValueError, match=r"criterion: it is nan at sigma=0.0001"):
        largest_accepted(lambda sigma: math.nan, 0.1)
