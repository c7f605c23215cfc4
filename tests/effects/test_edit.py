"""The examples that edit: reviews that change their judgement and nothing else, and digits that come back."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from hf_ext import DiceTrace

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_a_review(tmp_path, monkeypatch, capsys):
    path = EXAMPLES / "edit_a_review.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--folder", str(tmp_path), "--steps", "800"])
    review = runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    columns = ("recorded", "reconstructed", "edited, 0.7", "written anew")
    rows = {name: [text.split() for text in re.findall(rf"^  {name} +(.*)$", printed, re.M)] for name in columns}
    assert rows["recorded"] == rows["reconstructed"] and len(rows["recorded"]) == 4
    good = {word for _, kind, _ in review["WORDS"].values() for word in kind}
    for before, after in zip(rows["recorded"], rows["edited, 0.7"], strict=True):
        assert {after[3], after[5]} <= good
        assert [after[place] for place in (0, 1, 2, 4, 6)] == [before[place] for place in (0, 1, 2, 4, 6)]
    kept = [
        a == b
        for one, two in zip(rows["recorded"], rows["written anew"], strict=True)
        for a, b in zip(one, two, strict=True)
    ]
    assert sum(kept) / len(kept) < 0.7
    assert DiceTrace.load(tmp_path / "trace.safetensors").rows == 4
    assert (tmp_path / "pipeline/pipeline.py").exists()


@pytest.mark.slow
def test_a_digit(tmp_path, monkeypatch, capsys):
    """A short training: what is judged is that everything comes back and is shown, not how good the digits are."""
    path = EXAMPLES / "edit_a_digit.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--folder", str(tmp_path), "--steps", "20", "--code-steps", "20"])
    runpy.run_path(str(path), run_name="__main__")
    assert "three to eight" in capsys.readouterr().out
    with Image.open(tmp_path / "digits.png") as sheet:
        assert sheet.size == (7 * 68, 6 * 68)
