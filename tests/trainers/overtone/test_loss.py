"""The mathematics: oracles, laws, and agreement of the closed form with the materialised definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.trainers.overtone.chunked import overtone_from_hidden, overtone_from_logits
from hf_ext.trainers.overtone.loss import OvertoneSettings, overtone_reference
from tests.trainers.helpers import assert_needs_torch_alone

ORACLES = Path(__file__).parents[2] / "oracles" / "overtone"
CONFIGS = json.loads((ORACLES / "configs.json").read_text())


def oracle_settings(values: dict) -> OvertoneSettings:
    return OvertoneSettings(values["lam"], values["eps"], values["n"], require_top1=False)


@pytest.mark.parametrize("file", ["token_0", "token_1"])
@pytest.mark.parametrize("name", CONFIGS["configs"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_closed_form_and_reference_equal_the_oracle(file, name, dtype, tolerance):
    data = load_file(ORACLES / f"{file}.safetensors")
    numbers = oracle_settings(CONFIGS["configs"][name])
    logits = data["logits"].to(dtype).requires_grad_()
    fast = overtone_from_logits(logits, data["labels"], numbers)
    (gradient,) = torch.autograd.grad(fast.loss.sum(), logits)
    reference = overtone_reference(logits, data["labels"], numbers)
    for losses in (fast, reference):
        torch.testing.assert_close(losses.loss.double(), data[f"{name}.loss"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(losses.kl.double(), data[f"{name}.kl"], rtol=tolerance, atol=tolerance)
        assert torch.equal(losses.accepted, data[f"{name}.accepted"].bool())
        assert torch.equal(losses.active, data[f"{name}.active"].bool())
    assert torch.equal(reference.keep, data[f"{name}.keep"].bool())
    if file == "token_0":
        torch.testing.assert_close(reference.target.double(), data[f"{name}.target"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(gradient.double(), data[f"{name}.grad_logits"], rtol=tolerance, atol=tolerance)
    else:
        at_label = gradient.double().gather(1, data["labels"][:, None])[:, 0]
        torch.testing.assert_close(at_label, data[f"{name}.grad_logits_label"], rtol=tolerance, atol=tolerance)
        norm = gradient.double().norm(dim=1)
        torch.testing.assert_close(norm, data[f"{name}.grad_logits_l2"], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_fused_head_equals_the_oracle(head, train_head, dtype, tolerance):
    data, spec = load_file(ORACLES / "fused_head.safetensors"), CONFIGS["fused_head"]
    hidden, weight, bias = (data[name].to(dtype) for name in ("hidden", "weight", "bias"))
    hidden.requires_grad_()
    weight.requires_grad_(train_head)
    bias.requires_grad_(train_head)
    losses = overtone_from_hidden(
        hidden, weight, bias, data["labels"], oracle_settings(spec), **spec[head], chunk_tokens=3
    )
    loss = losses.loss.sum() / spec["num_items_in_batch"]
    loss.backward()
    torch.testing.assert_close(loss.double(), data[f"{head}.loss"].reshape(()), rtol=tolerance, atol=tolerance)
    found = {"per_token_loss": losses.loss, "grad_hidden": hidden.grad}
    if train_head:
        found |= {"grad_weight": weight.grad, "grad_bias": bias.grad}
    for name, tensor in found.items():
        # Norms, because a logit rounded to bfloat16 can leave the filter and change one token's target.
        expected = data[f"{head}.{name}"]
        assert (tensor.double() - expected).norm() / expected.norm() < tolerance, name


def draw_case(seed: int, tokens: int, vocab: int, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64) * spread
    # Half of the labels are the arg-max: both sides of every test then occur.
    labels = torch.where(
        torch.rand(tokens, generator=generator) < 0.5,
        logits.argmax(-1),
        torch.randint(vocab, (tokens,), generator=generator),
    )
    return logits, labels


cases = st.builds(
    draw_case,
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    vocab=st.integers(1, 60),
    spread=st.sampled_from([0.01, 1.0, 4.0, 20.0]),
)
numbers = st.builds(
    OvertoneSettings,
    mix_lambda=st.sampled_from([0.0, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0]),
    clip_epsilon=st.sampled_from([0.0, 0.01, 0.05, 0.5]),
    n_sigma=st.sampled_from([0.1, 0.5, 1.0, 2.0, math.inf]),
    require_top1=st.booleans(),
)


def value_and_gradient(logits, labels, settings, function=overtone_from_logits):
    logits = logits.clone().requires_grad_()
    losses = function(logits, labels, settings)
    return losses, torch.autograd.grad(losses.loss.sum(), logits)[0]


@settings(max_examples=60, deadline=None)
@given(cases, numbers)
def test_closed_form_equals_the_definition(case, chosen):
    (fast, gradient), (truth, expected) = (
        value_and_gradient(*case, chosen, function) for function in (overtone_from_logits, overtone_reference)
    )
    torch.testing.assert_close(fast.kl, truth.kl, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(fast.loss, truth.loss, rtol=1e-9, atol=1e-11)
    settled = (truth.kl - chosen.clip_epsilon).abs() > 1e-11
    assert torch.equal(fast.active[settled], truth.active[settled])
    torch.testing.assert_close(gradient[settled], expected[settled], rtol=1e-9, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(cases, numbers)
def test_laws_of_target_loss_and_gradient(case, chosen):
    logits, labels = case
    truth = overtone_reference(logits, labels, chosen)
    torch.testing.assert_close(truth.target.sum(-1), torch.ones(len(labels), dtype=torch.float64))
    at_label = truth.target.gather(1, labels[:, None])[:, 0]
    assert torch.equal(at_label, truth.target.amax(-1))  # the label is an arg-max of its target, always
    losses, gradient = value_and_gradient(logits, labels, chosen)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(len(labels), dtype=torch.float64))
    assert torch.all(gradient[~losses.active] == 0)
    if not chosen.require_top1:
        assert torch.all(losses.loss >= chosen.clip_epsilon)
    if chosen.mix_lambda >= 0.5:
        assert losses.accepted.all()


@settings(max_examples=40, deadline=None)
@given(cases)
def test_lambda_one_without_clip_is_cross_entropy(case):
    logits, labels = case
    losses, gradient = value_and_gradient(logits, labels, OvertoneSettings(1.0, 0.0))
    free = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(free, labels, reduction="none")
    torch.testing.assert_close(losses.loss, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(losses.nll, expected, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), free)[0], atol=1e-12, rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(cases, st.sampled_from([0.05, 0.3, 0.5, 0.8]))
def test_without_filter_an_accepted_token_has_lambda_times_the_gradient(case, mix):
    losses, gradient = value_and_gradient(*case, OvertoneSettings(mix, 0.0, math.inf))
    _, cross_entropy = value_and_gradient(*case, OvertoneSettings(1.0, 0.0))
    live = losses.accepted & losses.active
    torch.testing.assert_close(gradient[live], mix * cross_entropy[live], rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(cases, numbers, st.floats(-1e4, 1e4), st.integers(0, 2**31))
def test_shift_and_permutation(case, chosen, shift, seed):
    logits, labels = case
    losses, gradient = value_and_gradient(logits, labels, chosen)
    shifted, _ = value_and_gradient(logits + shift, labels, chosen)
    torch.testing.assert_close(shifted.nll, losses.nll, rtol=1e-7, atol=1e-9)
    order = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    permuted, permuted_gradient = value_and_gradient(logits[:, order], order.argsort()[labels], chosen)
    settled = (losses.kl - chosen.clip_epsilon).abs() > 1e-10
    torch.testing.assert_close(permuted.kl, losses.kl, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(permuted_gradient[settled], gradient[:, order][settled], rtol=1e-9, atol=1e-11)


def test_the_gate_keeps_a_token_that_greedy_decoding_still_gets_wrong():
    # A rival leads by 0.2 nats and everything else is far away: the mixture accepts and the KL is tiny.
    logits = torch.full((1, 30), -30.0, dtype=torch.float64)
    logits[0, 3], logits[0, 7] = 0.0, 0.2
    labels = torch.tensor([3])
    open_, _ = value_and_gradient(logits, labels, OvertoneSettings(0.1, 0.05, 1.0, require_top1=False))
    gated, gradient = value_and_gradient(logits, labels, OvertoneSettings(0.1, 0.05, 1.0, require_top1=True))
    assert open_.accepted.item() and not open_.active.item() and open_.loss.item() == 0.05
    assert gated.active.item() and gated.loss.item() == gated.kl.item() < 0.05
    assert gradient[0, 3] < 0


def test_a_tie_accepts_the_candidate_and_the_first_maximum_is_top1():
    logits = torch.zeros(2, 4, dtype=torch.float64)
    losses = overtone_from_logits(logits, torch.tensor([0, 2]), OvertoneSettings(0.0, 0.0, math.inf))
    assert losses.accepted.tolist() == [True, True]
    assert losses.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_float32_statistics_survive_large_logits(offset):
    logits, labels = draw_case(0, 16, 5000, 2.0)
    chosen = OvertoneSettings(0.3, 0.0, 1.0)
    truth = overtone_reference(logits, labels, chosen)
    fast = overtone_from_logits((logits + offset).float(), labels, chosen)
    torch.testing.assert_close(fast.kl.double(), truth.kl, rtol=2e-2 if offset else 1e-5, atol=1e-5)


def test_the_mathematics_needs_torch_alone():
    assert_needs_torch_alone("hf_ext.trainers.overtone.chunked")


@pytest.mark.parametrize(
    "field, value",
    [
        ("mix_lambda", -0.1),
        ("mix_lambda", 1.1),
        ("mix_lambda", math.nan),
        ("clip_epsilon", -1e-3),
        ("clip_epsilon", math.inf),
        ("n_sigma", 0.0),
        ("n_sigma", -1.0),
        ("n_sigma", math.nan),
        ("valid_vocab_size", 0),
    ],
)
def test_a_value_outside_its_range_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        OvertoneSettings(**{field: value})
