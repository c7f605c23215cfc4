"""Quantise, compensate, pack: the authors' codes, the paper's form, the laws of the operator, and the compiled library."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_ext.kernels import native, quantize
from hf_ext.kernels.quantize import dequantize, quantize_keys, quantize_values, reference
from tests.kernels.recorded import FOLDER, MANIFEST, hadamard

CASES = [(file, name) for file in ("gqa_d64", "mha_d32", "real_pair") for name in MANIFEST[file]["configs"]]


def qhat(query, heads, rank):
    """diag(S) V^T of the stacked query rows of each key-value head."""
    rows = query.float().reshape(query.shape[0], heads, -1, query.shape[-1])
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return values[..., :rank, None] * vectors[..., :rank, :]


def case(file, name):
    tensors, config = load_file(FOLDER / f"{file}.safetensors"), MANIFEST[file]["configs"][name]
    query, keys = tensors["q"], tensors["k"]
    if config.get("hadamard"):
        query, keys = query @ hadamard(query.shape[-1]), keys @ hadamard(query.shape[-1])
    if config.get("fp16"):
        keys = keys.half()
    return tensors, config, qhat(query, keys.shape[1], config["r"]), keys


def settings_of(config):
    axis = -1 if config.get("key_quant") == "per_token" else -2
    return dict(bits=config["bits"], group_size=config["G"], axis=axis, block_size=config["g"])


@pytest.mark.parametrize("file, name", [case for case in CASES if case != ("mha_d32", "c5")])
def test_the_authors_codes(file, name):
    tensors, config, directions, keys = case(file, name)
    ours = reference.quantize(keys, directions * config["lam"] ** 0.5, **settings_of(config))
    assert torch.equal(ours.codes, tensors[f"{name}.k_codes"])
    if file != "real_pair":
        torch.testing.assert_close(ours.scale.mT, tensors[f"{name}.k_scale"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.minimum.mT, tensors[f"{name}.k_min"], rtol=1e-4, atol=1e-5)


def test_the_authors_codes_of_float16_keys(monkeypatch):
    """Identical if the arithmetic is theirs, float16 throughout; ours is float32, and ties fall otherwise."""
    tensors, config, directions, keys = case("mha_d32", "c5")
    basis, theirs = directions * config["lam"] ** 0.5, tensors["c5.k_codes"]
    ours = reference.quantize(keys, basis, **settings_of(config)).codes
    assert (ours == theirs).float().mean() > 0.995
    assert (ours.int() - theirs.int()).abs().max() == 1

    def in_half(x, bits, group_size, axis, scale_dtype, clip):
        assert clip == 1
        groups = x.half().unflatten(axis, (-1, group_size))
        low, high = groups.aminmax(dim=axis, keepdim=True)
        scale = (high - low) / (2**bits - 1)
        codes = ((groups - low) / scale).clamp(0, 2**bits - 1).round().to(torch.uint8)
        return reference.Quantized(codes.flatten(axis - 1, axis), scale.squeeze(axis), low.squeeze(axis))

    def half_values(quantized, group_size, axis):
        groups = quantized.codes.unflatten(axis, (-1, group_size))
        return (
            (groups * quantized.scale.unsqueeze(axis) + quantized.minimum.unsqueeze(axis))
            .flatten(axis - 1, axis)
            .float()
        )

    monkeypatch.setattr(reference, "group_quantize", in_half)
    monkeypatch.setattr(reference, "dequantize", half_values)
    assert torch.equal(reference.quantize(keys, basis, **settings_of(config)).codes, theirs)


@pytest.mark.parametrize("name", MANIFEST["real_pair"]["configs"])
def test_the_authors_plain_keys(name):
    tensors, config, _, keys = case("real_pair", name)
    plain = reference.group_quantize(keys, config["bits"], config["G"], -2)
    torch.testing.assert_close(reference.dequantize(plain, config["G"], -2), tensors[f"{name}.k_deq_plain"])


@pytest.mark.parametrize("file", ["gqa_d64", "mha_d32"])
def test_the_authors_values(file):
    tensors = load_file(FOLDER / f"{file}.safetensors")
    found = [name.removesuffix(".codes") for name in tensors if name.startswith("v_G") and name.endswith(".codes")]
    assert found
    for name in found:
        group, bits = (int(part[1:]) for part in name.split("_")[1:])
        ours = reference.group_quantize(tensors["v"], bits, group, -1)
        assert torch.equal(ours.codes, tensors[f"{name}.codes"])
        torch.testing.assert_close(ours.scale, tensors[f"{name}.scale"].view_as(ours.scale))
        torch.testing.assert_close(ours.minimum, tensors[f"{name}.min"].view_as(ours.minimum))


def paper_form(keys, directions, lam, *, bits, group_size, block_size, axis=-2):
    """The paper's update: with P = A^-1, what block F cost is passed on by (P_FF)^-1 P_F,rest, in float64."""
    keys = keys.double()
    channels = keys.shape[-1]
    metric = torch.eye(channels, dtype=torch.float64) + lam * directions.mT.double() @ directions.double()
    inverse = torch.linalg.inv(metric)
    rest, codes = keys.clone(), []
    for end in range(block_size, channels + 1, block_size):
        block = slice(end - block_size, end)
        part = reference.group_quantize(rest[..., block], bits, group_size, axis)
        codes.append(part.codes)
        cost = reference.dequantize(part, group_size, axis).double() - rest[..., block]
        columns = torch.linalg.inv(inverse[..., :end, :end])[..., -block_size:]
        rest[..., end:] += cost @ columns.mT @ inverse[..., :end, end:]
    return torch.cat(codes, -1)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rank=st.sampled_from([1, 5, 16, 32]),
    block=st.sampled_from([1, 4, 8, 16, 32]),
    bits=st.sampled_from([2, 3, 4]),
    lam=st.floats(1e-4, 1.0),
)
def test_low_rank_form_equals_the_papers(seed, rank, block, bits, lam):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, 32, 32, generator=generator)
    directions = torch.randn(2, rank, 32, generator=generator)
    ours = reference.quantize(keys, lam**0.5 * directions, bits=bits, group_size=16, block_size=block)
    theirs = paper_form(keys, directions, lam, bits=bits, group_size=16, block_size=block)
    assert (ours.codes == theirs).float().mean() > 0.99


