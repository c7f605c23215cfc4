"""The mathematics against recorded runs of PEFT's and the authors' code, the layer against the mathematics, and the laws of both."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers.activations import ACT2FN

from hf_ext.tuners.neat.reference import delta_weight, gain_of, hidden_features
from tests.oracles import ORACLES
from tests.tuners.neat.conftest import factors, make_layer

CASES = json.loads((ORACLES / "neat/cases.json").read_text())


def recorded(case, names: dict[str, str]) -> dict[str, torch.Tensor]:
    tensors = load_file(ORACLES / f"neat/{names['file']}.safetensors")
    return {
        key.removeprefix(f"{case['tag']}/"): value
        for key, value in tensors.items()
        if key.startswith(case["tag"] + "/")
    }


def loaded_layer(case, found, first, last, **config):
    """Our layer with the parameters of a recorded case."""
    base = nn.Linear(case["in_features"], case["out_features"], bias="bias" in found)
    layer = make_layer(base, r=case["r"], **config).to(found["x"].dtype)
    state = {"base_layer.weight": found["weight"], "peanut_A.default.weight": first, "peanut_B.default.weight": last}
    if "bias" in found:
        state["base_layer.bias"] = found["bias"]
    for k in range(config.get("depth", 0)):
        state[f"peanut_encoders.default.{k}.weight"] = found[f"encoder{k}"]
        state[f"peanut_decoders.default.{k}.weight"] = found[f"decoder{k}"]
    layer.load_state_dict(state)
    return layer


def check_gradients(layer, found, gradients: dict[str, nn.Parameter]):
    x = found["x"].clone().requires_grad_()
    y = layer(x)
    (y * found["grad_y"]).sum().backward()
    tolerance = dict(rtol=1e-12, atol=1e-12) if x.dtype == torch.float64 else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y, found["y"], **tolerance)
    torch.testing.assert_close(x.grad, found["grad_x"], **tolerance)
    for name, parameter in gradients.items():
        torch.testing.assert_close(parameter.grad, found[name], **tolerance)
    torch.testing.assert_close(layer.get_delta_weight("default"), found["delta_weight"], **tolerance)
    return tolerance


@pytest.mark.parametrize("case", CASES["peft_peanut"], ids=lambda case: case["tag"])
def test_output_side_equals_peft(case):
    found = recorded(case, {"file": "peft_peanut"})
    settings_of = {name: case[name] for name in ("depth", "act_fn", "scaling")}
    layer = loaded_layer(case, found, found["A"], found["B"], side="output", **settings_of)
    own = factors(layer)
    gradients = {"grad_A": own["first_RD"], "grad_B": own["last_DR"]}
    for kind in ("encoder", "decoder"):
        gradients |= {f"grad_{kind}{k}": p for k, p in enumerate(own[f"{kind}s"])}
    tolerance = check_gradients(layer, found, gradients)
    layer.merge()
    torch.testing.assert_close(layer.weight.detach(), found["merged_weight"], **tolerance)


@pytest.mark.parametrize("case", CASES["input_side"], ids=lambda case: case["tag"])
def test_input_side_equals_the_authors(case):
    found = recorded(case, {"file": "input_side"})
    layer = loaded_layer(case, found, found["theta1"], found["theta2"], lora_alpha=case["lora_alpha"])
    own = factors(layer)
    check_gradients(layer, found, {"grad_theta1": own["first_RD"], "grad_theta2": own["last_DR"]})


@pytest.mark.parametrize("side", ["input", "output", "auto"])
@pytest.mark.parametrize("act_fn", ["relu", "gelu", "silu", "sin", "linear"])
@pytest.mark.parametrize("depth", [0, 2])
def test_the_layer_equals_the_whole_update(side, act_fn, depth):
    layer = make_layer(side=side, act_fn=act_fn, depth=depth, scaling=3.0).double()
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for name, p in layer.named_parameters() if "peanut" in name)]
    activation = torch.sin if act_fn == "sin" else ACT2FN[act_fn]
    delta = delta_weight(
        layer.weight.detach(), **factors(layer), activation=activation, scaling=3.0, side=layer.side["default"]
    )
    whole = layer.base_layer(x) + x @ delta.mT
    wanted = torch.autograd.grad(whole.square().sum(), parameters)
    found = torch.autograd.grad(layer(x).square().sum(), parameters)
    torch.testing.assert_close(layer(x), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert torch.linalg.matrix_rank(delta) <= layer.r["default"]


@given(
    outputs=st.integers(1, 9),
    inputs=st.integers(1, 9),
    r=st.integers(1, 4),
    depth=st.integers(0, 2),
    factor=st.floats(0.01, 100),
    side=st.sampled_from(["input", "output"]),
)
@settings(max_examples=40, deadline=None)
def test_laws(outputs, inputs, r, depth, factor, side):
    """Positive homogeneity in the weight, equivariance under permutations of what the network reads, and the two sides' symmetry."""
    generator = torch.Generator().manual_seed(outputs * 100 + inputs * 10 + r)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, size = draw(outputs, inputs), inputs if side == "input" else outputs
    hidden = [draw(r, r) for _ in range(2 * depth)]
    network = dict(
        first_RD=draw(r, size), last_DR=draw(size, r), encoders=hidden[:depth], decoders=hidden[depth:], side=side
    )
    delta = delta_weight(weight, **network)
    torch.testing.assert_close(delta_weight(factor * weight, **network), factor * delta, rtol=1e-10, atol=1e-12)
    assert not delta_weight(0 * weight, **network).any()
    rows = side == "input"
    order = torch.randperm(outputs if rows else inputs, generator=generator)
    moved = weight[order] if rows else weight[:, order]
    torch.testing.assert_close(delta_weight(moved, **network), delta[order] if rows else delta[:, order])
    other = {**network, "side": "output" if rows else "input"}
    torch.testing.assert_close(delta_weight(weight.mT, **other).mT, delta)


def test_a_linear_network_is_bilinear_in_its_factors():
    weight, first, last = torch.randn(5, 7).double(), torch.randn(2, 7).double(), torch.randn(7, 2).double()
    delta = delta_weight(weight, first, last, activation=ACT2FN["linear"])
    torch.testing.assert_close(delta, weight @ first.mT @ last.mT)


def test_gain_gives_the_size_of_the_random_factor_of_lora():
    features = torch.randn(400, 8).relu() * 1e-3
    scaled = features * gain_of(features, fan_in=8)
    bound = nn.init.kaiming_uniform_(torch.empty(4000, 8), a=5**0.5)
    assert float(scaled.square().mean().sqrt()) == pytest.approx(float(bound.square().mean().sqrt()), rel=0.02)
    assert gain_of(torch.zeros(3, 2), fan_in=8) == 1


def test_hidden_features_of_no_rows_are_empty():
    assert hidden_features(torch.empty(0, 3), [torch.eye(3)], [torch.eye(3)], torch.relu).shape == (0, 3)
