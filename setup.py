"""Compiles the CPU kernels, once per instruction set; everything else is in pyproject.toml.

Without a compiler, or with one that does not take these options, the package installs all the same and runs its operators in PyTorch.
"""

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = ["hf_ext/kernels/quantize/cpu.cpp", "hf_ext/kernels/attention/cpu.cpp"]
# No option here that would change how the process treats numbers elsewhere (-ffast-math does).
OPTIONS = [
    "-O3",
    "-std=c++17",
    "-pthread",
    "-Wno-psabi",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
]
VARIANTS = {"generic": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    VARIANTS["avx512"] = [*VARIANTS["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]


class BuildLibraries(build_ext):
    """Plain shared libraries: nothing in them is a Python module."""

    def get_export_symbols(self, ext):
        return []


setup(
    ext_modules=[
        Extension(
            f"hf_ext.kernels._native_{name}",
            SOURCES,
            depends=["hf_ext/kernels/simd.h"],
            extra_compile_args=[*OPTIONS, *options],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, options in VARIANTS.items()
    ],
    cmdclass={"build_ext": BuildLibraries},
)
