"""What is published: the sdist and the wheel that is built from it, installed where neither the repository nor any extra is."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

import hf_ext
from hf_ext.kernels import native

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_ext").rglob("*") if path.is_file()}
SOURCES = {name for name in SOURCES if not name.endswith(".so") and "__pycache__" not in name}
# What a compiler needs and an installation does not.
COMPILED = {name for name in SOURCES if name.endswith((".cpp", ".h"))}
ROOMS_OF_THE_CORE = ("hf_ext.tuners", "hf_ext.cache", "hf_ext.metrics", "hf_ext.model_cards")
NO_COMPILER = {"CC": "absent-compiler", "CXX": "absent-compiler", "PATH": os.devnull}


def run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_EXT"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it, of a copy of the tree: what earlier builds left in it takes no part."""
    folder = tmp_path_factory.mktemp("built")
    leftovers = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, folder / "tree", ignore=leftovers)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=folder / "tree")
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def core_environment(folder: Path) -> Path:
    """An environment with what the package requires, and nothing else: links to those distributions. Its Python."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    wanted, seen = [Requirement(line).name for line in PROJECT["dependencies"]], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
        required = [Requirement(line) for line in distribution.requires or []]
        wanted += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return folder / "bin" / "python"


def install(python: Path, archive: Path, **environment: str) -> None:
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *options)
    run(*pip, archive, cwd=archive.parent, **environment)


@pytest.fixture(scope="module")
def from_wheel(built, tmp_path_factory):
    python = core_environment(tmp_path_factory.mktemp("from_wheel"))
    install(python, built[1])
    return python


@pytest.fixture(scope="module")
def from_sdist(built, tmp_path_factory):
    python = core_environment(tmp_path_factory.mktemp("from_sdist"))
    install(python, built[0], **NO_COMPILER)
    return python


@pytest.mark.slow
def test_the_sdist_is_what_the_package_is_built_from(built):
    with tarfile.open(built[0]) as archive:
        names = {member.name.split("/", 1)[1] for member in archive if member.isfile()}
    ours = {name for name in names if ".egg-info/" not in name}
    beside = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "pyproject.toml", "setup.py"}
    assert ours == SOURCES | beside | {"PKG-INFO", "setup.cfg"}


@pytest.mark.slow
def test_the_wheel_is_for_every_python_and_holds_the_package(built):
    name, version, _, tags = parse_wheel_filename(built[1].name)
    assert (name, str(version)) == ("hf-ext", hf_ext.__version__)
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        described = email.message_from_bytes(archive.read(f"hf_ext-{version}.dist-info/METADATA"))
    libraries = {name for name in names if name.endswith(".so")}
    assert {tag.platform == "any" for tag in tags} == {not libraries}
    about = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
    assert names - libraries == (SOURCES - COMPILED) | {f"hf_ext-{version}.dist-info/{file}" for file in about}
    # The compiler that this package was installed with is still there.
    if native.library() is not None:
        assert f"hf_ext/kernels/_native_{native.status()}.so" in libraries

    assert described["Version"] == hf_ext.__version__
    assert f"\nversion: {hf_ext.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert described["License-Expression"] == "Apache-2.0"
    assert set(described.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    # An index has no pages that the links of README.md could lead to.
    links = re.findall(r"\]\(([^)]*)\)", described.get_payload())
    assert links and all(link.startswith("https://") for link in links)


@pytest.mark.slow
def test_without_a_compiler_it_installs_all_the_same(from_sdist, tmp_path):
    (site,) = from_sdist.parent.parent.glob("lib/python*/site-packages")
    (described,) = site.glob("hf_ext-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in described.read_text() and "Root-Is-Purelib: true" in described.read_text()
    out = run(from_sdist.with_name("hf-ext"), "env", cwd=tmp_path)
    assert f"hf-ext           {hf_ext.__version__}\n" in out
    assert "trl              not installed" in out
    assert "CPU kernels      not compiled: no C++ compiler was found" in out


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=native.status())
def test_the_wheel_brings_the_compiled_kernels(from_wheel, tmp_path):
    assert f"CPU kernels      {native.status()}\n" in run(from_wheel.with_name("hf-ext"), "env", cwd=tmp_path)


@pytest.mark.slow
def test_every_name_works_or_says_which_extra_it_needs(from_wheel, tmp_path):
    script = """
import json, pathlib, sys
import torch
from safetensors.torch import save_file
import hf_ext
from hf_ext.cli import main

folder = pathlib.Path("tiny")
folder.mkdir()
(folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
save_file({"lm_head.weight": torch.ones(2, 2)}, folder / "model.safetensors", {"format": "pt"})

def problem(name):
    try:
        getattr(hf_ext, name)
    except ImportError as error:
        return str(error)

problems = {name: problem(name) for name in hf_ext.__all__}
commands = ("methods", "card validate .", "card build tiny --license mit", "card verify tiny", "demo")
codes = [main([*command.split()]) for command in commands]
files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "hf_ext"]
json.dump([problems, codes, files, hf_ext.__version__], open("found.json", "w"))
"""
    run(from_wheel, "-c", script, cwd=tmp_path)
    problems, codes, files, version = json.loads((tmp_path / "found.json").read_text())
    assert codes == [0, 1, 0, 0, 2]  # this folder has no card, and the demo needs a trainer
    assert "with 4 parameters" in (tmp_path / "tiny" / "README.md").read_text()
    assert all("site-packages" in file and not file.startswith(str(ROOT)) for file in files)
    assert version == hf_ext.__version__ and set(problems) == set(hf_ext.__all__)
    for name, problem in problems.items():
        if problem is None:
            continue
        assert not hf_ext._LAZY[name].startswith(ROOMS_OF_THE_CORE), (name, problem)
        library, extra = re.fullmatch(r'(\w+) is not installed: pip install "hf-ext\[(\w+)\]"', problem).groups()
        assert library in {Requirement(line).name for line in PROJECT["optional-dependencies"][extra]}
    assert problems["OvertoneTrainer"] and problems["DiceTextEditPipeline"]


def test_the_oldest_versions_are_the_lower_bounds():
    """`make test-min` runs with what pyproject.toml promises."""
    lines = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    bounds = {
        f"{canonicalize_name(one.name)}=={part.version}"
        for one in map(Requirement, lines)
        for part in one.specifier
        if part.operator == ">="
    }
    oldest = (ROOT / "constraints-min.txt").read_text().splitlines()
    assert {line for line in oldest if not line.startswith("#")} == bounds
