"""The compiled CPU kernels: built when the package is installed if a compiler is there, found here, and optional.

`setup.py` compiles the C++ files of the operators once per instruction set; the fastest library that this processor runs is loaded.
`HF_EXT_NATIVE=0` in the environment leaves them aside, so that the operators run in PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

# Instruction sets by what `torch.backends.cpu.get_cpu_capability` calls them, the best first.
VARIANTS = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_FUNCTIONS = {
    "hf_ext_quantize_keys": [_POINTER] * 7 + [_LONG] * 6 + [_INT, _FLOAT, _INT, _INT],
    "hf_ext_quantize_values": [_POINTER] * 4 + [_LONG] * 3 + [_INT, _FLOAT, _INT, _INT],
    "hf_ext_key_scores": [_POINTER] * 5 + [_LONG] * 6 + [_INT] * 3,
    "hf_ext_value_sums": [_POINTER] * 5 + [_LONG] * 6 + [_INT] * 3,
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("HF_EXT_NATIVE", "1") == "0":
        return None, "off (HF_EXT_NATIVE=0)"
    reason = "not compiled: no C++ compiler was found when hf-ext was installed"
    for variant in VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ("generic",)):
        path = Path(__file__).with_name(f"_native_{variant}.so")
        if not path.exists():
            continue
        try:
            library = ctypes.CDLL(str(path))
            for name, arguments in _FUNCTIONS.items():
                getattr(library, name).argtypes = arguments
                getattr(library, name).restype = None
        except (OSError, AttributeError) as error:
            reason = f"{path.name} cannot be used ({error}); install hf-ext again"
            continue
        return library, variant
    return None, reason


def library() -> ctypes.CDLL | None:
    """The loaded library, or None where there is none."""
    return _load()[0]


def status() -> str:
    """The instruction set in use, or why there is no library."""
    return _load()[1]


def threads(work: int) -> int:
    """Threads that pay for `work` multiplications: PyTorch's number at most, one below a quarter of a million each."""
    return max(1, min(torch.get_num_threads(), work >> 18))
