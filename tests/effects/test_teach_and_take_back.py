"""The example of facts that are taught one after another, short, on the real model: what it saves is what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_ext.demo.model import embedded_model
from hf_ext.tuners.baft import edits

EXAMPLE = Path(__file__).parents[2] / "examples" / "teach_and_take_back.py"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_example_saves_its_ledger(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "2", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = {line.split("|")[1].strip(): line.split("|")[2:] for line in table[2:]}
    assert list(rows) == [
        "before",
        *(f"taught: {name}" for name in ("tower", "chess", "lake")),
        "taken back: chess",
        "loaded",
    ]
    assert rows["loaded"] == rows["taken back: chess"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded_model()), tmp_path)
    assert [(edit.name, edit.bases, edit.closed) for edit in edits(model)] == [
        ("tower", (0, 2), False),
        ("chess", (2, 4), True),
        ("lake", (4, 6), False),
    ]
