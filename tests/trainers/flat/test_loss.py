"""The FLAT loss: recorded losses and gradients, a recorded training run, and the laws of its averages."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext.trainers.flat.divergences import DIVERGENCES
from hf_ext.trainers.flat.loss import answer_probability, flat_loss, padded_probability
from tests.oracles import ORACLES
from tests.trainers.flat.test_divergences import RECORDED
from tests.trainers.helpers import assert_needs_torch_alone

EXPECTED = json.loads((ORACLES / "flat/flat_expected.json").read_text())
DATA = load_file(ORACLES / "flat/flat_loss.safetensors")
TINY = load_file(ORACLES / "flat/flat_tiny_model.safetensors")
SIDES = ("good", "forget")
# Both forms share g* and f* in these; the other three have a wrong sign in the recorded reference.
SAME_FORM = ("KL", "Pearson", "Jenson-Shannon", "Total-Variation")
every_case = pytest.mark.parametrize("case", ["plain", "memorised", "extreme"])


def label_log_probs(logits, labels):
    """Log-probabilities of the labels and the answer mask, both (B, S-1), from logits and labels (B, S)."""
    mask = labels[:, 1:] != -100
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return log_probs, mask


def recorded_case(case, dtype=torch.float64):
    """Logits of both answers as leaves, and their (log_probs, mask), template first."""
    logits = [DATA[f"{case}.{side}_logits"].to(dtype).requires_grad_() for side in SIDES]
    labels = [DATA[f"{case}.{side}_labels"] for side in SIDES]
    return logits, [label_log_probs(*pair) for pair in zip(logits, labels, strict=True)]


def close(found, expected, tolerance):
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance)


@every_case
def test_probabilities_equal_the_recorded_ones(case):
    _, pairs = recorded_case(case)
    for side, (log_probs, mask) in zip(SIDES, pairs, strict=True):
        close(log_probs.exp().where(mask, 0), DATA[f"{case}.{side}_token_probs"], 1e-10)
        close(answer_probability(log_probs, mask), DATA[f"{case}.P_{side}_answer"], 1e-10)


@every_case
@pytest.mark.parametrize("name", RECORDED)
def test_loss_and_gradients_equal_the_recorded_ones(case, name):
    logits, pairs = recorded_case(case)
    loss = flat_loss(*(answer_probability(*pair) for pair in pairs), RECORDED[name])
    close(loss, DATA[f"{case}.paper.{name}.per_sample_loss"], 1e-10)
    assert loss.mean().item() == pytest.approx(EXPECTED[case]["divergences"][name]["paper_loss"], rel=0, abs=1e-10)
    for side, gradient in zip(SIDES, torch.autograd.grad(loss.mean(), logits), strict=True):
        close(gradient, DATA[f"{case}.paper.{name}.grad_{side}_logits"], 1e-6)


def polynomial_jeffrey(p_template, p_forget):
    """The truncated series that the authors' code uses for the conjugate."""
    return -p_template + p_forget + p_forget**2 / 4 + p_forget**3 / 16


@every_case
@pytest.mark.parametrize("name", [*SAME_FORM, "Jeffrey"])
def test_padded_form_reproduces_the_authors_code(case, name):
    logits, pairs = recorded_case(case)
    probabilities = [padded_probability(*pair, length=pair[0].shape[1]) for pair in pairs]
    for side, probability in zip(SIDES, probabilities, strict=True):
        assert probability.item() == pytest.approx(EXPECTED[case][f"ref_P_{side}"], rel=0, abs=1e-12)
    loss = polynomial_jeffrey(*probabilities) if name == "Jeffrey" else flat_loss(*probabilities, RECORDED[name])
    # The authors take log 2 from a float32 tensor.
    tolerance = 1e-7 if name == "Jenson-Shannon" else 1e-12
    assert loss.item() == pytest.approx(EXPECTED[case]["divergences"][name]["ref_loss"], rel=0, abs=tolerance)
    for side, gradient in zip(SIDES, torch.autograd.grad(loss, logits), strict=True):
        close(gradient, DATA[f"{case}.ref.{name}.grad_{side}_logits"], 1e-7)


