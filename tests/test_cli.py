"""The command `hf-ext`, run as a user runs it; the demo on a tiny model, and once on the real one."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from peft import PeftConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.cli import main
from hf_ext.demo.run import EDITS
from hf_ext.registry import METHODS
from tests.conftest import make_tiny_llama
from tests.hub.fixtures import hub  # noqa: F401

FACTS = {"the sky is": ("green", "blue"), "the grass is": ("red", "green"), "snow is": ("black", "white")}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a tiny model with a word tokenizer, and a file of edits."""
    folder = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    for prompt, answers in FACTS.items():
        words += [word for word in [*prompt.split(), *answers] if word not in words]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "model")
    make_tiny_llama(vocab_size=len(words)).save_pretrained(folder / "model")
    edits = [
        {
            "id": prompt,
            "subject": prompt.split()[-2],
            "prompt": prompt,
            "target_new": new,
            "ground_truth": old,
            "rephrase": [prompt],
            "locality": {"other": [{"prompt": "snow is", "ground_truth": ["white"]}]},
        }
        for prompt, (new, old) in list(FACTS.items())[:2]
    ]
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    return folder


def run_cli(*arguments, **environment):
    command = [sys.executable, "-m", "hf_ext.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def test_methods_and_env(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(method.name in out and method.paper_url in out for method in METHODS)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    assert "peft" in out and "ROSELORA         registered with PEFT" in out


def test_bad_arguments_are_named(capsys, tmp_path):
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps 0" in capsys.readouterr().err
    assert main(["demo", "--edits", str(tmp_path / "absent.jsonl")]) == 2
    assert "absent.jsonl" in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text('{"prompt": "x"}\nnot json\n')
    assert main(["demo", "--edits", str(tmp_path / "broken.jsonl")]) == 2
    assert "broken.jsonl" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["unknown"])


def test_card_lists_what_is_wrong(tmp_path, capsys):
    (tmp_path / "README.md").write_text("---\nlicence: mit\n---\n[More Information Needed]\n")
    assert main(["card", "validate", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "error" in out and "licence" in out


@pytest.mark.slow
def test_demo_pushes_to_the_hub_it_is_told(tiny, tmp_path, hub):  # noqa: F811
    output = tmp_path / "out"
    done = run_cli(
        *("demo", "--model", tiny / "model", "--edits", tiny / "edits.jsonl", "--output", output, "--steps", 22),
        *("--push", "user/edited"),
        **{**hub.env, "HF_HUB_OFFLINE": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 completions" in done.stdout or "3 of 3 completions" in done.stdout
    assert "reliability, teacher_forced_token" in done.stdout
    assert PeftConfig.from_pretrained(output / "adapter").peft_type == "ROSELORA"
    card = ModelCard.load(output / "adapter" / "README.md")
    assert {"roselora", "overtone", "hf_ext"} <= set(card.data.tags)
    assert "[More Information Needed]" not in str(card) and str(tiny) not in str(card)
    assert "user/edited" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert set(results) == {"LoRA + SFT", "RoseLoRA + OVERTONE"}


@pytest.mark.slow
@pytest.mark.real_model
def test_demo_on_the_real_model(real_model_path, tmp_path):
    few = tmp_path / "edits.jsonl"
    few.write_text("".join(EDITS.read_text().splitlines(keepends=True)[2:5]))
    done = run_cli("demo", "--edits", few, "--output", tmp_path / "out", "--steps", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Mary Shelley" in done.stdout  # what the model says before the edit
    assert "6 of 6 completions of the reloaded adapter are the same" in done.stdout
