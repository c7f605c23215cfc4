"""The chunked head: gradients, chunking, dtypes, memory, edge cases and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ext.trainers.overtone.chunked import overtone_from_hidden, overtone_from_logits
from hf_ext.trainers.overtone.loss import OvertoneSettings, overtone_reference
from tests.trainers.helpers import allocated_peak

SETTINGS = OvertoneSettings(0.3, 0.05, 1.0)


def make_head(tokens=11, hidden=7, vocab=53, dtype=torch.float64, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[1::4] = -100
    return draw(tokens, hidden, scale=2.0), draw(vocab, hidden), draw(vocab) if bias else None, labels


def through_reference(hidden, weight, bias, labels, settings, scale=1.0, cap=None):
    mask = labels != -100
    z = hidden[mask] @ weight.T if bias is None else hidden[mask] @ weight.T + bias
    z = z * scale if cap is None else cap * torch.tanh(z * scale / cap)
    return overtone_reference(z, labels[mask], settings)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.5, None), (1.3, 4.0)])
@pytest.mark.parametrize("trained", [(), ("weight",), ("weight", "bias"), ("bias",)])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
def test_gradients_equal_autograd_through_the_definition(bias, scale, cap, trained, chunk_tokens):
    hidden, weight, bias_vector, labels = make_head(bias=bias)
    weight.requires_grad_("weight" in trained)
    if bias_vector is not None:
        bias_vector.requires_grad_("bias" in trained)
    inputs = [x for x in (hidden, weight, bias_vector) if x is not None and x.requires_grad]
    factors = torch.linspace(0.1, 2.0, len(labels), dtype=torch.float64)
    truth = through_reference(hidden, weight, bias_vector, labels, SETTINGS, scale, cap)
    expected = torch.autograd.grad((truth.loss * factors[labels != -100]).sum(), inputs)
    fast = overtone_from_hidden(
        hidden,
        weight,
        bias_vector,
        labels,
        SETTINGS,
        logit_scale=scale,
        final_logit_softcapping=cap,
        chunk_tokens=chunk_tokens,
    )
    gradients = torch.autograd.grad((fast.loss * factors).sum(), inputs)
    torch.testing.assert_close(fast.loss[labels != -100], truth.loss)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("train_head", [False, True])
def test_gradcheck_where_the_target_is_constant(train_head):
    # With lambda 1 the target does not depend on the logits, so finite differences see the same function.
    hidden, weight, bias, labels = make_head(5, 3, 9)
    weight.requires_grad_(train_head)
    bias.requires_grad_(train_head)
    chosen = OvertoneSettings(1.0, 0.0)
    torch.autograd.gradcheck(
        lambda h, w, b: overtone_from_hidden(h, w, b, labels, chosen, chunk_tokens=2).loss, (hidden, weight, bias)
    )


@pytest.mark.parametrize("chosen", [SETTINGS, OvertoneSettings(0.05, 0.0, 0.5), OvertoneSettings(0.5, 0.0, math.inf)])
def test_gradcheck_with_the_target_frozen(chosen):
    hidden, weight, _, labels = make_head(6, 4, 13, bias=False)
    keep = labels != -100
    truth = through_reference(hidden, weight, None, labels, chosen)

    def frozen(h):
        log_p = (h[keep] @ weight.detach().T).log_softmax(-1)
        kl = (torch.special.xlogy(truth.target, truth.target) - truth.target * log_p).sum(-1)
        return kl[truth.active].sum()

    fast = overtone_from_hidden(hidden, weight.detach(), None, labels, chosen)
    (gradient,) = torch.autograd.grad(fast.loss.sum(), hidden)
    step = 1e-6
    for index in [(0, 0), (2, 3), (3, 1), (5, 2)]:
        moved = torch.zeros_like(hidden)
        moved[index] = step
        numeric = (frozen(hidden.detach() + moved) - frozen(hidden.detach() - moved)) / (2 * step)
        assert abs(numeric - gradient[index]) < 1e-7


@pytest.mark.parametrize("tokens, vocab", [(1, 1), (1, 2), (3, 1), (257, 31), (2, 40_000)])
def test_odd_shapes(tokens, vocab):
    hidden, weight, bias, _ = make_head(tokens, 5, vocab)
    labels = torch.arange(tokens) % vocab
    for freeze in (False, True):
        weight.requires_grad_(not freeze)
        truth = through_reference(hidden, weight, bias, labels, SETTINGS)
        fast = overtone_from_hidden(hidden, weight, bias, labels, SETTINGS)
        torch.testing.assert_close(fast.loss, truth.loss)
        (wanted,) = torch.autograd.grad(truth.loss.sum(), hidden)
        (gradient,) = torch.autograd.grad(fast.loss.sum(), hidden)
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("train_head", [False, True])
def test_all_ignored_is_a_differentiable_zero(train_head):
    hidden, weight, bias, labels = make_head()
    weight.requires_grad_(train_head)
    labels[:] = -100
    losses = overtone_from_hidden(hidden, weight, bias, labels, SETTINGS)
    losses.loss.sum().backward()
    assert losses.loss.sum().item() == 0.0
    assert torch.all(hidden.grad == 0)
    assert not train_head or torch.all(weight.grad == 0)
    logits = torch.randn(2, 3, 9, requires_grad=True)
    overtone_from_logits(logits, torch.full((2, 3), -100), SETTINGS).loss.sum().backward()
    assert torch.all(logits.grad == 0)


def test_huge_logits_stay_finite():
    hidden, weight, _, labels = make_head(dtype=torch.float32, bias=False)
    losses = overtone_from_hidden(hidden * 1e6, weight, None, labels, SETTINGS)
    (gradient,) = torch.autograd.grad(losses.loss.sum(), hidden)
    assert losses.loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast"])
def test_low_precision(mode, train_head):
    # Wide enough that the weight is converted in slices under autocast.
    hidden, weight, _, _ = make_head(24, 32, 40_000, bias=False)
    hidden, weight = (hidden.detach() * 0.5).requires_grad_(), (weight.detach() * 0.3).requires_grad_(train_head)
    labels = (hidden.detach() @ weight.detach().T).topk(2).indices[:, 1]
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}[mode]
    low_hidden = hidden.detach().to(stored).requires_grad_()
    low_weight = weight.detach().to(stored).requires_grad_(train_head)
    chosen = OvertoneSettings(0.3, 0.0, math.inf)
    truth = through_reference(hidden, weight, None, labels, chosen)
    truth.loss.sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        fast = overtone_from_hidden(low_hidden, low_weight, None, labels, chosen, chunk_tokens=10)
    assert fast.loss.dtype == torch.float32 and low_hidden.dtype == stored
    fast.loss.sum().backward()
    assert (fast.loss.double() - truth.loss).norm() / truth.loss.norm() < 1e-2
    pairs = [(low_hidden, hidden), *([(low_weight, weight)] if train_head else [])]
    for low, exact in pairs:
        assert low.grad.dtype == stored
        assert (low.grad.double() - exact.grad).norm() / exact.grad.norm() < 3e-2


def test_a_loss_scale_beyond_the_range_of_float16():
    hidden, weight, _, labels = make_head(bias=False)
    half = (hidden.detach() * 0.1).half().requires_grad_()
    small = (weight.detach() * 1e-3).half()
    losses = overtone_from_hidden(half, small, None, labels, SETTINGS)
    (gradient,) = torch.autograd.grad(losses.loss.sum() * 1e5, half)
    truth = through_reference(half.detach().double().requires_grad_(), small.double(), None, labels, SETTINGS)
    assert gradient.isfinite().all() and gradient.abs().max() > 1 and truth.active.all()


def test_padded_vocabulary_is_left_out():
    hidden, weight, bias, labels = make_head(dtype=torch.float32)
    with torch.no_grad():
        bias[40:] = -1e4
    labels[labels != -100] %= 40
    padded = OvertoneSettings(0.3, 0.05, 1.0, valid_vocab_size=40)
    short = overtone_from_hidden(hidden, weight[:40], bias[:40], labels, SETTINGS)
    long = overtone_from_hidden(hidden, weight, bias, labels, padded)
    torch.testing.assert_close(long.loss, short.loss)
    grads = torch.autograd.grad(long.loss.sum(), (weight, bias))
    assert torch.all(grads[0][40:] == 0) and torch.all(grads[1][40:] == 0) and grads[0][:40].abs().sum() > 0
    logits = (hidden @ weight.T + bias).detach().requires_grad_()
    from_logits = overtone_from_logits(logits, labels, padded)
    torch.testing.assert_close(from_logits.loss, short.loss)
    assert torch.all(torch.autograd.grad(from_logits.loss.sum(), logits)[0][:, 40:] == 0)
    with pytest.raises(IndexError, match="label 40 is outside the vocabulary of 40"):
        overtone_from_logits(logits, labels.clamp(min=-100).masked_fill(labels >= 0, 40), padded)


def test_only_the_loss_carries_a_gradient():
    losses = overtone_from_hidden(*make_head(), SETTINGS)
    assert losses.loss.requires_grad and not any(field.requires_grad for field in losses[1:])
    with torch.no_grad():
        silent = overtone_from_hidden(*make_head(), SETTINGS)
    torch.testing.assert_close(silent.loss, losses.loss.detach())


@pytest.mark.parametrize("bad", [99, 53, -1, -101])
def test_a_bad_label_is_named(bad):
    hidden, weight, bias, labels = make_head()
    labels[2] = bad
    with pytest.raises(IndexError, match=f"label {bad} is outside the vocabulary of 53"):
        overtone_from_hidden(hidden, weight, bias, labels, SETTINGS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_raise(value):
    logits, labels = torch.randn(4, 20), torch.tensor([1, 2, 3, 4])
    logits[2, 7] = value
    with pytest.raises(FloatingPointError, match="non-finite logits"):
        overtone_from_logits(logits, labels, SETTINGS)


def test_non_finite_logits_at_ignored_positions_do_not_matter():
    logits = torch.randn(4, 20)
    logits[2] = math.nan
    losses = overtone_from_logits(logits, torch.tensor([1, 2, -100, 4]), SETTINGS)
    assert losses.loss.isfinite().all()


def test_memory_depends_on_neither_prompt_nor_number_of_labels():
    weight = torch.randn(50_000, 16)

    def step(positions: int, labelled: int, chunk_tokens: int):
        hidden = torch.randn(positions, 16, requires_grad=True)
        labels = torch.full((positions,), -100)
        labels[-labelled:] = torch.arange(labelled)
        losses = overtone_from_hidden(hidden, weight, None, labels, SETTINGS, chunk_tokens=chunk_tokens)
        losses.loss.sum().backward()

    short = allocated_peak(lambda: step(16, 16, 16))
    long_prompt = allocated_peak(lambda: step(1000, 16, 16))
    many_labels = allocated_peak(lambda: step(128, 128, 16))
    row = 50_000 * 4
    assert short < 32 * row  # sixteen rows of logits and three blocks of five rows
    assert long_prompt < short + row
    assert many_labels < short + row
