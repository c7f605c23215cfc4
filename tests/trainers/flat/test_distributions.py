"""The chunked losses of distributions against their definition: gradients, dtypes, memory and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from hf_ext.trainers.flat import baselines
from hf_ext.trainers.flat.distributions import Head
from tests.trainers.flat.test_loss import close
from tests.trainers.helpers import allocated_peak


def make_head(tokens=11, hidden=7, vocab=53, dtype=torch.float64, bias=True, scale=1.0, cap=None, seed=0):
    """Hidden states, head and labels, then those states and head of a reference; every second label is the arg-max."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    sides = []
    for _ in range(2):
        head = Head(draw(vocab, hidden), draw(vocab) if bias else None, scale, cap)
        sides += [draw(tokens, hidden), head]
    labels = torch.randint(vocab, (tokens,), generator=generator)
    labels[::2] = direct_logits(*sides[:2]).argmax(-1)[::2]
    return sides[0], sides[1], labels, sides[2], sides[3]


def direct_logits(hidden, head):
    z = torch.nn.functional.linear(hidden, head.weight_VH, head.bias_V)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def direct_undial(hidden, head, labels, ref_hidden, ref_head):
    onehot = torch.nn.functional.one_hot(labels, len(head.weight_VH))
    target = (direct_logits(ref_hidden, ref_head).detach() - 10 * onehot).softmax(-1)
    return torch.nn.functional.cross_entropy(direct_logits(hidden, head), target)


def direct_ceu(hidden, head, labels, ref_hidden, ref_head):
    logits = direct_logits(hidden, head)
    onehot = torch.nn.functional.one_hot(labels, len(head.weight_VH)).bool()
    target = logits.detach().masked_fill(onehot, -math.inf).softmax(-1)
    return torch.nn.functional.cross_entropy(logits, target)


def direct_kl(hidden, head, labels, ref_hidden, ref_head):
    log_p, log_q = direct_logits(hidden, head).log_softmax(-1), direct_logits(ref_hidden, ref_head).log_softmax(-1)
    return torch.nn.functional.kl_div(log_p, log_q.detach(), reduction="batchmean", log_target=True)


METHODS = {
    "undial": (baselines.undial, direct_undial),
    "ceu": (lambda hidden, head, labels, *_, **more: baselines.ceu(hidden, head, labels, **more), direct_ceu),
    "kl": (lambda hidden, head, labels, *ref, **more: baselines.retain_kl(hidden, head, *ref, **more), direct_kl),
}
every_method = pytest.mark.parametrize("method", METHODS)


def compare(method, inputs, trained, tolerance, **more):
    """Chunked against direct: loss and gradients, the largest deviation relative to the largest entry."""
    chunked, direct = METHODS[method]
    hidden, head = inputs[:2]
    leaves = {"hidden": hidden, "weight": head.weight_VH, "bias": head.bias_V}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    expected = direct(*inputs)
    found = chunked(*inputs, **more)
    assert found.dtype == expected.dtype and abs(found.item() - expected.item()) <= tolerance * abs(expected.item())
    factor = 3.0  # an upstream gradient other than 1
    pairs = zip(
        torch.autograd.grad(factor * found, wanted), torch.autograd.grad(factor * expected, wanted), strict=True
    )
    for gradient, truth in pairs:
        assert gradient.dtype == truth.dtype
        assert (gradient - truth).abs().max() <= tolerance * truth.abs().max()


@every_method
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 11, 100])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("weight",), ("hidden", "bias")])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_chunked_equals_the_definition(method, chunk_tokens, trained, dtype, tolerance):
    compare(method, make_head(dtype=dtype), trained, tolerance, chunk_tokens=chunk_tokens)


@every_method
@pytest.mark.parametrize("scale, cap", [(0.5, None), (1.3, 4.0)])
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_scaled_and_capped_logits(method, scale, cap, trained):
    compare(method, make_head(bias=False, scale=scale, cap=cap), trained, 1e-12, chunk_tokens=4)