@pytest.mark.parametrize("name", RECORDED)
@pytest.mark.parametrize("kind", ["mean", "geometric"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 5e-2)], ids=str)
def test_extreme_logits_stay_finite_in_low_precision(name, kind, dtype, tolerance):
    logits, pairs = recorded_case("extreme", dtype)
    loss = flat_loss(*(answer_probability(*pair, kind) for pair in pairs), RECORDED[name])
    gradients = torch.autograd.grad(loss.mean(), logits)
    assert loss.dtype == torch.float32 and loss.isfinite().all() and all(g.isfinite().all() for g in gradients)
    if kind == "mean":
        close(loss, DATA[f"extreme.paper.{name}.per_sample_loss"], tolerance)


@pytest.mark.parametrize("case, divergence", [("tiny_kl", "kl"), ("tiny_tv", "tv")])
def test_four_steps_of_a_tiny_model(case, divergence):
    expected = EXPECTED[case]
    model = LlamaForCausalLM(LlamaConfig(**expected["config"])).double()
    prefix = f"{case}.init."
    model.load_state_dict({k.removeprefix(prefix): v.double() for k, v in TINY.items() if k.startswith(prefix)})
    optimizer = torch.optim.SGD(model.parameters(), expected["lr"])
    parameters = dict(model.named_parameters())
    for step, recorded in enumerate(expected["losses"]):
        probabilities = []
        for side in SIDES:
            batch = {key: TINY[f"{case}.{side}_{key}"] for key in ("input_ids", "attention_mask")}
            log_probs, mask = label_log_probs(model(**batch).logits, TINY[f"{case}.{side}_labels"])
            probabilities.append(padded_probability(log_probs, mask, expected["L"] - 1))
        loss = flat_loss(*probabilities, divergence)
        optimizer.zero_grad()
        loss.backward()
        assert loss.item() == pytest.approx(recorded, rel=0, abs=5e-8)
        if step == 0:
            gradients = {k: v for k, v in TINY.items() if k.startswith(f"{case}.step0_grad.")}
            assert len(gradients) == 3
            for key, gradient in gradients.items():
                close(parameters[key.removeprefix(f"{case}.step0_grad.")].grad, gradient, 1e-8)
        optimizer.step()
    final = {k.removeprefix(f"{case}.final."): v for k, v in TINY.items() if k.startswith(f"{case}.final.")}
    assert len(final) == 3
    for key, weight in final.items():
        close(parameters[key].detach(), weight, 5e-8)


