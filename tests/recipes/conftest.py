"""The sample recipes, and a tiny model that stands where they expect the embedded one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.cli import main
from tests.conftest import make_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples" / "recipes"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder for `HF_EXT_CACHE` whose model knows the words of the sample data."""
    folder = tmp_path_factory.mktemp("cache")
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    split = pre_tokenizers.Whitespace()
    for file in sorted((ROOT / "examples/data/recipes").rglob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            for text in json.loads(line).values():
                words += [word for word, _ in split.pre_tokenize_str(text) if word not in words]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = split
    model = folder / "gemma-3-270m"
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(model)
    make_tiny_llama(vocab_size=len(words)).save_pretrained(model)
    return folder


@pytest.fixture(autouse=True)
def _at_home(monkeypatch, cache):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_EXT_CACHE", str(cache))


def train(slug, output, *arguments, config=None):
    """Exit code of the command in this process."""
    config = config or RECIPES / f"{slug}.yaml"
    own = ("--output_dir", output, "--max_steps", 2, "--use_cpu", "--disable_tqdm", "true")
    return main(["train", slug, "--config", str(config), *map(str, (*own, *arguments))])


def environment(cache, **more):
    return {
        **os.environ,
        "HF_EXT_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **more,
    }
