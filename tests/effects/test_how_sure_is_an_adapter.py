"""The example of an adapter that is asked how sure it is, short, on the real model: what it saves is what it says."""

import runpy
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_ext.demo.model import embedded_model
from hf_ext.tuners.tfb import load_bayesian

EXAMPLE = Path(__file__).parents[2] / "examples" / "how_sure_is_an_adapter.py"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_example_saves_its_posterior(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "2", "--draws", "2", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    table = [line.split(" | ") for line in printed.splitlines() if line.startswith("| ") and line.count("|") == 8]
    assert len(table) == 2 + 8 + 4 and all(row[3].endswith("%") and row[5].endswith("%") for row in table[2:])
    base = AutoModelForCausalLM.from_pretrained(embedded_model())
    config = load_bayesian(base, tmp_path).peft_config["default"]
    found = config.bayesian_lora["sigma_q"]
    assert found > 0 and f"sigma_q = {found:.4g}." in printed
    with pytest.warns(UserWarning, match="bayesian_lora"):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded_model()), tmp_path)
    assert plain.peft_config["default"].r == 8
