"""The subspace of the queries, and the guard that keeps compensation from doing harm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.cache.squat import reference
from hf_ext.kernels.quantize import dequantize, quantize_keys
from tests.kernels.recorded import FOLDER, MANIFEST, hadamard

CASES = [(file, name) for file in ("gqa_d64", "mha_d32") for name in MANIFEST[file]["configs"]]


def rows_of(query, heads):
    return query.unflatten(1, (heads, -1)).flatten(2, 3)


def rounded(keys, basis, order=None, **form):
    form = {**dict(bits=2, group_size=32, block_size=8, scale_dtype=torch.float32), **form}
    return dequantize(quantize_keys(keys, basis, order, **form), form["bits"], form["group_size"], -2)


@pytest.mark.parametrize("file, name", CASES)
def test_directions_are_the_authors(file, name):
    tensors, config = load_file(FOLDER / f"{file}.safetensors"), MANIFEST[file]["configs"][name]
    query = tensors["q"]
    if config.get("hadamard"):
        query = query @ hadamard(query.shape[-1])
    heads, channels = tensors["k"].shape[1], query.shape[-1]
    qhat = reference.directions(reference.gram(rows_of(query, heads)), config["r"])
    singular = qhat.norm(dim=-1).flip(-1)
    torch.testing.assert_close(singular, tensors[f"{name}.singular_values"], rtol=1e-3, atol=1e-3)
    metric = torch.eye(channels) + config["lam"] * qhat.mT @ qhat
    last = max(int(key.split(".A")[1]) for key in tensors if key.startswith(f"{name}.A"))
    theirs = tensors[f"{name}.A{last}"]
    assert (metric - theirs).norm() < 1e-4 * theirs.norm()


def test_gram_matrices_add_up():
    query = torch.randn(2, 50, 16)
    torch.testing.assert_close(
        reference.gram(query), reference.gram(query[:, :20]) + reference.gram(query[:, 20:]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("config, ratio", [("c2", 0.90), ("c1", 0.50), ("c0", 0.30)])
def test_real_queries_and_keys(config, ratio):
    tensors, setting = load_file(FOLDER / "real_pair.safetensors"), MANIFEST["real_pair"]["configs"][config]
    query, keys = tensors["q"], tensors["k"]
    qhat = reference.directions(reference.gram(query), setting["r"])
    errors = [
        reference.score_error(rounded(keys, lam**0.5 * qhat, block_size=setting["g"]) - keys, query)
        for lam in (setting["lam"], 0.0)
    ]
    assert errors[0] / errors[1] <= ratio
    allowed = torch.ones(32, 32, dtype=torch.bool).tril()
    maps = [
        ((query @ k.mT) / 128**0.5).masked_fill(~allowed, -torch.inf).softmax(-1)
        for k in (keys, rounded(keys, setting["lam"] ** 0.5 * qhat, block_size=setting["g"]), rounded(keys, None))
    ]
    for ours, kind in ((maps[1], "squat"), (maps[2], "plain")):
        total = (ours - maps[0]).abs().sum().item()
        assert total == pytest.approx(setting["attention_prob_abs_error_sum"][kind], rel=0.02)


def test_descending_order_beats_index_order_on_real_keys():
    """And ascending order is about as bad as none, so it is the order that helps."""
    tensors = load_file(FOLDER / "real_pair.safetensors")
    query, keys = tensors["q"], tensors["k"]
    basis = 0.01**0.5 * reference.directions(reference.gram(query[..., :20, :]), 20)
    order = reference.descending_range(keys, 32)
    descending, index, ascending, plain = (
        reference.score_error(rounded(keys, w, o) - keys, query).item()
        for w, o in ((basis, order), (basis, None), (basis, order.flip(-1)), (None, None))
    )
    assert descending < 0.9 * index < 0.9 * plain
    assert ascending > 1.4 * index


def strength(query_fit, query_held_out, keys, **form):
    qhat = reference.directions(reference.gram(query_fit), 20)
    qhat = qhat / qhat.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-30)
    order = reference.descending_range(keys, 32)
    form = {**dict(bits=2, group_size=32, block_size=8, scale_dtype=torch.float32), **form}
    return reference.choose_strength(keys, qhat, query_held_out, order, **form), qhat, order


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 4]))
def test_the_guard_never_loses_on_queries_without_direction(seed, bits):
    """Isotropic queries: whatever is chosen is within 1 % of plain rounding on queries that nobody has seen."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 4, 256, 64, generator=generator) * torch.rand(64, generator=generator).exp()
    fit, held_out, future = (torch.randn(1, 4, n, 64, generator=generator) for n in (600, 200, 600))
    chosen, qhat, order = strength(fit, held_out, keys, bits=bits)
    basis = (chosen * 64).sqrt()[..., None, None] * qhat
    ours, plain = (reference.score_error(rounded(keys, w, order, bits=bits) - keys, future) for w in (basis, None))
    assert ours.mean() <= 1.01 * plain.mean()


def test_the_guard_follows_queries_with_direction():
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2, 64) @ torch.diag(torch.ones(64))
    turn = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    keys = torch.randn(1, 4, 256, 64, generator=generator)
    fit, held_out, future = (torch.randn(1, 4, n, 64, generator=generator) * spread @ turn for n in (600, 200, 600))
    chosen, qhat, order = strength(fit, held_out, keys)
    assert (chosen > 0).all()
    basis = (chosen * 64).sqrt()[..., None, None] * qhat
    ours, plain = (reference.score_error(rounded(keys, w, order) - keys, future) for w in (basis, None))
    assert (ours < 0.7 * plain).all()


def test_unknown_queries_mean_plain_rounding():
    keys = torch.randn(1, 2, 64, 32)
    chosen, *_ = strength(torch.zeros(1, 2, 5, 32), torch.zeros(1, 2, 5, 32), keys)
    assert not chosen.any()


@pytest.mark.parametrize("file", ["gqa_d64", "mha_d32"])
def test_compensation_pays_on_the_recorded_keys(file):
    """Against plain rounding, over later queries on the mean, and over the prompt's own in every configuration."""
    tensors, configs = load_file(FOLDER / f"{file}.safetensors"), MANIFEST[file]["configs"].values()
    keys = tensors["k"].float()
    asked, later = (rows_of(tensors[name], keys.shape[1]) for name in ("q", "q_future"))
    future = []
    for config in configs:
        if config.get("hadamard") or config.get("key_quant") == "per_token" or config["g"] >= keys.shape[-1]:
            continue
        basis = config["lam"] ** 0.5 * reference.directions(reference.gram(asked), config["r"])
        form = dict(bits=config["bits"], group_size=config["G"], block_size=config["g"], scale_dtype=torch.float32)
        deltas = [
            dequantize(quantize_keys(keys, own, **form), config["bits"], config["G"], -2) - keys
            for own in (basis, None)
        ]
        ours, plain = (reference.score_error(delta, asked).square().mean().sqrt() for delta in deltas)
        strong = config["lam"] >= 1e-2 and config["g"] <= 16
        assert ours <= (0.85 if strong else 0.95) * plain, config
        ours, plain = (reference.score_error(delta, later).square().mean().sqrt() for delta in deltas)
        future.append((ours / plain).item())
    assert future and sum(future) / len(future) < 1
