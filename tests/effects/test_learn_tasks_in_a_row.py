"""The example that learns three languages, on a tiny model: it runs, and what it writes tells the task matrix."""

import runpy
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from tests.conftest import make_tiny_llama
from tests.trainers.helpers import make_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "learn_tasks_in_a_row.py"


def test_the_example_saves_what_it_measured(tmp_path, monkeypatch, capsys):
    make_tiny_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ["--quick", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert "plain fine-tuning" in printed and printed.count("backward transfer") == 2
    last = [line for line in printed.splitlines() if line.startswith("| German ")][-1]
    card = ModelCard.load(tmp_path / "out" / "model" / "README.md")
    assert last in card.text and "adaptive_svd" in card.data.tags
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"plain_fine-tuning.png", "adaptive_SVD.png"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
