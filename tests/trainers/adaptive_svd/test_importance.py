"""Importance of layers and ranks from it: recorded ones, the mean of the ratios, and the energy rule."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.trainers.adaptive_svd.importance import (
    LayerStatistics,
    is_degenerate,
    rank_from_energy,
    ranks_from_ratios,
    retained_ratios,
)
from hf_ext.trainers.adaptive_svd.subspace import singular_basis
from tests.oracles import ORACLES


@pytest.fixture(params=["healthy", "degenerate"])
def recorded(request):
    """(recorded values of each layer, importance that was measured in float64)."""
    folder = ORACLES / "adaptive_svd"
    expected = json.loads((folder / f"importance_{request.param}.json").read_text())
    data = load_file(folder / f"importance_{request.param}.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**expected["config"])).double()
    model.load_state_dict({name: value.double() for name, value in data.items() if name in model.state_dict()})
    layers = {name.removesuffix(".weight"): value for name, value in expected["matrices"].items()}
    statistics = {}
    for name in layers:
        module = model.get_submodule(name)
        statistics[name] = kept = LayerStatistics(module.out_features <= module.in_features)
        module.register_forward_hook(
            lambda module, args, output, kept=kept: kept.update(args[0].flatten(0, 1), output.flatten(0, 1))
        )
    torch.testing.assert_close(model(data["input_ids"]).logits.float(), data["logits"], rtol=0, atol=1e-5)
    return request.param, layers, {name: kept.cosine for name, kept in statistics.items()}


def test_importance_and_ranks_are_the_recorded_ones(recorded):
    _, layers, importance = recorded
    ratios = retained_ratios(importance, 0.1, 0.8, score="signed")
    ranks = ranks_from_ratios(ratios, {name: min(layer["shape"]) for name, layer in layers.items()})
    for name, layer in layers.items():
        assert importance[name] == pytest.approx(layer["I"], abs=1e-6)
        assert ratios[name] == pytest.approx(layer["r_paper"], abs=1e-5)
        assert ranks[name] == layer["k_paper"]


def test_degenerate_scores_are_noticed(recorded):
    name, _, importance = recorded
    reason = is_degenerate(importance, retained_ratios(importance, 0.1, 0.8, score="signed"))
    assert (reason is None) == (name == "healthy")
    assert (
        is_degenerate({"a": 0.04, "b": -0.01}, {"a": 0.8, "b": 0.2}) == "the mean absolute cosine is 0.025, below 0.05"
    )


@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1, 1).filter(lambda value: abs(value) > 1e-3), min_size=1, max_size=9),
    minimum=st.floats(0, 0.5),
    target=st.floats(0.5, 1),
    score=st.sampled_from(["absolute", "positive"]),
)
def test_the_mean_ratio_is_the_target(values, minimum, target, score):
    importance = {str(i): value for i, value in enumerate(values)}
    if score == "positive" and max(values) < 0:
        with pytest.raises(ValueError, match="no layer has a positive importance"):
            retained_ratios(importance, minimum, target, score)
        return
    ratios = retained_ratios(importance, minimum, target, score)
    assert sum(ratios.values()) / len(ratios) == pytest.approx(target, abs=1e-5)
    assert min(ratios.values()) >= minimum - 1e-9


def test_ranks_are_floored_and_cut():
    ranks = ranks_from_ratios({"a": 0.55, "b": -0.3, "c": 1.7, "d": 0.8}, dict.fromkeys("abcd", 10))
    assert ranks == {"a": 5, "b": 0, "c": 10, "d": 8}


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_energies_are_those_of_the_definition(shape):
    weight, inputs = torch.randn(shape).double(), torch.randn(50, shape[1]).double()
    basis, values = singular_basis(weight)
    kept = LayerStatistics(shape[0] <= shape[1], basis)
    for part in inputs.split(17):
        kept.update(part, part @ weight.mT)
    found = kept.energies(values)
    _, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = values.square() * ((inputs @ right.mT).square().mean(0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    # All of what the layer puts out.
    assert float(found.sum()) == pytest.approx(float((inputs @ weight.mT).square().sum(-1).mean()), rel=1e-5)


def test_rank_from_energy():
    energies = torch.tensor([6.0, 3.0, 1.0, 0.0]).double()
    assert [rank_from_energy(energies, share) for share in (0.0, 0.5, 0.6, 0.61, 0.9, 0.95, 1.0)] == [
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert rank_from_energy(torch.zeros(3), 0.9) == 0


def test_unknown_scores_are_refused():
    with pytest.raises(ValueError, match=r"score='best'.*absolute, positive, signed"):
        retained_ratios({"a": 1.0}, 0.1, 0.8, "best")
