"""The example about a company's handbook, short, on the real model: it runs, and what it saves answers and tells how it was made."""

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

from hf_ext.demo.model import embedded_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "answer_from_noisy_passages.py"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_example_saves_a_reader(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(words in done.stdout for words in ("made a pair", "| before |", "| after |")), done.stdout
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "Preference pairs by `RoseRAGDatasetBuilder` from 3 questions" in card.text
    assert card.data.base_model == "google/gemma-3-270m"
    folder = str(tmp_path / "model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded_model()), folder)
    reader = pipeline("rag-question-answering", model=model, tokenizer=folder, max_new_tokens=8)
    found = reader(
        "On which floor is the bar?", [{"title": "Bonn", "text": "The bar of the Bonn office is on floor 3."}]
    )
    assert reader.prompts.conclude == "The floor, in one line:" and found["generated_text"]
