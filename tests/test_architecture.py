"""The rules of the house, enforced: import arrows, light imports, no name clashes, pages in agreement with the registry."""

import ast
import dataclasses
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ext
from docs import generate
from hf_ext.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_ext"

# Room -> rooms it may import. Data flows examples/CLI -> trainers|pipelines -> tuners|cache -> kernels.
ARROWS = {
    "registry": set(),
    "_compat": set(),
    "_lazy": set(),
    "_modes": set(),
    "kernels": set(),
    "tuners": {"kernels", "_compat"},
    "cache": {"kernels", "_compat"},
    "trainers": {"tuners", "pipelines", "metrics", "model_cards", "_compat", "_lazy", "_modes", "registry"},
    "pipelines": {"tuners", "cache", "metrics", "_compat", "_lazy", "_modes", "registry"},
    "metrics": {"_compat", "_lazy", "_modes"},
    "model_cards": {"tuners", "cache", "metrics", "_compat", "_lazy", "_modes", "registry"},
    "recipes": {"tuners", "trainers", "pipelines", "model_cards", "demo", "registry"},
    "demo": {"tuners", "trainers", "pipelines", "cache", "metrics", "model_cards", "_compat", "registry"},
    "cli": {
        "tuners",
        "trainers",
        "pipelines",
        "cache",
        "kernels",
        "metrics",
        "model_cards",
        "demo",
        "recipes",
        "_compat",
        "_lazy",
        "registry",
    },
    "__init__": {"_lazy", "registry", "tuners", "pipelines"},
}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("hf_ext.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_arrows(path):
    own = room(path)
    outside = {
        name for name in imports(path) - {own} if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    }
    assert outside <= ARROWS[own], f"{own} may not import {outside - ARROWS[own]}"


def test_every_name_is_public_and_lazy():
    for name in hf_ext.__all__:
        assert getattr(hf_ext, name) is not None
    assert set(hf_ext.__all__) <= set(dir(hf_ext))
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = hf_ext.absent


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_registry_docs_and_names_agree(method):
    for name, module in method.entry_points.items():
        assert getattr(hf_ext, name) is getattr(importlib.import_module(module), name)
    page = (ROOT / method.docs_page).read_text()
    assert page.startswith(f"# {method.name}\n")
    assert method.paper_url in page
    assert method.citation in page
    for heading in ("## Settings", "## Results", "## Cost", "## When not to use it", "## Citation"):
        assert heading in page, heading
    for name in method.entry_points:
        if name.endswith("Config"):
            config = getattr(hf_ext, name)
            inherited = {
                f.name
                for base in config.__mro__[1:]
                if dataclasses.is_dataclass(base)
                for f in dataclasses.fields(base)
            }
            for field in dataclasses.fields(config):
                if field.name not in inherited:
                    assert f"`{field.name}`" in page, f"{field.name} is not in the table of {method.docs_page}"


def test_generated_pages_are_up_to_date():
    for page, text in generate.pages().items():
        assert page.read_text() == text, f"{page.relative_to(ROOT)}: run `make docs`"


def test_no_top_level_name_clashes():
    """A package called `kernels` beside ours would shadow Hugging Face's library and break transformers and trl."""
    script = (
        "import importlib.util, transformers, trl, diffusers, bitsandbytes, hf_ext\n"
        "spec = importlib.util.find_spec('kernels')\n"
        f"assert spec is None or not str(spec.origin).startswith({str(ROOT)!r}), spec\n"
        "from transformers import AutoModelForCausalLM; from trl import SFTTrainer\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    claimed = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert not claimed & {"kernels", "triton", "utils", "metrics", "cache", "pipelines", "trainers"}


def test_the_wheel_claims_one_name():
    assert '[tool.setuptools.packages.find]\ninclude = ["hf_ext*"]' in (ROOT / "pyproject.toml").read_text()
