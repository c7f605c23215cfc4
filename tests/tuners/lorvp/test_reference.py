"""Prompts and label maps: recorded values of the authors' code, and the laws that they follow."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_ext import LorVpConfig
from hf_ext.tuners.lorvp import LorVpConvolution, reference
from hf_ext.tuners.lorvp.mapping import optimal_mapping
from tests.oracles import ORACLES

RECORDED = load_file(ORACLES / "lorvp/lorvp.safetensors")
SEED, MEAN, STD = 1234, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLOSE = dict(rtol=1e-5, atol=1e-6)


def layer(**options) -> LorVpConvolution:
    base = nn.Conv2d(3, 8, 4, stride=4)
    base.weight.data, base.bias.data = RECORDED["conv_weight"].clone(), RECORDED["conv_bias"].clone()
    base.requires_grad_(False)
    made = LorVpConvolution(base)
    torch.manual_seed(SEED)
    made.update_layer("default", LorVpConfig(r=4, image_size=32, pixel_scale=[1 / each for each in STD], **options))
    made.set_adapter("default")
    return made


def normalised() -> torch.Tensor:
    """Pictures as a processor hands them over, without a prompt."""
    torch.testing.assert_close(
        (RECORDED["pixel_01"] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None],
        RECORDED["out_init"],
        **CLOSE,
    )
    return RECORDED["out_init"]


def test_the_start_is_that_of_the_authors():
    started = layer()
    assert torch.equal(started.lorvp_B["default"], RECORDED["init_left"])
    torch.testing.assert_close(started.lorvp_A["default"].detach(), RECORDED["init_right"], **CLOSE)
    with torch.no_grad():
        assert torch.equal(started(normalised()), started.get_base_layer()(normalised()))


def test_prompt_outputs_gradients_and_a_step():
    found = layer()
    left, right = found.lorvp_B["default"], found.lorvp_A["default"]
    left.data, right.data = RECORDED["left"].clone(), RECORDED["right"].clone()
    torch.testing.assert_close(found.prompt("default").detach(), RECORDED["prompt"], **CLOSE)
    pixels = normalised()
    prompted = pixels + reference.scaled(RECORDED["prompt"], [1 / each for each in STD])
    torch.testing.assert_close(prompted, RECORDED["out"], **CLOSE)
    outputs = found(pixels)
    torch.testing.assert_close(outputs.detach(), RECORDED["conv_out"], **CLOSE)
    loss = F.mse_loss(outputs, RECORDED["conv_target"])
    torch.testing.assert_close(loss.detach().view(1), RECORDED["loss"], **CLOSE)
    optimizer = torch.optim.SGD([left, right], lr=0.02, momentum=0.9, weight_decay=1e-4)
    loss.backward()
    torch.testing.assert_close(left.grad, RECORDED["grad_left"], **CLOSE)
    torch.testing.assert_close(right.grad, RECORDED["grad_right"], **CLOSE)
    optimizer.step()
    torch.testing.assert_close(left.detach(), RECORDED["left_after_sgd"], **CLOSE)
    torch.testing.assert_close(right.detach(), RECORDED["right_after_sgd"], **CLOSE)


def test_the_label_map_is_that_of_the_authors():
    logits, labels = RECORDED["lm_logits"], RECORDED["lm_labels"].long()
    counts = reference.frequencies(logits.argmax(1), labels, 30, 7)
    mapping = reference.greedy_mapping(counts)
    assert torch.equal(mapping, RECORDED["lm_mapping"].long())
    mapped = logits[:7][:, mapping]
    torch.testing.assert_close(mapped, RECORDED["lm_mapped_logits"], **CLOSE)
    torch.testing.assert_close(F.cross_entropy(mapped, labels[:7]).view(1), RECORDED["lm_mapped_ce"], **CLOSE)


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(0, 5), st.integers(1, 60))
def test_the_optimal_map_is_never_worse(seed, targets, more, images):
    generator = torch.Generator().manual_seed(seed)
    sources = targets + more
    counts = reference.frequencies(
        torch.randint(sources, (images,), generator=generator),
        torch.randint(targets, (images,), generator=generator),
        sources,
        targets,
    )
    assert counts.sum() == images
    greedy, optimal = reference.greedy_mapping(counts), optimal_mapping(counts)
    for mapping in (greedy, optimal):
        assert len(set(mapping.tolist())) == targets and mapping.min() >= 0 and mapping.max() < sources
    assert reference.agreement(counts, optimal) >= reference.agreement(counts, greedy)


def test_where_greedy_is_worse():
    counts = torch.tensor([[10, 9], [8, 0]])
    assert reference.greedy_mapping(counts).tolist() == [0, 1]
    assert optimal_mapping(counts).tolist() == [1, 0]


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))
def test_resizing_a_product_is_resizing_its_factors(seed, height, width, new_height, new_width):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(3, height, 2, generator=generator, dtype=torch.float64)
    right = torch.randn(3, 2, width, generator=generator, dtype=torch.float64)
    whole = reference.resized(reference.low_rank(left, right), new_height, new_width)
    parts = reference.low_rank(reference.resized(left, new_height, 2), reference.resized(right, 2, new_width))
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)


@given(st.integers(0, 10**6))
def test_maps_are_linear_in_prompts_and_blind_to_the_order_of_ranks(seed):
    found, generator = layer(), torch.Generator().manual_seed(seed)
    one, other = (torch.randn(3, 32, 32, generator=generator) for _ in range(2))
    maps = [found._convolved(prompt, "default", (32, 32)).detach() for prompt in (one, other, one + 2 * other)]
    torch.testing.assert_close(maps[0] + 2 * maps[1], maps[2], rtol=1e-4, atol=1e-5)
    left, right = torch.randn(3, 32, 4, generator=generator), torch.randn(3, 4, 32, generator=generator)
    order = torch.randperm(4, generator=generator)
    torch.testing.assert_close(
        reference.low_rank(left, right), reference.low_rank(left[..., order], right[:, order]), rtol=1e-4, atol=1e-5
    )


def test_any_picture_is_a_prompt_of_full_rank():
    picture = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(picture, full_matrices=False)
    torch.testing.assert_close(reference.low_rank(u * s[:, None], v), picture, rtol=0, atol=1e-4)


def test_shared_factors_are_a_sum_of_outer_products():
    generator = torch.Generator().manual_seed(0)
    colours, left, right = (torch.randn(shape, generator=generator) for shape in ((3, 2), (5, 2), (2, 4)))
    expected = torch.einsum("ck,hk,kw->chw", colours, left, right)
    torch.testing.assert_close(reference.low_rank_shared(colours, left, right), expected)


def test_frames_and_tiles():
    mask = reference.frame_mask(5, 6, 2)
    assert int(mask.sum()) == 30 - 1 * 2
    prompt = reference.frame(torch.arange(3.0 * 28).view(3, 28), mask)
    assert prompt[:, 2, 2:4].abs().sum() == 0
    assert prompt[1, 0].tolist() == list(range(28, 34))
    tile = torch.arange(3.0 * 4).view(3, 2, 2)
    assert torch.equal(reference.tiled(tile, 5, 3)[:, :4, :2], tile.repeat(1, 2, 1))
    assert reference.tiled(tile, 5, 3).shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 4}, 3 * 4 * (32 + 32)),
        ({"r": 4, "prompt": "low_rank_shared"}, 4 * (32 + 32 + 3)),
        ({"prompt": "frame", "width": 4}, 3 * (32 * 32 - 24 * 24)),
        ({"prompt": "tile", "width": 8}, 3 * 8 * 8),
        ({"prompt": "free"}, 3 * 32 * 32),
    ],
)
def test_numbers_that_are_trained(options, expected):
    from peft import get_peft_model

    base = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    )
    model = get_peft_model(base, LorVpConfig(pixel_scale=1.0, head="none", **options))
    assert model.get_nb_trainable_parameters()[0] == expected
