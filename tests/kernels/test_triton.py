"""The Triton kernels: interpreted against the references, compiled ahead of time for two generations of GPUs, and run on one if it is there."""

import os
import platform
import re
import subprocess
import sys

import pytest
import torch

if (sys.platform, platform.machine()) != ("linux", "x86_64"):  # elsewhere the extra `dev` leaves it out
    pytest.importorskip("triton", reason="Triton is not installed")

from hf_ext.kernels import attention, native, quantize
from hf_ext.kernels.attention import Tokens, reference
from hf_ext.kernels.attention import triton as attention_kernels
from hf_ext.kernels.quantize import triton as quantize_kernels
from hf_ext.kernels.quantize.reference import unpack

# Triton decides when it defines a kernel whether it will be interpreted, so the interpreted tests have a process of their own.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="run by test_in_the_interpreter")
not_interpreted = pytest.mark.skipif(INTERPRETING, reason="needs Triton's compiler")
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu"


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def cache(
    channels=64,
    bits=(2, 2),
    group=32,
    lengths=(4, 96, 7),
    value_packed=None,
    dtype=torch.float32,
    scales=torch.float16,
    offset=0.0,
    batch=1,
):
    """Keys and values of two heads, of which `lengths` tokens are whole, packed and whole."""
    first, packed, recent = lengths
    value_packed = packed if value_packed is None else value_packed
    value_group = max(size for size in range(1, group + 1) if channels % size == 0)
    keys = numbers(batch, 2, packed, channels) + offset * numbers(channels)
    keys = quantize.quantize_keys(keys, bits=bits[0], group_size=group, block_size=channels, scale_dtype=scales)
    values = quantize.quantize_values(
        numbers(batch, 2, value_packed, channels), bits=bits[1], group_size=value_group, scale_dtype=scales
    )

    def whole(count):
        return numbers(batch, 2, count, channels, dtype=dtype)

    return (
        Tokens(whole(first), keys, whole(recent), bits[0], group, -2),
        Tokens(whole(first), values, whole(recent + packed - value_packed), bits[1], value_group, -1),
    )


def error(query, keys, values, mask=None, splits=None, **settings):
    """Relative error of the kernel, to what the reference gives in float32."""
    assert attention_kernels.supports(query, keys, values)
    settings = {"scaling": query.shape[-1] ** -0.5, **settings}
    ours = attention_kernels.attend(query, keys, values, mask, splits=splits, **settings)
    assert ours.shape == query.shape and ours.dtype == query.dtype and not ours.isnan().any()
    truth = reference.attend(query.float(), keys, values, mask, **settings)
    return ((ours.float() - truth).norm() / truth.norm()).item()


@not_interpreted
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-x", __file__]
    # Nothing here needs the PEFT types, whose registration takes longer than the tests.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_EXT_AUTO_REGISTER": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 44, done.stdout


@interpreted
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2), (2, 8), (8, 3)])
def test_attention_at_all_bits_with_several_rows_and_heads(bits):
    torch.manual_seed(0)
    assert error(numbers(1, 6, 2, 64), *cache(bits=bits), splits=2) <= 1e-5


@interpreted
@pytest.mark.parametrize(
    "channels, bits, group",
    [(16, (3, 3), 16), (80, (2, 4), 32), (96, (4, 2), 32), (128, (2, 2), 64), (128, (4, 3), 128), (256, (2, 4), 32)],
)
def test_attention_at_all_widths(channels, bits, group):
    torch.manual_seed(1)
    tokens = cache(channels, bits, group, lengths=(1, 2 * max(group, 32), 3))
    assert error(numbers(1, 2, 1, channels), *tokens, splits=1) <= 1e-5


