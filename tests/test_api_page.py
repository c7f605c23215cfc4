"""The page of the public API: every public name is on it, and its docstring says something."""

import re

import pytest
from transformers import HfArgumentParser

import hf_ext
from docs import api

ENTRIES = {f"{entry.module}.{entry.name}": entry for module in api.modules() for entry in api.entries(module)}


def test_every_public_name_of_the_package_has_an_entry():
    values = [entry.value for entry in ENTRIES.values()]
    for name in set(hf_ext.__all__) - {"__version__"}:
        assert any(value is getattr(hf_ext, name) for value in values), f"hf_ext.{name} is in no module of the page"


@pytest.mark.parametrize("name", ENTRIES)
def test_every_docstring_says_something(name):
    words = re.findall(r"[\w`]+", ENTRIES[name].summary)
    assert len(words) >= 5, (
        f"{name}: {ENTRIES[name].summary!r} is no docstring; `docs/API.md` shows its first paragraph"
    )


def test_the_page_does_not_depend_on_the_machine():
    page = api.page()
    assert page == api.page()
    assert not re.search(r"0x[0-9a-f]{6}|<function|<class|(?<!\w)/(?:home|root|usr|var)/|ForwardRef", page)


def test_the_page_does_not_depend_on_what_has_been_parsed():
    """transformers' parser of arguments rewrites the types of the fields it reads."""
    entry = ENTRIES["hf_ext.trainers.adaptive_svd.AdaptiveSVDConfig"]
    before = api.signature(entry)
    HfArgumentParser(entry.value)
    assert api.signature(entry) == before
    assert "target_modules: list[str] | str | None = None" in before


def test_signatures_defaults_and_errors():
    """One entry of each kind, by what it must say."""

    def section(name):
        return api.paragraph(ENTRIES[name])

    config = section("hf_ext.tuners.roselora.RoseLoraConfig")
    assert "RoseLoraConfig(<fields of LoraConfig>, sparsity: float = 0.95," in config
    assert "lora_alpha" not in config
    assert "*config*, also `hf_ext.RoseLoraConfig`." in config
    assert "Raises `ValueError`: a field is out of its range" in config
    function = section("hf_ext.tuners.tfb.bayesianize")
    assert "criterion: str | Criterion = 'flips'" in function and "-> TFBResult" in function
    assert "Takes the arguments of `BaseTuner`" in section("hf_ext.tuners.neat.NeatModel")
    assert section("hf_ext.metrics.rag.NO_GOLD").startswith("#### NO_GOLD\n*constant*. The condition")
    assert "`metrics`" in section("hf_ext.metrics.calibration.CalibrationReport")
