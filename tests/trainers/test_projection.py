"""Products with a large output layer: against plain products and autograd, in slices, and in low precision."""

from __future__ import annotations

import pytest
import torch

from hf_ext.trainers import projection


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("total, step, lengths", [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 9, [2]), (0, 4, [])])
def test_slices_cover_everything_once(total, step, lengths):
    parts = [range(total)[part] for part in projection.slices(total, step)]
    assert [len(part) for part in parts] == lengths
    assert [item for part in parts for item in part] == list(range(total))


@pytest.mark.parametrize("needed", [(True, True, True), (False, True, False), (True, False, True)])
@pytest.mark.parametrize("vocab", [13, 10], ids=["whole", "padded"])
def test_gradients_are_those_of_autograd(needed, vocab):
    """With a padded vocabulary the projections have fewer columns than the weight has rows."""
    leaves = draw(9, 4), draw(13, 4), draw(13)
    upstream = draw(9, vocab)
    hidden, weight, bias = (leaf.clone().requires_grad_() for leaf in leaves)
    truth = (hidden @ weight.T + bias)[:, :vocab]
    found = projection.project(*leaves, torch.empty(9, vocab, dtype=torch.float64))
    torch.testing.assert_close(found, truth.detach(), rtol=1e-12, atol=1e-12)
    (truth * upstream).sum().backward()
    chunks = ((part, upstream[part]) for part in projection.slices(9, 4))
    gradients = projection.projection_gradients(needed, *leaves, torch.float64, chunks)
    for gradient, leaf, asked in zip(gradients, (hidden, weight, bias), needed, strict=True):
        assert (gradient is not None) == asked
        if gradient is not None:
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-12, atol=1e-12)


def test_another_dtype_is_converted_in_slices_and_summed_in_float32():
    vocab = projection.WEIGHT_SLICE + 500
    hidden, weight, rows = (
        draw(3, 8, dtype=torch.float32),
        draw(vocab, 8, dtype=torch.float32),
        draw(3, vocab).bfloat16(),
    )
    parts = [(part, rows_VH.dtype) for part, rows_VH in projection.weight_slices(weight, torch.bfloat16)]
    assert parts == [(slice(0, vocab - 500), torch.bfloat16), (slice(vocab - 500, vocab), torch.bfloat16)]
    (whole,) = projection.weight_slices(weight, torch.float32)
    assert whole[1].data_ptr() == weight.data_ptr()
    low = weight.bfloat16().double()
    out = projection.project(hidden, weight, None, torch.empty(3, vocab, dtype=torch.bfloat16))
    torch.testing.assert_close(out.double(), hidden.bfloat16().double() @ low.T, rtol=1e-2, atol=1e-2)
    product = projection.times_weight(rows, weight)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), rows.double() @ low, rtol=1e-5, atol=1e-3)
    _, gradient, _ = projection.projection_gradients(
        (False, True, False), hidden, weight, None, torch.bfloat16, [(slice(0, 3), rows)]
    )
    torch.testing.assert_close(gradient.double(), rows.double().T @ hidden.bfloat16().double(), rtol=1e-5, atol=1e-5)


def test_products_follow_autocast():
    assert projection.product_dtype(draw(1, 2)) == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert projection.product_dtype(draw(1, 2)) == torch.bfloat16