@every_method
@pytest.mark.parametrize("tokens, vocab", [(1, 2), (3, 2), (130, 31), (2, 40_000)])
def test_odd_shapes(method, tokens, vocab):
    compare(method, make_head(tokens, 5, vocab), ("hidden", "weight"), 1e-11)


@every_method
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")])
def test_autocast_multiplies_in_low_precision(method, trained):
    # Wide enough that the weight is converted in slices.
    inputs = make_head(6, 16, 40_000, torch.float32, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(method, inputs, trained, 2e-2, chunk_tokens=4)


@every_method
def test_the_mean_is_over_num_items(method):
    inputs, (chunked, _) = make_head(), METHODS[method]
    whole = chunked(*inputs)
    hidden, head, labels, ref_hidden, ref_head = inputs
    parts = [
        chunked(hidden[part], head, labels[part], ref_hidden[part], ref_head, num_items=11)
        for part in (slice(0, 4), slice(4, 11))
    ]
    close(sum(parts), whole, 1e-12)


@every_method
@pytest.mark.parametrize("train_head", [False, True])
def test_the_reference_is_constant(method, train_head):
    inputs, (chunked, _) = make_head(), METHODS[method]
    inputs[1].weight_VH.requires_grad_(train_head)
    inputs[1].bias_V.requires_grad_(train_head)
    chunked(*inputs).backward()
    assert inputs[0].grad is not None and (inputs[1].weight_VH.grad is not None) == train_head
    assert all(leaf.grad is None for leaf in (inputs[3], inputs[4].weight_VH, inputs[4].bias_V))
    with torch.no_grad():
        assert not chunked(*inputs).requires_grad


@every_method
def test_a_second_derivative_is_refused(method):
    inputs, (chunked, _) = make_head(), METHODS[method]
    (gradient,) = torch.autograd.grad(chunked(*inputs).square(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_kl_to_itself_is_exactly_zero():
    hidden, head, *_ = make_head(dtype=torch.float32)
    loss = baselines.retain_kl(hidden, head, hidden.detach(), head)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, hidden)[0].abs().max() == 0


def test_ceu_stays_finite_for_a_memorised_token():
    hidden = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = baselines.ceu(hidden, Head(torch.eye(3)[:, :2]), torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(200) and hidden.grad.isfinite().all() and hidden.grad[0, 0] == 1


@pytest.mark.parametrize("bad", [53, -1, -100])
def test_a_bad_label_is_named(bad):
    hidden, head, labels, ref_hidden, ref_head = make_head()
    labels[2] = bad
    with pytest.raises(IndexError, match=f"label {bad} is outside the vocabulary of 53 tokens"):
        baselines.undial(hidden, head, labels, ref_hidden, ref_head)
    with pytest.raises(IndexError, match=f"label {bad} is outside the vocabulary of 53 tokens"):
        baselines.ceu(hidden, head, labels)


@every_method
@pytest.mark.parametrize("train_head", [False, True])
def test_memory_does_not_grow_with_the_number_of_tokens(method, train_head):
    vocab, width = 20_000, 4
    weight, ref_weight = torch.randn(vocab, width).requires_grad_(train_head), torch.randn(vocab, width)

    def step(tokens: int) -> None:
        hidden = torch.randn(tokens, width, requires_grad=True)
        inputs = hidden, Head(weight), torch.arange(tokens), torch.randn(tokens, width), Head(ref_weight)
        METHODS[method][0](*inputs, chunk_tokens=8).backward()
        weight.grad = None

    row = vocab * 4
    few, many = (allocated_peak(lambda tokens=tokens: step(tokens)) for tokens in (16, 128))
    gradient = 2 * width * row if train_head else 0
    # Six buffers of one chunk, and one row for everything that is not as wide as the vocabulary.
    assert few < (6 * 8 + 1) * row + gradient and many < few + row
