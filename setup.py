"""Compiles the CPU kernels, once per instruction set, and tags wheels by what is in them; everything else is in pyproject.toml.

Without a compiler, or with one that does not take these options, the package installs all the same and runs its operators in PyTorch.
"""

import platform
import re
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
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

    def get_ext_filename(self, fullname):
        # No version of Python in the name: ctypes loads them in any.
        return f"{fullname.replace('.', '/')}.so"


class Wheel(bdist_wheel):
    """For every Python 3, and for every platform if no library was compiled."""

    def run(self):
        self.run_command("build")
        built = Path(self.get_finalized_command("build").build_lib)
        build_ext = self.get_finalized_command("build_ext")
        self.distribution.ext_modules = [
            ext for ext in self.distribution.ext_modules if (built / build_ext.get_ext_filename(ext.name)).exists()
        ]
        self.root_is_pure = not self.distribution.ext_modules
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def readme():
    """README.md without the links into the repository, which lead nowhere from a package index."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
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
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildLibraries},
)