keys_and_basis = st.integers(0, 10**6).map(
    lambda seed: (
        torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(seed)),
        torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed + 1)) * 0.5,
    )
)
FORM = dict(bits=2, group_size=32, block_size=8)


@settings(max_examples=15, deadline=None)
@given(keys_and_basis)
def test_laws(pair):
    keys, basis = pair
    plain = reference.group_quantize(keys, 2, 32, -2)
    ours = reference.quantize(keys, basis, **FORM)
    # No strength, or a single block, is KIVI bit for bit.
    for other in (
        reference.quantize(keys, 0 * basis, **FORM),
        reference.quantize(keys, basis, **{**FORM, "block_size": 32}),
    ):
        assert all(map(torch.equal, other, plain))
    # Neither the signs nor the choice of an orthonormal basis of the subspace matter.
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    for equivalent in (-basis, rotation @ basis):
        assert (reference.quantize(keys, equivalent, **FORM).codes == ours.codes).float().mean() > 0.995
    # Channels may be shifted: the minimum takes it up.
    shift = torch.randn(32)
    assert (reference.quantize(keys + shift, basis, **FORM).codes == ours.codes).float().mean() > 0.995
    # The error that the subspace sees is smaller, which is the point.
    seen = [(reference.dequantize(q, 32, -2) - keys) @ basis.mT for q in (ours, plain)]
    assert seen[0].norm() < seen[1].norm()


def test_great_strength_leaves_only_the_last_channels_error_in_sight():
    generator = torch.Generator().manual_seed(0)
    keys, basis = torch.randn(256, 64, generator=generator), torch.randn(1, 64, generator=generator)
    seen = []
    for strength in (0.0, 1e-2, 1e4):
        done = reference.quantize(keys, strength**0.5 * basis, bits=4, group_size=32, block_size=1)
        seen.append(((reference.dequantize(done, 32, -2) - keys) @ basis.mT).norm())
    assert seen[2] < seen[1] < seen[0]
    assert seen[2] < 3 * seen[0] / 64**0.5


def test_constant_groups_are_exact():
    keys = torch.full((32, 16), 3.25)
    for quantized in (reference.group_quantize(keys, 2, 32, -2), reference.quantize(keys, torch.randn(3, 16), **FORM)):
        assert not quantized.codes.any()
        assert torch.equal(reference.dequantize(quantized, 32, -2), keys)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_stays_within_half_a_step(bits):
    x = torch.randn(3, 64, 64) * 5
    for axis in (-1, -2):
        quantized = reference.group_quantize(x, bits, 32, axis)
        step = quantized.scale.repeat_interleave(32, axis)
        assert ((reference.dequantize(quantized, 32, axis) - x).abs() <= step * 0.5001).all()


@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 8]),
    clip=st.floats(0.5, 1),
    outliers=st.sampled_from([0.0, 0.02, 0.3]),
    axis=st.sampled_from([-1, -2]),
)
def test_a_clipped_group_is_never_worse(seed, bits, clip, outliers, axis):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 32, 32, generator=generator)
    x += 50 * x * (torch.rand(x.shape, generator=generator) < outliers)

    def errors(clip):
        quantized = reference.group_quantize(x, bits, 16, axis, clip=clip)
        delta = reference.dequantize(quantized, 16, axis).unflatten(axis, (-1, 16)) - x.unflatten(axis, (-1, 16))
        return delta.square().sum(axis)

    clipped, whole = errors(clip), errors(1.0)
    assert (clipped <= whole * (1 + 1e-4) + 1e-9).all()