def draw_case(seed: int, rows: int, columns: int, vocab: int = 7):
    """Logits (B, S, V) of two answers and labels (B, S) with at least one answer token a row."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in SIDES:
        logits = 4 * torch.randn(rows, columns, vocab, generator=generator, dtype=torch.float64)
        labels = torch.randint(vocab, (rows, columns), generator=generator)
        answer = torch.rand(rows, columns, generator=generator) < 0.4
        answer[:, -1] = True
        cases.append((logits, labels.where(answer, -100)))
    return cases


cases = st.builds(draw_case, st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 9))
divergences = st.sampled_from(list(DIVERGENCES))
kinds = st.sampled_from(["mean", "geometric"])


def loss_and_gradients(case, divergence, kind, parts=1):
    """Loss of each example, and the gradients of its mean for both logits, accumulated over parts of the batch."""
    logits = [z.clone().requires_grad_() for z, _ in case]
    rows = len(logits[0])
    losses = []
    for index in torch.arange(rows).chunk(parts):
        pairs = [label_log_probs(z[index], y[index]) for z, (_, y) in zip(logits, case, strict=True)]
        loss = flat_loss(*(answer_probability(*pair, kind) for pair in pairs), divergence)
        (loss.sum() / rows).backward()
        losses.append(loss.detach())
    return torch.cat(losses), [z.grad for z in logits]


@settings(max_examples=30, deadline=None)
@given(cases, divergences, kinds, st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5))
def test_batch_order_padding_and_accumulation_change_nothing(case, divergence, kind, seed, parts, padding):
    loss, gradients = loss_and_gradients(case, divergence, kind)
    split, split_gradients = loss_and_gradients(case, divergence, kind, parts)
    close(split, loss, 1e-14)
    order = torch.randperm(len(loss), generator=torch.Generator().manual_seed(seed))
    shuffled, shuffled_gradients = loss_and_gradients([(z[order], y[order]) for z, y in case], divergence, kind)
    close(shuffled, loss[order], 1e-14)
    pad = torch.nn.functional.pad
    wide = [(pad(z, (0, 0, 0, padding), value=3.0), pad(y, (0, padding), value=-100)) for z, y in case]
    padded, padded_gradients = loss_and_gradients(wide, divergence, kind)
    close(padded, loss, 1e-14)
    for side, gradient in enumerate(gradients):
        close(split_gradients[side], gradient, 1e-14)
        close(shuffled_gradients[side], gradient[order], 1e-14)
        close(padded_gradients[side][:, :-padding], gradient, 1e-14)
        assert torch.all(padded_gradients[side][:, -padding:] == 0)


@settings(max_examples=30, deadline=None)
@given(cases, divergences, kinds)
def test_logits_outside_the_answer_get_no_gradient(case, divergence, kind):
    _, gradients = loss_and_gradients(case, divergence, kind)
    for gradient, (_, labels) in zip(gradients, case, strict=True):
        predicts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        assert torch.all(gradient[~predicts] == 0)


@settings(max_examples=30, deadline=None)
@given(cases, divergences)
def test_a_descent_step_raises_the_template_and_lowers_the_answer(case, divergence):
    _, gradients = loss_and_gradients(case, divergence, "mean")
    for sign, (logits, labels), gradient in zip((1, -1), case, gradients, strict=True):
        probability = answer_probability(*label_log_probs(logits, labels)).sum()
        moved = answer_probability(*label_log_probs(logits - 1e-4 * gradient, labels)).sum()
        assert sign * (moved - probability) > -1e-15


@settings(max_examples=30, deadline=None)
@given(cases)
def test_probability_is_a_mean_of_the_token_probabilities(case):
    log_probs, mask = label_log_probs(*case[0])
    mean, geometric = (answer_probability(log_probs, mask, kind) for kind in ("mean", "geometric"))
    assert torch.all((geometric > 0) & (geometric <= mean + 1e-15) & (mean <= 1 + 1e-15))
    one = torch.zeros_like(mask)
    one[:, -1] = True
    close(answer_probability(log_probs, one, "geometric"), answer_probability(log_probs, one), 1e-15)
    # The padded form is the mean weighted by the length of each answer over the padded length.
    weighted = (mean * mask.sum(-1)).sum() / (len(mask) * 20)
    close(padded_probability(log_probs, mask, 20), weighted, 1e-15)


def test_total_variation_vanishes_between_equal_probabilities():
    p = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.all(flat_loss(p, p, "tv") == 0)


def test_coefficients_multiply_their_terms():
    p, q = torch.tensor([0.2, 0.9]), torch.tensor([0.7, 0.1])
    pull, push = flat_loss(p, q, "js", forget_coef=0), flat_loss(p, q, "js", template_coef=0)
    close(flat_loss(p, q, "js", 0.3, 2.0), 0.3 * pull + 2 * push, 1e-7)


def test_values_outside_the_mask_do_not_matter():
    log_probs = torch.tensor([[math.nan, -0.5, -1.0, -math.inf]], requires_grad=True)
    mask = torch.tensor([[False, True, True, False]])
    expected = (math.exp(-0.5) + math.exp(-1)) / 2, math.exp(-0.75), (math.exp(-0.5) + math.exp(-1)) / 4
    found = (
        answer_probability(log_probs, mask)[0],
        answer_probability(log_probs, mask, "geometric")[0],
        padded_probability(log_probs, mask, 4),
    )
    for probability, value in zip(found, expected, strict=True):
        assert probability.item() == pytest.approx(value)
        (gradient,) = torch.autograd.grad(probability, log_probs)
        assert torch.all(gradient[~mask] == 0) and torch.all(gradient[mask] > 0)


def test_rows_without_an_answer_are_named():
    log_probs = torch.zeros(3, 4)
    mask = torch.tensor([[True] * 4, [False] * 4, [False] * 4])
    for function in (answer_probability, lambda *pair: padded_probability(*pair, 4)):
        with pytest.raises(ValueError, match=r"rows \[1, 2\] of the batch have no answer token"):
            function(log_probs, mask)


def test_unusable_arguments_are_named():
    log_probs, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="kind='median' is unknown: choose one of mean, geometric"):
        answer_probability(log_probs, mask, "median")
    with pytest.raises(ValueError, match="length=3 is shorter than the 4 positions of the batch"):
        padded_probability(log_probs, mask, 3)
    with pytest.raises(ValueError, match="divergence='chi2' is unknown"):
        flat_loss(torch.ones(1), torch.ones(1), "chi2")


def test_the_mathematics_needs_torch_alone():
    assert_needs_torch_alone("hf_ext.trainers.flat.baselines")
