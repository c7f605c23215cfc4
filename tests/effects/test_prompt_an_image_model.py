"""The example of an image model behind a dirty pane: the prompt helps, and what is saved is what was trained."""

import re
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "prompt_an_image_model.py"


def test_the_prompt_beats_a_new_classifier_and_survives_folding(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    clean, dirty, classifier, prompted, folded = map(float, re.findall(r": +([\d.]+)%", capsys.readouterr().out))
    assert clean > 80 and dirty < 30
    assert prompted > classifier + 10
    assert folded == prompted
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 10_000
