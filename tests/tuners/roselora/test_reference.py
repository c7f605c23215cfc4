"""The mathematics against the authors' recorded runs, and the laws of the paper."""

import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.tuners.roselora import reference as ref
from tests.oracles import ORACLES

CASES = json.loads((ORACLES / "roselora/cases.json").read_text())
TRACE = load_file(ORACLES / "roselora/reference_trace.safetensors")
PRODUCTS = load_file(ORACLES / "roselora/product_sparsity.safetensors")
FACTORS = sorted({key.rsplit("/", 1)[0] for key in TRACE if "/" in key})


@pytest.mark.parametrize("factor", FACTORS)
def test_replays_the_authors_run_bit_for_bit(factor):
    record = {name: TRACE[f"{factor}/{name}"] for name in ("weight_before", "grad", "weight_after_optimizer")}
    dim = -1 if factor.endswith("lora_A") else -2
    importance = None
    for step, density in enumerate(TRACE["density"].tolist()):
        now = ref.sensitivity(record["weight_before"][step], record["grad"][step])
        importance = now if importance is None else ref.update_importance(importance, now, 0.8)
        torch.testing.assert_close(importance, TRACE[f"{factor}/importance"][step], rtol=1e-6, atol=0)
        weight = record["weight_after_optimizer"][step].clone()
        if density < 1:
            ref.prune_(weight, ref.threshold_mask(importance, density, dim), value_clip=3e-3)
        assert torch.equal(weight, TRACE[f"{factor}/weight_after_prune"][step]), step


@pytest.mark.parametrize("case", CASES["schedules"], ids=lambda c: f"tau{c['tau']}-T{c['T']}")
def test_schedule_in_both_conventions(case):
    limits = (case["t_i"], case["t_f"], case["tau"])
    paper = [ref.density_at(t, *limits) for t in range(1, case["T"] + 1)]
    reference = [ref.density_at(it, *limits) for it in range(case["T"])]
    assert paper == pytest.approx(case["paper_t_from_1"], abs=1e-12)
    assert reference == pytest.approx(case["reference_it_from_0"], abs=1e-12)


@pytest.mark.parametrize("case", CASES["traces"], ids=lambda c: c["name"])
def test_traces(case):
    weight = torch.tensor(case["weight0"], dtype=torch.float64)
    dim = -1 if case["prune_axis"] == 1 else -2
    importance = torch.zeros_like(weight) if case["ema_init"] == "scaled" else None
    for step in case["steps"]:
        grad = torch.tensor(step["grad"], dtype=torch.float64)
        now = ref.sensitivity(weight, grad)
        torch.testing.assert_close(now, torch.tensor(step["sensitivity"], dtype=torch.float64))
        importance = now.clone() if importance is None else ref.update_importance(importance, now, case["beta"])
        torch.testing.assert_close(importance, torch.tensor(step["importance"], dtype=torch.float64))
        density = ref.density_at(step["t"], case["t_i"], case["t_f"], case["tau"])
        assert density == pytest.approx(step["density"])
        assert ref.keep_count(weight.shape[dim], density) == step["keep"]
        mask = ref.topk_mask(importance, density, dim)
        assert mask.int().tolist() == step["mask_topk"]
        assert ref.threshold_mask(importance, density, dim).int().tolist() == step["mask_threshold_rule"]
        weight = ref.prune_(weight - case["lr"] * grad, mask)
        torch.testing.assert_close(weight, torch.tensor(step["weight_next"], dtype=torch.float64))


@pytest.mark.parametrize("case", range(4))
def test_product_sparsity_bound(case):
    a, b = PRODUCTS[f"{case}/A"], PRODUCTS[f"{case}/B"]
    entries = a.shape[1] * b.shape[0]
    assert 1 - ref.product_density_bound(a, b) == pytest.approx(PRODUCTS[f"{case}/sparsity_bound"].item(), abs=1e-12)
    assert 1 - ref.product_nonzeros(a, b) / entries == pytest.approx(PRODUCTS[f"{case}/sparsity_actual"].item())


shapes = st.tuples(st.integers(1, 5), st.integers(1, 23))


@settings(deadline=None, max_examples=60)
@given(shape=shapes, density=st.floats(0.01, 1.0), levels=st.integers(1, 6), seed=st.integers(0, 99))
def test_topk_equals_a_stable_sort(shape, density, levels, seed):
    """Few distinct levels make ties the rule; the lower index wins each."""
    importance = torch.randint(1, levels + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    keep = ref.keep_count(shape[1], density)
    order = importance.sort(dim=-1, descending=True, stable=True).indices
    expected = torch.zeros(shape, dtype=torch.bool).scatter(-1, order[:, :keep], True)
    assert torch.equal(ref.topk_mask(importance, density, -1), expected)
    assert torch.equal(ref.topk_mask(importance.T.contiguous(), density, -2), expected.T)


@settings(deadline=None, max_examples=40)
@example(shape=(1, 20), density=0.9, seed=0)
@given(shape=shapes, density=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_reference_rule_keeps_at_least_the_exact_one(shape, density, seed):
    importance = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    exact, loose = ref.topk_mask(importance, density, -1), ref.threshold_mask(importance, density, -1)
    assert (loose | ~exact).all()
    # One more as a rule; two where n * (1 - density) falls just short of a whole number in floating point.
    assert (loose.sum(-1) - exact.sum(-1) <= 2).all()


@settings(deadline=None, max_examples=40)
@given(
    rank=st.integers(1, 6),
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_nonzeros_of_the_product_are_counted_exactly(rank, rows, columns, share, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(rank, columns, generator=generator) * (torch.rand(rank, columns, generator=generator) < share)
    b = torch.rand(rows, rank, generator=generator) * (torch.rand(rows, rank, generator=generator) < share)
    nonzeros = ref.product_nonzeros(a, b)
    assert nonzeros == int(((b @ a) != 0).sum())  # all entries are positive: nothing cancels
    assert nonzeros / (rows * columns) <= ref.product_density_bound(a, b) + 1e-12


def test_lines_without_any_score_are_left_alone():
    importance = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.0, 0.0]])
    assert ref.topk_mask(importance, 0.25, -1).tolist() == [[True] * 4, [False, True, False, False]]


@pytest.mark.parametrize("density", [0.001, 0.5])
def test_a_line_of_one_entry_survives(density):
    assert ref.topk_mask(torch.rand(3, 1), density, -1).all()
    assert ref.threshold_mask(torch.rand(3, 1), density, -1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_kept_in_float32(dtype):
    """In float16 the product of two small numbers would underflow to a tie at zero."""
    weight = torch.tensor([1e-4, 2e-4], dtype=dtype)
    scores = ref.sensitivity(weight, weight)
    assert scores.dtype == torch.float32
    assert 0 < scores[0] < scores[1]


def test_an_overflown_gradient_leaves_the_average_alone():
    average = torch.tensor([1.0, 2.0, 3.0])
    ref.update_importance(average, torch.tensor([float("inf"), float("nan"), 0.0]), 0.5)
    assert average.tolist() == [1.0, 2.0, 1.5]