@interpreted
@pytest.mark.parametrize(
    "dtype, bits, limit",
    [(torch.float16, (2, 2), 1e-3), (torch.float16, (4, 4), 1e-3), (torch.bfloat16, (2, 2), 4e-3)],
)
def test_attention_in_half_precision(dtype, bits, limit):
    torch.manual_seed(2)
    # bfloat16 is off by more than 1e-3 from rounding the output alone.
    assert error(numbers(1, 4, 1, 128, dtype=dtype), *cache(128, bits, dtype=dtype)) <= limit
    far = cache(64, bits, dtype=dtype, offset=50.0)
    assert error(numbers(1, 2, 1, 64, dtype=dtype), *far, scaling=0.02) <= limit, "channels far from zero"


@interpreted
@pytest.mark.parametrize(
    "lengths, splits", [((0, 0, 5), None), ((4, 0, 1), 3), ((0, 32, 1), None), ((3, 160, 0), 2), ((0, 224, 9), 9)]
)
def test_every_part_of_the_cache_may_be_empty(lengths, splits):
    torch.manual_seed(3)
    assert error(numbers(1, 2, 1, 32), *cache(32, lengths=lengths), splits=splits) <= 1e-5


@interpreted
def test_attention_with_keys_and_values_packed_to_different_lengths():
    torch.manual_seed(4)
    assert error(numbers(1, 2, 1, 32), *cache(32, value_packed=77)) <= 1e-5


@interpreted
def test_attention_of_64_rows():
    torch.manual_seed(5)
    query, tokens = numbers(1, 16, 8, 32), cache(32, lengths=(4, 32, 7))
    assert error(query, *tokens, torch.rand(1, 1, 8, 43) > 0.3) <= 1e-5
    assert not attention_kernels.supports(numbers(1, 16, 9, 32), *tokens)


@interpreted
@pytest.mark.parametrize("scales, dtype", [(torch.float32, torch.float32), (torch.float32, torch.float16)])
def test_attention_with_scales_in_float32(scales, dtype):
    torch.manual_seed(6)
    assert error(numbers(1, 2, 1, 32, dtype=dtype), *cache(32, scales=scales, dtype=dtype)) <= 1e-3


@interpreted
def test_attention_with_masks_softcap_and_sinks():
    torch.manual_seed(7)
    query, tokens = numbers(2, 4, 2, 32) * 3, cache(32, lengths=(4, 32, 7), batch=2)
    settings = dict(scaling=0.5, softcap=5.0, sinks=torch.randn(4))
    mask = torch.rand(2, 1, 2, 43) > 0.4
    assert error(query, *tokens, mask, **settings) <= 1e-5
    assert error(query, *tokens, torch.randn(2, 4, 2, 43), **settings) <= 1e-5
    assert error(query, *tokens, torch.randn(43, 2).half().T, scaling=0.5) <= 1e-5
    hidden = torch.zeros(2, 1, 2, 43).masked_fill(~mask, torch.finfo(torch.float32).min)
    hidden[1, :, 1] = torch.finfo(torch.float32).min
    assert error(query, *tokens, hidden, scaling=0.5) <= 1e-5, (
        "a row hidden by finite numbers is the mean of all values"
    )
    mask[1, :, 1] = False
    assert error(query, *tokens, mask, **settings) <= 1e-5
    ours = attention_kernels.attend(query, *tokens, mask, scaling=0.5)
    assert not ours[1, :, 1].any() and ours[0].any(), "a row without tokens gets nothing"


@interpreted
def test_attention_takes_any_strides():
    torch.manual_seed(8)
    keys, values = cache(32)
    keys = keys._replace(recent=numbers(1, 9, 2, 32).transpose(1, 2)[..., 2:, :])
    assert error(numbers(1, 2, 4, 32).transpose(1, 2), keys, values) <= 1e-5


def agree(ours, truth, bits):
    """Of a thousand codes, scales or minimums not one may differ by more than rounding."""
    assert ours.codes.shape == truth.codes.shape and ours.scale.dtype == truth.scale.dtype
    equal = [unpack(ours.codes, bits) == unpack(truth.codes, bits)]
    for part in ("scale", "minimum"):
        equal.append(torch.isclose(getattr(ours, part), getattr(truth, part), atol=1e-4, rtol=2e-3))
    assert all(part.float().mean() >= 0.999 for part in equal if part.numel())


