"""Attention over packed tokens: the compiled library and the sliced PyTorch form against dequantise-then-attend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.kernels import attention, native
from hf_ext.kernels.attention import Tokens, reference
from hf_ext.kernels.quantize import quantize_keys, quantize_values

needs_library = pytest.mark.skipif(native.library() is None, reason=native.status())


def packed_cache(
    batch=2, heads=2, tokens=128, channels=64, bits=(2, 2), group=32, first=4, recent=7, value_tokens=None, half=True
):
    dtype = torch.float16 if half else torch.float32
    value_group = max(g for g in range(1, group + 1) if channels % g == 0)

    value_tokens = tokens if value_tokens is None else value_tokens
    keys = torch.randn(batch, heads, tokens, channels) * torch.rand(channels) * 3
    values = torch.randn(batch, heads, value_tokens, channels)

    def whole(count):
        return torch.randn(batch, heads, count, channels)

    packed_keys = quantize_keys(keys, bits=bits[0], group_size=group, block_size=channels, scale_dtype=dtype)
    packed_values = quantize_values(values, bits=bits[1], group_size=value_group, scale_dtype=dtype)
    return (
        Tokens(whole(first), packed_keys, whole(recent), bits[0], group, -2),
        Tokens(whole(first), packed_values, whole(recent + tokens - value_tokens), bits[1], value_group, -1),
    )


@pytest.fixture(params=["native", "torch"])
def attend(request, monkeypatch):
    if request.param == "native":
        if native.library() is None:
            pytest.skip(native.status())
    else:
        monkeypatch.setattr(native, "library", lambda: None)
    return attention.attend


@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2), (2, 8)])
@pytest.mark.parametrize("channels", [16, 64, 80, 96, 128])
def test_equals_the_reference(attend, bits, channels):
    torch.manual_seed(0)
    cache = packed_cache(channels=channels, bits=bits)
    query = torch.randn(2, 6, 3, channels)
    torch.testing.assert_close(
        attend(query, *cache, scaling=0.1), reference.attend(query, *cache, scaling=0.1), atol=2e-5, rtol=1e-5
    )


def test_mask_softcap_and_sinks(attend):
    torch.manual_seed(1)
    cache = packed_cache(heads=1)
    query = torch.randn(2, 4, 2, 64) * 3
    mask = torch.rand(2, 1, 2, 139) > 0.4
    mask[1, 0, 1] = False
    settings = dict(scaling=0.2, softcap=5.0, sinks=torch.randn(4))
    ours = attend(query, *cache, mask, **settings)
    torch.testing.assert_close(ours, reference.attend(query, *cache, mask, **settings), atol=2e-5, rtol=1e-5)
    assert not ours[1, :, 1].any(), "a row that may attend to nothing gets nothing"
    added = torch.zeros(2, 1, 2, 139).masked_fill(~mask, torch.finfo(torch.float32).min)
    added[1, 0, 1] = 0
    torch.testing.assert_close(
        attend(query, *cache, added, **settings),
        reference.attend(query, *cache, added, **settings),
        atol=2e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("first, tokens, recent", [(0, 0, 5), (4, 0, 1), (0, 32, 1), (0, 96, 40), (3, 2048, 9)])
def test_every_part_may_be_empty(attend, first, tokens, recent):
    cache = packed_cache(tokens=tokens, first=first, recent=recent)
    query = torch.randn(2, 2, 1, 64)
    torch.testing.assert_close(
        attend(query, *cache, scaling=0.3), reference.attend(query, *cache, scaling=0.3), atol=2e-5, rtol=1e-5
    )


def test_keys_and_values_may_be_packed_to_different_lengths(attend):
    cache = packed_cache(tokens=96, value_tokens=77, recent=3)
    query = torch.randn(2, 2, 1, 64)
    torch.testing.assert_close(
        attend(query, *cache, scaling=0.3), reference.attend(query, *cache, scaling=0.3), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_queries_and_whole_tokens(attend, dtype):
    cache = packed_cache()
    cache = [tokens._replace(first=tokens.first.to(dtype), recent=tokens.recent.to(dtype)) for tokens in cache]
    query = torch.randn(2, 4, 1, 64, dtype=dtype)
    out = attend(query, *cache, scaling=0.125)
    assert out.dtype == dtype
    torch.testing.assert_close(out, reference.attend(query, *cache, scaling=0.125))


@pytest.mark.parametrize("heads, ratio, tokens", [(1, 1, 1), (4, 1, 1), (4, 1, 3), (2, 3, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_sinks_with_any_number_of_rows(attend, heads, ratio, tokens, masked):
    torch.manual_seed(3)
    cache = packed_cache(heads=heads)
    query, mask = torch.randn(2, heads * ratio, tokens, 64), torch.rand(2, 1, tokens, 139) > 0.3 if masked else None
    settings = dict(scaling=0.2, sinks=torch.randn(heads * ratio))
    torch.testing.assert_close(
        attend(query, *cache, mask, **settings),
        reference.attend(query, *cache, mask, **settings),
        atol=2e-5,
        rtol=1e-5,
    )


def test_float32_scales(attend):
    cache = packed_cache(half=False)
    query = torch.randn(2, 4, 1, 64)
    torch.testing.assert_close(
        attend(query, *cache, scaling=0.1), reference.attend(query, *cache, scaling=0.1), atol=2e-5, rtol=1e-5
    )


@needs_library
@settings(max_examples=30, deadline=None)
@given(
    heads=st.integers(1, 3),
    ratio=st.integers(1, 6),
    groups=st.integers(1, 5),
    channels=st.sampled_from([8, 24, 32, 48, 72, 128, 256]),
    group=st.sampled_from([8, 16, 32, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    threads=st.integers(1, 3),
)
def test_any_shape_on_any_number_of_threads(heads, ratio, groups, channels, group, bits, threads):
    torch.manual_seed(groups)
    cache = packed_cache(1, heads, groups * group, channels, (bits, bits), group)
    query = torch.randn(1, heads * ratio, 1, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "threads", lambda work: threads)
        out = attention.attend(query, *cache, scaling=0.2)
    torch.testing.assert_close(out, reference.attend(query, *cache, scaling=0.2), atol=3e-5, rtol=1e-5)


def test_the_environment_switches_the_library_off():
    import subprocess
    import sys

    script = "from hf_ext.kernels import native; assert native.library() is None; print(native.status())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**__import__("os").environ, "HF_EXT_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "HF_EXT_NATIVE=0" in done.stdout
