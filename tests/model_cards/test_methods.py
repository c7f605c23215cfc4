"""The card of every method: nothing is wrong with it, nothing is missing but what only its author knows, and its code runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from hf_ext import BaftConfig, LorVpConfig, NeatConfig, RoseLoraConfig, SQuatCache, bayesianize
from hf_ext.model_cards import build_card, save, score, validate, verify
from hf_ext.model_cards.rules.sections import SECTIONS
from hf_ext.model_cards.running import code_of
from hf_ext.registry import METHODS
from hf_ext.trainers.flat import FlatTrainer
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import AUTHOR, MEASURED, WORDS, tiny_tokenizer
from tests.pipelines.dice import kinds
from tests.trainers.adaptive_svd import helpers as adaptive_svd
from tests.trainers.flat import helpers as flat
from tests.trainers.overtone import helpers as overtone
from tests.trainers.roserag import helpers as roserag

# What nobody has said of these: which data, and how good it is.
UNSAID = {
    *("section-metrics", "section-evaluation-data", "section-training-data", "section-quantitative-analyses"),
    "snippet-not-run",
}


def language_model(folder: Path) -> Any:
    """The tiny Llama, loaded from a folder with a tokenizer."""
    if not folder.is_dir():
        for part in (make_tiny_llama(), tiny_tokenizer()):
            part.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def adapter(config: Any) -> Callable[[Path], PeftModel]:
    return lambda base: get_peft_model(language_model(base), config).eval()


def bayesian(base: Path) -> PeftModel:
    model = get_peft_model(language_model(base), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    batch = {"input_ids": torch.arange(8)[None] + torch.arange(4)[:, None]}
    bayesianize(model, [batch], tolerance=0.05)
    return model


def prompted(base: Path) -> PeftModel:
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    ViTForImageClassification(ViTConfig(**small, num_labels=7)).save_pretrained(base / "vit")
    model = ViTForImageClassification.from_pretrained(base / "vit", num_labels=3, ignore_mismatched_sizes=True)
    return get_peft_model(model, LorVpConfig(pixel_scale=2.0, init_weights=False)).eval()


def filled_cache(base: Path) -> SQuatCache:
    model = language_model(base)
    cache = SQuatCache(model.config, bits=4, group_size=8, residual_length=8)
    with torch.no_grad():
        model(torch.arange(40)[None], past_key_values=cache)
    return cache


def trained(make: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def run(base: Path) -> Any:
        trainer = make(base.parent / "run")
        trainer.train()
        return trainer

    return run


def rag_trainer(folder: Path) -> Any:
    from hf_ext import RoseRAGConfig, RoseRAGTrainer

    model, tokenizer = roserag.tiny_policy()
    arguments = RoseRAGConfig(
        str(folder), max_steps=1, use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2
    )
    rows = Dataset.from_list(roserag.preference_rows())
    return RoseRAGTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


LM = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
MAKERS: dict[str, Callable[[Path], Any]] = {
    "roselora": adapter(RoseLoraConfig(**LM, init_lora_weights=False, total_step=10)),
    "overtone": trained(lambda folder: overtone.make_trainer(folder, overrides={"max_steps": 1})),
    "squat": filled_cache,
    "flat": trained(lambda folder: flat.make_trainer(folder, trainer_class=FlatTrainer, overrides={"max_steps": 1})),
    "adaptive_svd": trained(lambda folder: adaptive_svd.make_trainer(folder, max_steps=1)),
    "roserag": trained(rag_trainer),
    "neat": adapter(NeatConfig(**LM)),
    "baft": adapter(BaftConfig(task_type="CAUSAL_LM")),
    "tfb": bayesian,
    "lorvp": prompted,
    "dice": lambda base: kinds.KINDS["masked text"].pipeline(),
}


def test_every_method_has_a_card_here():
    assert list(MAKERS) == [method.slug for method in METHODS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Slug -> (what was saved, the folder)."""
    root = tmp_path_factory.mktemp("methods")
    found = {}
    for slug, make in MAKERS.items():
        place = root / slug
        place.mkdir()
        thing = make(place / "base")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[slug] = thing, save(thing, place / "saved", base_model="user/base", license="mit")
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_card(saved, method):
    thing, folder = saved[method.slug]
    report = validate(folder)
    assert report.errors == []
    unsaid = {finding.rule for finding in report.warnings}
    assert unsaid <= AUTHOR | UNSAID
    card = ModelCard.load(folder / "README.md")
    assert method.slug in card.data.tags and method.citation in card.text and "base" in str(card.data.base_model)
    assert score(card).stated == {section.name for section in SECTIONS if section.rule not in unsaid}
    assert all(score(card).values()) and "More Information Needed" not in card.text and "None" not in card.text
    assert str(ModelCard(str(card))) == str(card) and "\n\n\n" not in card.text and str(folder.parent) not in str(card)
    for limit in method.limits:
        assert f"- {method.name}: {limit}" in card.text
    told = build_card(thing, base_model="user/base", license="mit", **WORDS, **MEASURED)
    assert score(told).stated == set(score(told))
    assert {finding.rule for finding in validate(told).warnings} <= {"no-interval", "snippet-not-run"}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_a_card_takes_no_time(saved, method):
    thing, _ = saved[method.slug]
    started = time.process_time()
    build_card(thing, base_model="user/base")
    assert time.process_time() - started < 1


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_it_is_verified(saved, method):
    _, folder = saved[method.slug]
    base = folder.parent / "base"
    verification = verify(folder, base_model=str(base / "vit" if method.slug == "lorvp" else base))
    answers = {check.name: check.holds for check in verification.checks}["answers"]
    assert verification.holds and answers is (None if method.slug in ("squat", "dice") else True)


def test_the_code_of_every_card_runs(saved):
    """In one fresh process, which sees nothing but the saved folders."""
    jobs = []
    for slug, (_, folder) in saved.items():
        base = folder.parent / "base"
        code = str(code_of((folder / "README.md").read_text()))
        jobs.append((str(folder), code.replace('"user/base"', repr(str(base / "vit" if slug == "lorvp" else base)))))
    script = "import json, os, sys\nfor folder, code in json.load(sys.stdin):\n    os.chdir(folder); exec(code, {})\n"
    environment = {"HF_HUB_OFFLINE": "1"}

    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.strip().splitlines()) >= len(METHODS)
