"""The split of a weight and its projections: recorded ones, and the laws of the subspace."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.trainers.adaptive_svd.subspace import (
    add_expanded,
    drift,
    long_basis,
    project,
    reduce,
    singular_basis,
    split_weight,
    without_long_side,
)
from tests.oracles import ORACLES
from tests.trainers.helpers import assert_needs_torch_alone

DATA = load_file(ORACLES / "adaptive_svd/projection.safetensors")
CASES = [case["id"] for case in json.loads((ORACLES / "adaptive_svd/projection.json").read_text())["cases"]]

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def split(case):
    weight = DATA[f"{case}.W"]
    return weight, split_weight(weight, len(DATA[f"{case}.S_high"]))


def through_coordinates(matrix, weight, subspace):
    """Into the coordinates, projected on the long side, and back; the same with the basis of the long side and without."""
    rows, weight_PQ = reduce(matrix, subspace), subspace.oriented(weight)
    found = []
    for long in (long_basis(weight_PQ, subspace, len(rows), times=10**6), None):
        found.append(torch.zeros_like(matrix))
        add_expanded(found[-1], without_long_side(rows, weight_PQ, subspace, long), subspace)
    torch.testing.assert_close(*found, rtol=0, atol=float(1e-4 * matrix.norm()))
    return found[0]


def exact_sides(weight, rank):
    """(U_h, V_h) from a float64 SVD."""
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :rank], right[:rank].mT


@pytest.mark.parametrize("case", CASES)
def test_singular_values_and_spaces_are_the_recorded_ones(case):
    _, subspace = split(case)
    values = torch.cat([DATA[f"{case}.S_high"], DATA[f"{case}.S_low"]])
    torch.testing.assert_close(subspace.values_P, values, rtol=1e-5, atol=1e-5)
    short = DATA[f"{case}.U_high"] if subspace.wide else DATA[f"{case}.V_high"].mT
    torch.testing.assert_close(subspace.kept_PK @ subspace.kept_PK.mT, short @ short.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["double", "joint"])
def test_projections_are_the_recorded_ones(case, form):
    weight, subspace = split(case)
    found = project(DATA[f"{case}.G"], weight, subspace, joint=form == "joint")
    torch.testing.assert_close(found, DATA[f"{case}.G_{form}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_coordinates_are_the_double_projection(case):
    weight, subspace = split(case)
    found = through_coordinates(DATA[f"{case}.G"], weight, subspace)
    torch.testing.assert_close(found, DATA[f"{case}.G_double"], rtol=0, atol=3e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_factored_update_lies_in_the_same_subspace(case):
    """The authors project gradients of the low factors; the change of the weight that they make is inside."""
    weight, subspace = split(case)
    low = DATA[f"{case}.U_low"] * DATA[f"{case}.S_low"]
    change = 0.01 * (DATA[f"{case}.dU_proj"] * DATA[f"{case}.S_low"]) @ DATA[f"{case}.V_low"]
    change += 0.01 * low @ DATA[f"{case}.dV_proj"]
    torch.testing.assert_close(project(change, weight, subspace), change, rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, share=st.floats(0, 1), seed=st.integers(0, 2**20))
def test_laws(shape, share, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, matrix = torch.randn(2, *shape, generator=generator).double()
    rank = round(share * min(shape))
    subspace = split_weight(weight, rank)
    inside = project(matrix, weight, subspace)
    left, right = exact_sides(weight, rank)
    scale = 1e-4 * matrix.norm()
    torch.testing.assert_close(project(inside, weight, subspace), inside, rtol=0, atol=float(scale))
    # Nothing is left on either side, and what was free is untouched.
    assert (left.mT @ inside).norm() < scale and (inside @ right).norm() < scale
    free = matrix - left @ (left.mT @ matrix)
    free = free - (free @ right) @ right.mT
    torch.testing.assert_close(inside, free, rtol=0, atol=float(scale))
    # Protected triplets stay triplets, so the weight can be split no further by a change inside.
    torch.testing.assert_close((weight + inside) @ right, weight @ right, rtol=0, atol=float(scale))
    assert drift(weight + inside, subspace) < 1e-4
    assert reduce(matrix, subspace).shape == (min(shape) - rank, max(shape))
    found = through_coordinates(matrix, weight, subspace)
    torch.testing.assert_close(found, inside, rtol=0, atol=float(scale))


def test_all_and_nothing():
    weight, matrix = torch.randn(2, 6, 9)
    torch.testing.assert_close(project(matrix, weight, split_weight(weight, 0)), matrix)
    assert reduce(matrix, split_weight(weight, 6)).shape == (0, 9)
    assert through_coordinates(matrix, weight, split_weight(weight, 6)).equal(torch.zeros(6, 9))
    # "joint" leaves the null space of the weight open even then.
    assert project(matrix, weight, split_weight(weight, 6), joint=True).norm() > 0.1


def test_drift_sees_what_leaves_the_subspace():
    weight = torch.randn(8, 12)
    subspace = split_weight(weight, 4)
    assert drift(weight, subspace) < 1e-6
    assert drift(weight + 1e-3 * torch.randn(8, 12), subspace) > 1e-4


def test_the_basis_does_not_depend_on_how_often_it_is_computed():
    weight = torch.randn(20, 30)
    first, second = singular_basis(weight), singular_basis(weight.clone())
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert (first[0].gather(0, first[0].abs().argmax(0, keepdim=True)) > 0).all()


def test_directions_without_any_singular_value_are_left_alone():
    """A weight of rank 2 in float32: the others are noise, and nothing divides by them."""
    weight = torch.randn(10, 2) @ torch.randn(2, 14)
    subspace = split_weight(weight, 6)
    inside = project(torch.randn(10, 14), weight, subspace)
    assert inside.isfinite().all()
    left, right = exact_sides(weight, 2)
    assert (left.mT.float() @ inside).norm() < 1e-4 and (inside @ right.float()).norm() < 1e-4
    zero = split_weight(torch.zeros(3, 4), 2)
    assert project(torch.ones(3, 4), torch.zeros(3, 4), zero).isfinite().all()
    assert drift(torch.zeros(3, 4), zero) == 0


@pytest.mark.parametrize(
    ("weight", "rank", "named"),
    [
        (torch.zeros(2, 3, 4), 1, "no matrix"),
        (torch.tensor([[1.0, float("nan")]]), 1, "NaN"),
        (torch.ones(3, 4), 4, "rank=4"),
        (torch.ones(3, 4), -1, "rank=-1"),
    ],
)
def test_bad_input(weight, rank, named):
    with pytest.raises(ValueError, match=named):
        split_weight(weight, rank)


def test_needs_torch_alone():
    assert_needs_torch_alone("hf_ext.trainers.adaptive_svd.subspace")
    assert_needs_torch_alone("hf_ext.trainers.adaptive_svd.importance")
    assert_needs_torch_alone("hf_ext.trainers.adaptive_svd.optimizer")