def test_what_clipping_gains_on_bell_curves():
    x = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))

    def error(bits, clip):
        return (reference.dequantize(reference.group_quantize(x, bits, 64, -2, clip=clip), 64, -2) - x).square().mean()

    assert error(2, 0.8) < 0.75 * error(2, 1.0)
    assert error(3, 0.9) < 0.9 * error(3, 1.0)


@pytest.mark.parametrize("clip", [1.0, 0.8])
def test_parts_do_not_show(monkeypatch, clip):
    """Work is cut into heads, or into groups of tokens of a head."""
    keys, basis = torch.randn(2, 3, 48, 16), torch.randn(2, 3, 4, 16)
    order = torch.rand(2, 3, 16).argsort(-1)
    form = dict(bits=3, scale_dtype=torch.float16, clip=clip)

    def results():
        return [
            *quantize_keys(keys, basis, order, group_size=8, block_size=4, **form),
            *quantize_keys(keys[0, 0], group_size=8, block_size=4, **form),
            *quantize_values(keys, group_size=16, **form),
            *quantize_values(keys[0, 0], group_size=16, **form),
        ]

    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        whole = results()
        for part in (1, 300, 48 * 16 * 2):
            with monkeypatch.context() as patch:
                patch.setattr(quantize, "PART", part)
                assert all(map(torch.equal, results(), whole))


@given(st.sampled_from([2, 3, 4, 8]), st.integers(0, 3), st.sampled_from([8, 16, 24, 128]), st.integers(0, 10**6))
def test_packing_is_lossless(bits, tokens, channels, seed):
    codes = torch.randint(
        0, 2**bits, (2, tokens, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    packed = reference.pack(codes, bits)
    assert packed.shape == (2, tokens, channels * bits // 8)
    assert torch.equal(reference.unpack(packed, bits), codes)


def test_a_byte_holds_channels_that_lie_a_plane_apart():
    codes = torch.tensor([[1, 0, 2, 0, 3, 0, 0, 1]], dtype=torch.uint8)
    assert reference.pack(codes, 2).tolist() == [[1 | 2 << 2 | 3 << 4, 1 << 6]]


@pytest.mark.skipif(native.library() is None, reason=native.status())
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 4, 8]),
    channels=st.sampled_from([16, 24, 64, 80]),
    group=st.sampled_from([8, 16, 32]),
    groups=st.integers(0, 3),
    rank=st.sampled_from([0, 1, 7]),
    ordered=st.booleans(),
    half=st.booleans(),
    clip=st.sampled_from([1.0, 0.8]),
)
def test_the_library_equals_the_reference(seed, bits, channels, group, groups, rank, ordered, half, clip):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(2, groups * group, channels, generator=generator)
    basis = torch.randn(2, rank, channels, generator=generator) * 0.3 if rank else None
    order = torch.stack([torch.randperm(channels, generator=generator) for _ in range(2)]) if ordered else None
    form = dict(bits=bits, group_size=group, scale_dtype=torch.float16 if half else torch.float32, clip=clip)
    value_form = {**form, "group_size": 8}
    ours = quantize_keys(keys, basis, order, block_size=8, **form)
    values = quantize_values(keys, **value_form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        theirs = quantize_keys(keys, basis, order, block_size=8, **form)
        exact = quantize_values(keys, **value_form)
        # Of two spans with nearly the same error either may be taken.
        least = 1.0 if clip == 1 else 0.99
        same = [torch.isclose(x, y, rtol=2e-3, atol=1e-5) for x, y in zip(values, exact, strict=True)]
        assert keys.numel() == 0 or all(part.float().mean() >= least for part in same)
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    # A sum in another order decides a tie otherwise, and what follows in that group with it.
    assert keys.numel() == 0 or (ours.codes == theirs.codes).float().mean() > 0.97
    errors = [dequantize(x, bits, group, -2) - keys for x in (ours, theirs)]
    torch.testing.assert_close(errors[0].square().sum(), errors[1].square().sum(), rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keys(dtype):
    keys = torch.randn(2, 64, 32, dtype=dtype)
    form = dict(bits=4, group_size=32, scale_dtype=torch.float16)
    packed = quantize_keys(keys, block_size=8, **form)
    assert packed.scale.dtype == torch.float16
    exact = quantize_keys(keys.float(), block_size=8, **form)
    assert all(map(torch.equal, packed, exact))
