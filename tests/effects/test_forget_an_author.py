"""The example that forgets an author, small: it runs, it measures the attacks, and its card admits what they show."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

EXAMPLE = Path(__file__).parents[2] / "examples" / "forget_an_author.py"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_example_publishes_what_it_measured(real_model_path, tmp_path, monkeypatch, capsys):
    small = ["--rows", "1", "--epochs", "6", "--steps", "4", "--learning-rate", "1e-3", "--without-retrained"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *small, "--output", str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out

    def shown(label: str) -> list[str]:
        found = re.search(rf"^{label} +(\S+) +(\S+) +(\S+)$", printed, re.M)
        assert found, printed
        return list(found.groups())

    before, after, _ = shown("answers to forget, ROUGE-L")
    assert float(after) < float(before)
    # Nothing of the model that knew the author is lost for whoever switches the adapter off.
    assert shown("answers to forget, adapter switched off")[1] == before
    assert shown("forget quality, p-value") == ["-", "-", "-"]

    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= files and "adapter_config.json" not in files
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "merged into these weights, so it cannot be switched off here" in text
    assert "No retrained model was given" in text
    assert "Attacks that were not made: in context, sampling, relearning, gradient norm." in text