def keys_agree(keys, basis, order, **settings):
    assert quantize_kernels.supports_keys(keys, basis, settings["group_size"], settings["block_size"])
    ours = quantize_kernels.quantize_keys(keys, basis, order, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        patch.setattr(quantize, "triton_kernels", lambda *_: None)
        truth = quantize.quantize_keys(keys, basis, order, **settings)
    agree(ours, truth, settings["bits"])


def values_agree(values, **settings):
    assert quantize_kernels.supports_values(values, settings["group_size"])
    ours = quantize_kernels.quantize_values(values, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        patch.setattr(quantize, "triton_kernels", lambda *_: None)
        truth = quantize.quantize_values(values, **settings)
    agree(ours, truth, settings["bits"])


@interpreted
@pytest.mark.parametrize(
    "bits, scale_dtype", [(2, torch.float16), (3, torch.float32), (4, torch.float16), (8, torch.float32)]
)
def test_keys_get_the_codes_of_the_reference(bits, scale_dtype):
    torch.manual_seed(bits)
    keys, basis = numbers(2, 32, 64) * torch.rand(64) * 3, numbers(2, 5, 64)
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    settings = dict(bits=bits, group_size=32, scale_dtype=scale_dtype)
    keys_agree(keys, basis, order, block_size=8, **settings)
    keys_agree(keys, basis, order, block_size=8, clip=0.8, **settings)


@interpreted
@pytest.mark.parametrize(
    "channels, group, block, rank",
    [(96, 16, 16, 20), (80, 32, 5, 3), (32, 64, 32, 4), (24, 128, 8, 2), (128, 16, 8, 0)],
)
@pytest.mark.parametrize("bits", [2, 3])
def test_keys_of_all_shapes(channels, group, block, rank, bits):
    torch.manual_seed(9)
    basis = numbers(1, rank, channels) if rank else None
    keys_agree(
        numbers(1, group, channels),
        basis,
        None,
        bits=bits,
        group_size=group,
        block_size=block,
        scale_dtype=torch.float16,
    )


@interpreted
def test_keys_and_values_take_any_strides_and_constant_groups():
    torch.manual_seed(10)
    keys = numbers(1, 40, 2, 32)
    keys[..., 3] = 1.5
    keys = keys.transpose(1, 2)[..., 4:36, :].expand(2, 1, 2, 32, 32)
    basis, order = numbers(2, 1, 2, 4, 32), torch.arange(31, -1, -1).expand(2, 1, 2, 32)
    settings = dict(bits=4, scale_dtype=torch.float16)
    keys_agree(keys, basis, order, group_size=16, block_size=8, **settings)
    keys_agree(keys[..., :0, :], basis, order, group_size=16, block_size=8, **settings)
    values_agree(keys, group_size=16, **settings)
    values_agree(keys[0, 0, 0, :0], group_size=16, **settings)


@interpreted
@pytest.mark.parametrize("bits, channels, group", [(2, 128, 32), (3, 64, 64), (4, 64, 16), (8, 32, 32)])
def test_values_get_the_codes_of_the_reference(bits, channels, group):
    torch.manual_seed(11)
    values = numbers(3, 21, channels)
    values_agree(values, bits=bits, group_size=group, scale_dtype=torch.float16)
    values_agree(values, bits=bits, group_size=group, scale_dtype=torch.float16, clip=0.8)


@interpreted
def test_shapes_that_the_kernels_do_not_take_go_to_the_other_implementations(monkeypatch):
    torch.manual_seed(12)
    for package, kernels in ((attention, attention_kernels), (quantize, quantize_kernels)):
        monkeypatch.setattr(package, "triton_kernels", lambda *_, kernels=kernels: kernels)
    calls = []
    kernel = attention_kernels.attend
    monkeypatch.setattr(
        attention_kernels, "attend", lambda *args, **kwargs: calls.append(1) or kernel(*args, **kwargs)
    )
    for group, channels, taken in ((32, 32, True), (8, 32, False), (32, 8, False)):
        tokens, query = cache(channels, (3, 3), group, lengths=(1, 32, 2)), numbers(1, 2, 1, channels)
        ours, truth = attention.attend(query, *tokens, scaling=0.3), reference.attend(query, *tokens, scaling=0.3)
        torch.testing.assert_close(ours, truth, atol=1e-5, rtol=1e-4)
        assert bool(calls) == taken
        calls.clear()


class Target:
    """What Triton asks of a GPU before it compiles for it; the GPU need not be there."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def compiled(request, monkeypatch):
    """Kernels that calls on CPU tensors would launch, as they are compiled for a GPU with these settings."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels = {}
    run = JITFunction.run

    def warm_up(self, *args, **kwargs):
        kernels[self.__name__] = run(self, *args, **{**kwargs, "warmup": True})

    monkeypatch.setattr(JITFunction, "run", warm_up)
    monkeypatch.setattr(attention_kernels, "precision", lambda device: "tf32x3")
    monkeypatch.setattr(quantize_kernels, "precision", lambda device: "tf32x3")
    driver.set_active(Target(request.param))
    yield kernels
    driver.set_active(None)  # so that the next kernel looks for a real one


def resources(kernel, path):
    """Registers of a thread and bytes of its stack, which holds what is spilled."""
    from triton import knobs

    path.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}


@not_interpreted
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler for NVIDIA's GPUs is for Linux")
@pytest.mark.parametrize("bits", [2, 4])
def test_compiled_kernels_spill_no_registers(compiled, bits, tmp_path):
    tokens = cache(128, (bits, bits), lengths=(4, 64, 7), dtype=torch.float16)
    attention_kernels.attend(numbers(1, 8, 1, 128, dtype=torch.float16), *tokens, scaling=0.1)
    settings = dict(bits=bits, group_size=32, scale_dtype=torch.float16, clip=0.8)
    keys, order = numbers(1, 32, 128, dtype=torch.float16), torch.randperm(128, device=DEVICE)[None]
    quantize_kernels.quantize_keys(keys, numbers(1, 20, 128), order, block_size=8, **settings)
    quantize_kernels.quantize_values(keys, **settings)
    used = {name: resources(kernel, tmp_path / name) for name, kernel in compiled.items()}
    assert set(used) == {"_attend", "_merge", "_quantize_keys", "_quantize_values"}
    assert not any(usage["STACK"] or usage["LOCAL"] for usage in used.values()), used


@not_interpreted
def test_nothing_imports_the_kernels_before_they_are_needed():
    script = (
        "import sys, torch, hf_ext, hf_ext.kernels.quantize, hf_ext.kernels.attention as attention\n"
        "print(attention.path(torch.device('cpu')))\n"
        "assert not [name for name in sys.modules if name.startswith('hf_ext') and name.endswith('triton')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("compiled", "PyTorch")), done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 4])
def test_on_the_gpu(bits, dtype):
    assert attention.path(torch.device("cuda")) == "triton"
    torch.manual_seed(13)
    for heads, new in ((2, 1), (8, 1), (16, 4)):
        tokens = cache(128, (bits, bits), lengths=(4, 4096, 37), dtype=dtype)
        assert error(numbers(1, heads, new, 128, dtype=dtype), *tokens) <= 1e-3
    settings = dict(bits=bits, group_size=32, scale_dtype=torch.float16, clip=0.8)
    order = torch.stack([torch.randperm(128, device=DEVICE) for _ in range(2)])
    keys_agree(numbers(2, 512, 128, dtype=dtype), numbers(2, 20, 128), order, block_size=8, **settings)
    values_agree(numbers(2, 512, 128, dtype=dtype), **settings)
