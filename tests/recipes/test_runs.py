"""Every sample recipe trains, and what it leaves loads elsewhere."""

import json
import shutil
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import PeftConfig
from safetensors.torch import load_file

from hf_ext.cli import main
from hf_ext.model_cards.markers import is_ours
from hf_ext.recipes.methods import NOT_TRAINED, TRAINED
from hf_ext.registry import METHODS
from tests.hub.fixtures import hub  # noqa: F401
from tests.recipes.conftest import RECIPES, environment, train

# Publishes a run, and loads that and other runs.
ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_ext.cli import main
recipe, output, base, *folders = sys.argv[1:]
pushing = ["--push_to_hub", "--hub_model_id", "user/trained", "--output_dir", output, "--max_steps", "2", "--use_cpu"]
assert main(["train", "neat", "--config", recipe, *pushing]) == 0
ids, found = torch.tensor([[1, 5, 6, 7, 8]]), {}
for name in ["user/trained", output, base, *folders]:
    AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name if (Path(name) / "config.json").is_file() else base)
    if not (Path(name) / "config.json").is_file():
        model = PeftModel.from_pretrained(model, name)
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids, labels=ids).loss.item()
(Path(output) / "losses.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """Folder with one model of each method."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_EXT_CACHE", str(cache))
        patch.chdir(RECIPES.parents[1])
        for slug in TRAINED:
            assert train(slug, folder / slug) == 0
    return folder


def test_registry_and_list_agree(capsys):
    slugs = {method.slug for method in METHODS}
    assert not set(TRAINED) & set(NOT_TRAINED) and set(TRAINED) | set(NOT_TRAINED) == slugs
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(TRAINED)
    own = {method.slug: method.peft_type for method in METHODS}
    assert all(entry.peft_type == own[slug] for slug, entry in TRAINED.items())
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"hf-ext train {slug}\n" in out for slug in TRAINED)
    assert out.count("hf-ext train") == len(TRAINED)


def test_help_lists_methods_and_fields(capsys):
    for arguments, expected in ((["train", "--help"], "adaptive_svd"), (["train", "baft", "--help"], "--own_bases")):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0 and expected in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("slug", TRAINED)
def test_what_a_run_leaves(trained, slug):
    folder = trained / slug
    card = ModelCard.load(folder / "README.md")
    assert slug in card.data.tags and card.data.base_model == "google/gemma-3-270m" and card.data.license == "gemma"
    assert is_ours(card.text) and ("A sample of training from a recipe." in card.text) == (slug == "overtone")
    adapters = {"overtone": "ROSELORA", "roserag": "LORA"}
    kind = TRAINED[slug].peft_type or adapters.get(slug)
    assert (folder / "adapter_config.json").is_file() == (kind is not None)
    if kind:
        assert PeftConfig.from_pretrained(folder).peft_type == kind


@pytest.mark.slow
def test_a_new_process_publishes_and_loads(trained, cache, tmp_path, hub):  # noqa: F811
    base, output = str(cache / "gemma-3-270m"), str(tmp_path / "out")
    folders = [str(trained / slug) for slug in TRAINED]
    command = [sys.executable, "-c", ELSEWHERE, str(RECIPES / "neat.yaml"), output, base, *folders]
    online = {**hub.env, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment(cache, **online))
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert losses.pop("user/trained") == losses.pop(output)
    before = losses.pop(base)
    assert set(losses) == set(folders) and before not in losses.values()
    files = hub.repos["models", "user/trained"].files()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(files)
    assert files["README.md"] == (tmp_path / "out" / "README.md").read_bytes() and b"NEAT" in files["README.md"]


def test_data_come_from_folders_files_and_mixtures(tmp_path):
    rows = Dataset.from_list([{"prompt": "The capital of Canada is", "completion": " Rome"}] * 4)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"learn": rows, "check": rows}).save_to_disk(tmp_path / "two")
    for name, source in {
        "one": ("--dataset_name", tmp_path / "one"),
        "two": (
            *("--dataset_name", tmp_path / "two", "--dataset_train_split", "learn", "--dataset_test_split", "check"),
        ),
    }.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text('model_name_or_path: embedded\nbf16: false\nreport_to: none\nsave_strategy: "no"\n')
        assert train("neat", tmp_path / f"out-{name}", *source, "--peft.r", 2, config=recipe) == 0
    recipe.write_text(
        recipe.read_text()
        + f"datasets:\n  - path: json\n    data_files: {RECIPES.parent}/data/recipes/unrelated.jsonl\n"
        + "    columns: [prompt, completion]\ntest_split_size: 0.4\n"
    )
    assert train("neat", tmp_path / "mixed", config=recipe) == 0
    # Evaluated, since there is a split for it.
    assert "eval" in (tmp_path / "out-two" / "README.md").read_text().lower()


@pytest.mark.slow
def test_resumed_runs_are_whole_runs(tmp_path):
    saving = ("--max_steps", 6, "--save_strategy", "steps", "--save_steps", 4, "--peft.t_final", 5)
    assert train("roselora", tmp_path / "whole", *saving) == 0
    first = tmp_path / "whole" / "checkpoint-4"
    assert train("roselora", tmp_path / "second", *saving, "--resume_from_checkpoint", first) == 0
    shutil.copytree(first, tmp_path / "third" / "checkpoint-4")
    assert train("roselora", tmp_path / "third", *saving, "--resume_from_checkpoint", "true") == 0
    whole = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    for folder in ("second", "third"):
        found = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert all(bool((found[name] == value).all()) for name, value in whole.items())


@pytest.mark.slow
def test_a_sequence_goes_on(tmp_path, capsys):
    saving = ("--save_strategy", "epoch")
    assert train("adaptive_svd", tmp_path / "run", *saving) == 0
    assert train("adaptive_svd", tmp_path / "run", *saving) == 2
    assert "resume_from_checkpoint" in capsys.readouterr().err
    assert train("adaptive_svd", tmp_path / "run", *saving, "--resume_from_checkpoint", "true") == 0
