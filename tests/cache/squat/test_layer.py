"""One layer of the cache: what it keeps whole, what it packs, and every operation that `generate` asks of it."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from hf_ext.cache.squat import SQuatCacheConfig, SQuatLayer, reference
from hf_ext.kernels import native
from tests.kernels.recorded import FOLDER, MANIFEST

SMALL = dict(bits=4, group_size=8, residual_length=16, sink_tokens=2, subspace_dim=4, block_size=4)


def tokens(count, batch=2, heads=2, channels=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, count, channels, generator=generator).to(dtype) for _ in range(2))


def query(count, batch=2, heads=4, channels=16, seed=9):
    return torch.randn(batch, heads, count, channels, generator=torch.Generator().manual_seed(seed))


def filled(count=70, steps=0, **settings):
    """A layer after a prompt and single steps, as the attention function leaves it."""
    layer = SQuatLayer(SQuatCacheConfig(**{**SMALL, **settings}))
    layer.update(*tokens(count))
    layer.observe(query(count), None)
    layer.pack()
    for step in range(steps):
        layer.update(*tokens(1, seed=100 + step))
    return layer


def test_the_window_never_falls_below_the_residual_length():
    layer = filled(40)
    for step in range(60):
        layer.update(*tokens(1, seed=step))
        first, packed, recent = layer.tokens[0].lengths
        assert first == 2 and packed % 8 == 0 and first + packed + recent == 41 + step == layer.get_seq_length()
        assert 16 <= recent <= 16 + 8
        assert layer.tokens[1].lengths == [first, packed, recent]
        assert layer.get_mask_sizes(3) == (44 + step, 0)


def test_whole_tokens_are_exact_and_packed_ones_are_near():
    keys, values = tokens(70)
    layer = filled(70, bits=8)
    for kept, given in zip((layer.materialize(0), layer.materialize(1)), (keys, values), strict=True):
        assert torch.equal(kept[..., :2, :], given[..., :2, :])
        assert torch.equal(kept[..., -16:, :], given[..., -16:, :])
        error = (kept - given).abs().amax() / (given.amax() - given.amin())
        assert 0 < error < 0.02


def test_handles_are_right_whatever_is_done_with_them():
    layer = SQuatLayer(SQuatCacheConfig(**SMALL))
    keys, values = tokens(5)
    key, value = layer.update(keys, values)
    assert key.shape == keys.shape and key.dtype == keys.dtype and "keys" in repr(key)
    torch.testing.assert_close(key + 0, keys)
    torch.testing.assert_close(torch.cat([value, value], -2), torch.cat([values, values], -2))
    torch.testing.assert_close(value.transpose(1, 2), values.transpose(1, 2))
    torch.testing.assert_close(
        torch.nn.functional.scaled_dot_product_attention(keys, key, value),
        torch.nn.functional.scaled_dot_product_attention(keys, keys, values),
    )
    assert layer.materializations == 0, "nothing was packed"


@pytest.mark.parametrize("removed", range(0, 17))
def test_crop_within_the_window_leaves_no_trace(removed):
    grown, straight = filled(70, steps=16), filled(70, steps=16 - removed)
    grown.crop(-removed)
    # What has been packed meanwhile stays packed, so compare what comes after as well.
    assert grown.get_seq_length() == straight.get_seq_length()
    before = copy.deepcopy(grown)
    for step in range(3):
        grown.update(*tokens(1, seed=500 + step))
        grown.crop(-1)
    for ours, theirs in zip(grown.tokens, before.tokens, strict=True):
        assert torch.equal(ours.whole(torch.float32), theirs.whole(torch.float32))


def test_crop_beyond_the_window_keeps_lengths_and_rounding():
    layer = filled(70)
    whole = (layer.materialize(0), layer.materialize(1))
    for left in (51, 49, 20, 3, 2, 1):
        cropped = copy.deepcopy(layer)
        cropped.crop(left - 70)
        assert cropped.get_seq_length() == left
        for ours, given in zip((cropped.materialize(0), cropped.materialize(1)), whole, strict=True):
            torch.testing.assert_close(ours, given[..., :left, :])
        cropped.update(*tokens(30, seed=3))
        assert cropped.get_seq_length() == left + 30
    layer.crop(-70)
    assert layer.get_seq_length() == 0 and not layer.is_initialized
    with pytest.raises(
        ValueError, match=r"crop\(3\): give the number of tokens to remove as a negative number, crop\(-3\)"
    ):
        layer.crop(3)


def rows(layer, index):
    return [x[index] for part in layer.tokens for x in (part.first, *part.packed, part.recent)] + [
        layer.subspace.directions[index],
        layer.subspace.strength[index],
        layer.subspace.order[index],
    ]


def test_batch_operations_take_everything_along():
    layer = filled(70)
    for operation, wanted in (
        (lambda x: x.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda x: x.batch_select_indices(torch.tensor([1])), [1]),
    ):
        other = copy.deepcopy(layer)
        operation(other)
        assert other.batch_size == len(wanted)
        for position, source in enumerate(wanted):
            assert all(map(torch.equal, rows(other, position), rows(layer, source)))
        other.update(*tokens(40, batch=len(wanted)))
        other.pack()


def test_reset_starts_over():
    layer = filled(70, steps=20)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None and layer.nbytes == 0
    layer.update(*tokens(70))
    layer.observe(query(70), None)
    layer.pack()
    assert all(map(torch.equal, rows(layer, 0), rows(filled(70), 0)))


@pytest.mark.parametrize(
    "bits, group, dtype",
    [(2, 32, torch.bfloat16), (2, 64, torch.float16), (4, 32, torch.bfloat16), (3, 32, torch.bfloat16)],
)
def test_size_equals_the_formula(bits, group, dtype):
    """Bytes = H D [T_packed (b_k + 32/G + b_v + 32/G_v) / 8 + 4 T_whole] + what is known of the queries."""
    heads, channels, count, rank = 2, 128, 4096, 20
    layer = SQuatLayer(SQuatCacheConfig(bits=bits, group_size=group, residual_length=group))
    layer.update(*tokens(count, 1, heads, channels, dtype=dtype))
    layer.observe(query(count, 1, 4, channels).to(dtype), None)
    layer.pack()
    _, packed, _ = layer.tokens[0].lengths
    formula = heads * channels * (packed * 2 * (bits + 32 / group) / 8 + 4 * (count - packed))
    formula += heads * (rank * channels * 2 + channels * 2 + 4 + 4)
    assert layer.nbytes == formula
    if group == 64:
        assert layer.nbytes <= 0.2 * heads * channels * count * 4


def test_nothing_keeps_the_prompt_alive():
    layer = filled(4000)
    for part in layer.tokens:
        for tensor in (part.first, *part.packed, part.recent):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_short_prompt_keeps_nothing_else_alive():
    """Some models hand over views of queries, keys and values in one."""
    fused = torch.randn(1, 2, 20, 48)
    layer = SQuatLayer(SQuatCacheConfig())
    layer.update(fused[..., 16:32], fused[..., 32:])
    layer.pack()
    assert all(part.recent.untyped_storage().nbytes() == part.recent.nbytes for part in layer.tokens)


def test_padding_widens_no_group():
    """A left-padded row has the same codes as the row alone where its start is a multiple of the group size."""
    keys, values = tokens(96, batch=1)
    alone, padded = (SQuatLayer(SQuatCacheConfig(**{**SMALL, "sink_tokens": 0})) for _ in range(2))
    alone.update(keys[..., 24:, :], values[..., 24:, :])
    alone.observe(query(72, batch=1), None)
    alone.pack()
    wild = keys.clone()
    wild[..., :24, :] *= 100
    padded.update(torch.cat([wild, keys]), torch.cat([values, values]))
    real = torch.ones(2, 96, dtype=torch.bool)
    real[0, :24] = False
    asked = torch.cat([torch.randn(1, 4, 24, 16), query(72, batch=1)], -2)
    padded.mark(real)
    padded.observe(torch.cat([asked, query(96, batch=1)]), real)
    padded.pack()
    torch.testing.assert_close(
        padded.subspace.directions[:1].abs(), alone.subspace.directions.abs(), atol=2e-3, rtol=1e-2
    )
    ours, theirs = padded.tokens[0].packed, alone.tokens[0].packed
    assert (ours.codes[:1, :, 24:] == theirs.codes).float().mean() > 0.99
    # A group that is cut by the padding has the range of its real keys.
    real[0, :28] = False
    padded = SQuatLayer(SQuatCacheConfig(**{**SMALL, "sink_tokens": 0, "subspace_dim": 0, "clip_ratio": 1.0}))
    wild[..., :28, :] *= 100
    padded.update(torch.cat([wild, keys]), torch.cat([values, values]))
    padded.mark(real)
    padded.observe(query(96), real)
    padded.pack()
    cut = keys[0, :, 28:32]
    torch.testing.assert_close(padded.tokens[0].packed.minimum[0, :, 3], cut.amin(-2).half())


def test_keys_beyond_half_precision():
    """Biased keys of bfloat16 models can exceed float16; their scales are kept in float32 then."""
    layer = SQuatLayer(SQuatCacheConfig(**{**SMALL, "bits": 8}))
    keys, values = tokens(70)
    layer.update(keys, values)
    layer.pack()
    assert layer.tokens[0].packed.minimum.dtype == torch.float16
    huge = keys + 1e6
    layer.update(huge, values)
    layer.pack()
    assert layer.tokens[0].packed.minimum.dtype == torch.float32
    torch.testing.assert_close(layer.keys[..., 80:, :], huge[..., 10:, :], rtol=1e-5, atol=0.1)


def test_queries_come_in_chunks():
    """Chunks of a prompt give nearly the directions of the whole prompt."""
    generator = torch.Generator().manual_seed(0)
    asked = torch.randn(1, 4, 96, 16, generator=generator) @ torch.diag(torch.logspace(0, -2, 16))
    keys, values = tokens(96, batch=1)
    whole, chunked = (
        SQuatLayer(SQuatCacheConfig(**{**SMALL, "squat_lambda": 0.01, "subspace_dim": 8})) for _ in range(2)
    )
    whole.update(keys, values)
    whole.observe(asked, None)
    for part in (slice(0, 40), slice(40, 96)):
        chunked.update(keys[..., part, :], values[..., part, :])
        chunked.observe(asked[..., part, :], None)
        chunked.pack()
    whole.pack()
    metrics = [
        layer.subspace.energy[..., None, None] * reference.gram(layer.subspace.directions)
        for layer in (whole, chunked)
    ]
    assert (metrics[0] - metrics[1]).norm() < 0.01 * metrics[0].norm()


@pytest.mark.parametrize("library", [True, False])
def test_the_authors_schedule_and_numbers(library, monkeypatch):
    """Forty steps after a prompt of seventy: who is packed when, and what attention would read at the end."""
    if not library:
        monkeypatch.setattr(native, "library", lambda: None)
    trace, setting = load_file(FOLDER / "decode_trace.safetensors"), MANIFEST["decode_trace"]
    config = SQuatCacheConfig(
        bits=setting["bits"],
        group_size=setting["G"],
        residual_length=setting["residual_length"],
        sink_tokens=0,
        subspace_dim=setting["r"],
        squat_lambda=setting["lam"],
        block_size=setting["g"],
        order="index",
        clip_ratio=1.0,
        schedule="kivi",
    )
    layer = SQuatLayer(config)
    prompt = setting["prompt"]
    layer.update(trace["k"][..., :prompt, :], trace["v"][..., :prompt, :])
    layer.scale_dtype = torch.float32  # as the recorded run; float16 moves ties, and what follows in their group
    layer.observe(trace["q_prompt"], None)
    layer.pack()
    for step in range(setting["new_tokens"]):
        at = slice(prompt + step, prompt + step + 1)
        layer.update(trace["k"][..., at, :], trace["v"][..., at, :])
        (_, quantized_keys, whole_keys), (_, quantized_values, whole_values) = (part.lengths for part in layer.tokens)
        assert [quantized_keys, whole_keys, quantized_values, whole_values] == trace["lengths_at_attention"][
            step
        ].tolist()
    layer.pack()
    keys, values = (layer.materialize(0), layer.materialize(1))
    step = layer.tokens[0].packed.scale.float().amax()
    same = ((keys - trace["k_final"]).abs() < 2e-2).float().mean()
    assert same > 0.999, same
    assert (keys - trace["k_final"]).abs().max() < 1.01 * step
    torch.testing.assert_close(values, trace["v_final"], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(bits=5), r"bits=5: choose one of 2, 3, 4, 8"),
        (dict(key_bits=16), r"key_bits=16: choose one of"),
        (dict(residual_length=40), r"residual_length=40 is not a multiple of group_size=64.*use 64"),
        (dict(group_size=0), r"group_size=0: give an integer of at least 2"),
        (dict(group_size=2.5), r"group_size=2.5: give an integer"),
        (dict(sink_tokens=-1), r"sink_tokens=-1"),
        (dict(subspace_dim=True), r"subspace_dim=True"),
        (dict(block_size=0), r"block_size=0"),
        (dict(squat_lambda=-1.0), r"squat_lambda=-1.0: give 'auto' or a number of at least 0"),
        (dict(squat_lambda="0.1"), r"squat_lambda='0.1'"),
        (dict(squat_lambda=float("nan")), r"squat_lambda=nan"),
        (dict(bits=2.0), r"bits=2.0: choose one of"),
        (dict(squat_lambda=None), r"squat_lambda=None"),
        (dict(clip_ratio=None), r"clip_ratio=None"),
        (dict(clip_ratio=0.4), r"clip_ratio=0.4: give 'auto' or a number from 0.5 to 1"),
        (dict(clip_ratio="0.8"), r"clip_ratio='0.8'"),
        (dict(order="random"), r"order='random': choose 'descending' or 'index'"),
        (dict(schedule="eager"), r"schedule='eager'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        SQuatCacheConfig(**settings)


@pytest.mark.parametrize(
    "channels, settings, message",
    [
        (17, dict(bits=2), r"key_bits=2: the model's head dimension 17 is not a multiple of 4"),
        (20, dict(bits=3), r"key_bits=3: the model's head dimension 20 is not a multiple of 8"),
        (18, dict(key_bits=8, value_bits=2, block_size=2), r"value_bits=2: the model's head dimension 18"),
        (64, dict(block_size=64), r"block_size=64: the model's head dimension is 64, so nothing would be left"),
        (20, dict(block_size=8), r"block_size=8 does not divide the model's head dimension 20"),
    ],
)
def test_head_dimensions_that_cannot_be_packed(channels, settings, message):
    layer = SQuatLayer(SQuatCacheConfig(**settings))
    with pytest.raises(ValueError, match=message):
        layer.update(*tokens(3, channels=channels))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_prompts_too_short_to_hold_queries_out(count):
    layer = SQuatLayer(SQuatCacheConfig(**SMALL))
    layer.update(*tokens(count))
    layer.observe(query(count), None)
    layer.pack()
    for step in range(60):
        layer.update(*tokens(1, seed=step))
    assert layer.has_packed and layer.subspace.strength.isfinite().all()
    if count < 4:
        assert not layer.subspace.strength.any(), "nothing to judge by, so plain rounding"
