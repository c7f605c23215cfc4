"""The mathematics against recorded runs of LoReFT's public code and of an independent evaluation, and its laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.tuners.baft import reference as ref
from tests.oracles import ORACLES

DOUBLE = dict(rtol=1e-9, atol=1e-10)


def load(name: str) -> dict[str, torch.Tensor]:
    return load_file(ORACLES / f"baft/{name}.safetensors")


def skewed(basis_KD: torch.Tensor) -> torch.Tensor:
    """Free parameters of an orthonormal basis that are not orthonormal themselves."""
    factor = torch.rand(len(basis_KD), len(basis_KD), dtype=basis_KD.dtype).tril() + torch.eye(len(basis_KD))
    return factor @ basis_KD


@pytest.mark.parametrize("name", ["loreft_pyreft_0", "loreft_pyreft_1"])
def test_without_a_gate_it_is_loreft(name):
    found = load(name)
    for free in (found["loreft.R"], skewed(found["loreft.R"])):
        delta, weights = ref.intervene(found["h"], free, found["loreft.A"], found["loreft.b"])
        torch.testing.assert_close(found["h"] + delta, found["loreft.out"], rtol=1e-5, atol=1e-5)
        assert (weights == 1).all()


@pytest.mark.parametrize("name", ["baft_0", "baft_1"])
def test_equals_the_independent_evaluation(name):
    found = load(name)
    inputs = [skewed(found["R"]), *(found[key] for key in "hAbUc")]
    free, h, targets, bias, gate, offset = (tensor.clone().requires_grad_() for tensor in inputs)
    delta, weights = ref.intervene(h, free, targets, bias, lambda h: torch.sigmoid(h @ gate.mT + offset))
    torch.testing.assert_close(weights, found["gate"], **DOUBLE)
    torch.testing.assert_close(delta, found["delta"], **DOUBLE)
    mask = found["mask"].bool()
    out = torch.where(mask[..., None], h + delta, h)
    torch.testing.assert_close(out, found["out_masked"], **DOUBLE)
    (out * found["cotangent"]).sum().backward()
    for key, tensor in zip("hAbUc", (h, targets, bias, gate, offset), strict=True):
        torch.testing.assert_close(tensor.grad, found[f"grad_{key}"], **DOUBLE)
    again = free.detach().clone().requires_grad_()
    (ref.orthonormal_basis(again) * found["grad_R_unconstrained"]).sum().backward()
    torch.testing.assert_close(free.grad, again.grad, **DOUBLE)
    ones, _ = ref.intervene(h, free, targets, bias)
    torch.testing.assert_close(h + ones, found["out_gate_one"], **DOUBLE)


@pytest.mark.parametrize("name", ["baft_0", "baft_1"])
def test_regularisers(name):
    found = load(name)
    weights = found["gate"][found["mask"].bool()]
    mean = weights.mean(0)
    torch.testing.assert_close(mean, found["mean_gate"])
    torch.testing.assert_close(ref.load_balance(found["past_usage"], mean), found["load_balance"].squeeze())
    torch.testing.assert_close(ref.unevenness(mean), found["gate_cv2"].squeeze())
    torch.testing.assert_close(ref.gate_penalty(weights), found["locality_gate_penalty"].squeeze())
    assert ref.load_balance(torch.zeros_like(mean), mean) == 0


@given(width=st.integers(1, 12), scale=st.floats(1e-3, 1e3), data=st.data())
@settings(max_examples=40, deadline=None)
def test_laws(width, scale, data):
    """Orthonormal whatever the scale; the update lies in the subspace; gates of 0 and 1; the order of the basis does not matter."""
    rank = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(width * 100 + rank)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    free, targets, bias, h = scale * draw(rank, width), draw(rank, width), draw(rank), draw(5, width)
    basis = ref.orthonormal_basis(free)
    lower = ref.factorise(free)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(rank, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ref.in_basis(h @ free.mT, lower), h @ basis.mT, rtol=1e-6, atol=1e-8)
    delta, _ = ref.intervene(h, free, targets, bias)
    torch.testing.assert_close(delta @ basis.mT @ basis, delta, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta, (h @ targets.mT + bias - h @ basis.mT) @ basis, rtol=1e-6, atol=1e-7)
    if rank == width:
        torch.testing.assert_close(h + delta, (h @ targets.mT + bias) @ basis, rtol=1e-5, atol=1e-5)
    none, _ = ref.intervene(h, free, targets, bias, lambda h: torch.zeros(5, rank, dtype=torch.float64))
    assert not none.any()
    start, _ = ref.intervene(h, free, basis, torch.zeros(rank, dtype=torch.float64))
    torch.testing.assert_close(start, torch.zeros_like(start), rtol=0, atol=1e-6)
    even = torch.full((rank,), 0.3, dtype=torch.float64)
    torch.testing.assert_close(ref.load_balance(even, even), torch.ones((), dtype=torch.float64))


def test_a_collapsed_basis_is_reported():
    for free in (torch.zeros(2, 4), torch.ones(2, 4) * float("nan")):
        with pytest.raises(ValueError, match="the basis of a BaFT adapter has collapsed"):
            ref.factorise(free)
