"""What cannot be trained is said by name, before anything is written."""

import json

import pytest
import yaml

from hf_ext.cli import main
from hf_ext.recipes.methods import NOT_TRAINED, TRAINED
from hf_ext.recipes.parsing import parse
from tests.recipes.conftest import RECIPES

FACTS = "examples/data/recipes/facts"


def refused(capsys, tmp_path, slug, change=None, arguments=()):
    """What the command says to the sample recipe with other values; None takes a key away."""
    recipe = yaml.safe_load((RECIPES / f"{slug}.yaml").read_text()) | {"output_dir": str(tmp_path / "out")}
    recipe = {key: value for key, value in (recipe | (change or {})).items() if value != "absent"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", slug, "--config", str(tmp_path / "recipe.yaml"), *arguments]) == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


@pytest.mark.parametrize("slug", NOT_TRAINED)
def test_methods_without_a_recipe_say_why(slug, capsys):
    assert main(["train", slug]) == 2
    err = capsys.readouterr().err
    assert NOT_TRAINED[slug] in err and f"docs/methods/{slug}.md" in err


def test_unknown_methods_get_a_suggestion(capsys):
    assert main(["train", "rose_lora"]) == 2
    assert "'rose_lora' is unknown. Did you mean roselora?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("slug", "change", "told"),
    [
        ("overtone", {"mix_lamda": 0.5}, ["recipe.yaml", "'mix_lamda'", "did you mean mix_lambda"]),
        ("overtone", {"retain_dataset_name": "x"}, ["'retain_dataset_name' is unknown"]),
        ("overtone", {"max_steps": "two"}, ["max_steps='two' has the type str; give int"]),
        ("overtone", {"learning_rate": [1e-3]}, ["learning_rate=[0.001] has the type list; give float"]),
        ("overtone", {"save_strategy": False}, ["save_strategy=False", "quote them"]),
        ("overtone", {"mix_lambda": 2.0}, ["mix_lambda=2.0"]),
        ("overtone", {"dtype": "float8"}, ["dtype='float8' is unknown", "bfloat16"]),
        ("overtone", {"env": ["A=1"]}, ["env=['A=1']", "mapping"]),
        ("overtone", {"model_name_or_path": "absent"}, ["model_name_or_path is missing", "'embedded'"]),
        ("overtone", {"model_name_or_path": "nobody/nothing"}, ["nobody/nothing"]),
        ("overtone", {"dataset_name": "absent"}, ["no data are named", "dataset_name"]),
        ("overtone", {"datasets": [{"path": FACTS}]}, ["both dataset_name and datasets"]),
        ("overtone", {"datasets": [{"pth": FACTS}]}, ["datasets[0]", "'pth'", "did you mean path"]),
        ("overtone", {"dataset_name": "nowhere/facts.jsonl"}, ["'nowhere/facts.jsonl'", "no such file"]),
        ("overtone", {"dataset_train_split": "learn"}, ["no split 'learn'", "train, test"]),
        ("overtone", {"ignore_bias_buffers": True}, ["ignore_bias_buffers=True has no effect"]),
        ("overtone", {"card": {"licence": "mit"}}, ["card: 'licence' is unknown", "license"]),
        ("overtone", {"card": {"ethics": 3}}, ["card: ethics=3 is no text"]),
        ("overtone", {"card": {"base_model": "/a/b/c"}}, ["base_model='/a/b/c' is not a Hub id"]),
        ("overtone", {"peft": [1]}, ["peft=[1] has the type list"]),
        ("overtone", {"peft": {"r": 4}}, ["peft_type is missing"]),
        ("overtone", {"peft": {"peft_type": "LOLA"}}, ["peft_type='LOLA' is unknown", "ROSELORA"]),
        ("overtone", {"use_peft": True}, ["use_peft and peft"]),
        ("overtone", {"peft": "absent", "lora_r": 8}, ["lora_r has no effect without use_peft"]),
        ("roselora", {"peft": {"sparsty": 0.9}}, ["peft: the key 'sparsty' is unknown; did you mean sparsity"]),
        ("roselora", {"peft": {"r": "many"}}, ["peft: r='many' has the type str; give int"]),
        ("roselora", {"peft": {"sparsity": 1.5}}, ["sparsity=1.5"]),
        ("roselora", {"peft": {"peft_type": "NEAT"}}, ["this method trains ROSELORA"]),
        ("roselora", {"lora_r": 8}, ["lora_r is for LoRA", "under peft"]),
        ("flat", {"loss_type": "npoo"}, ["loss_type='npoo' is unknown", "simnpo"]),
        ("flat", {"dataset_streaming": True}, ["dataset_streaming=True"]),
        ("flat", {"retain_dataset_split": "keep"}, ["retain_dataset_name=", "no split 'keep'"]),
        ("flat", {"retain_dataset_name": "absent"}, ["retain_coef=1.0 needs a retain_dataset"]),
        ("roserag", {"dataset_name": FACTS}, ["`chosen` and `rejected`", "completion"]),
        ("roserag", {"prompts_file": "rag_config.json"}, ["rag_config.json"]),
        (
            "baft",
            {"locality_dataset_name": "absent", "locality_weight": 2.0},
            ["locality_weight=2.0", "locality_dataset"],
        ),
        ("adaptive_svd", {"tasks": "absent"}, ["tasks is missing"]),
        ("adaptive_svd", {"tasks": {"name": "a"}}, ["tasks={'name': 'a'} has the type dict"]),
        ("adaptive_svd", {"tasks": [{"name": "a"}]}, ["tasks[0]: dataset_name is missing"]),
        ("adaptive_svd", {"tasks": [{"name": "a", "dataset": FACTS}]}, ["tasks[0]", "did you mean dataset_name"]),
        ("adaptive_svd", {"tasks": [{"name": "a b", "dataset_name": FACTS}]}, ["task 'a b'"]),
        ("adaptive_svd", {"use_peft": True}, ["peft_config"]),
    ],
)
def test_bad_values(slug, change, told, capsys, tmp_path):
    err = refused(capsys, tmp_path, slug, change)
    assert all(part in err for part in told), err


@pytest.mark.parametrize(
    ("slug", "arguments", "told"),
    [
        ("neat", ["--max_step", "2"], ["'max_step' is unknown; did you mean max_steps"]),
        ("neat", ["--max_steps", "two"], ["--max_steps", "'two'"]),
        ("neat", ["--dtype", "float8"], ["--dtype", "float8"]),
        ("neat", ["--peft.deep", "2"], ["peft: the key 'deep' is unknown; did you mean depth"]),
        ("neat", ["--peft.depth"], ["--peft.depth: a value is missing"]),
        ("neat", ["2"], ["'2' is unknown"]),
        ("adaptive_svd", ["--peft.r", "2"], ["--peft.r", "no adapter"]),
    ],
)
def test_bad_arguments(slug, arguments, told, capsys, tmp_path):
    err = refused(capsys, tmp_path, slug, arguments=arguments)
    assert all(part in err for part in told), err


def test_bad_recipes(capsys, tmp_path):
    broken = tmp_path / "broken.yaml"
    for content, told in (("a: [1", "is no YAML"), ("- a", "a recipe is a mapping")):
        broken.write_text(content)
        assert main(["train", "neat", "--config", str(broken)]) == 2
        assert told in (err := capsys.readouterr().err) and "broken.yaml" in err
    assert main(["train", "neat", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_bad_data(capsys, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"question": "a", "answer": "b"}))
    for slug in (slug for slug in TRAINED if slug != "adaptive_svd"):
        err = refused(capsys, tmp_path, slug, {"dataset_name": str(data), "dataset_test_split": "absent"})
        assert "['answer', 'question']" in err and "rename yours" in err
    data.write_text('{"prompt": "a"\n{')
    assert "rows.jsonl" in refused(capsys, tmp_path, "neat", {"dataset_name": str(data)})


def test_the_command_line_wins():
    arguments = ["--config", str(RECIPES / "overtone.yaml"), "--max_steps", "3", "--peft.r=4", "--no_require_top1"]
    parsed, given = parse("overtone", TRAINED["overtone"], arguments)
    args, _, _, script, _, peft = parsed.values()
    assert args.max_steps == 3 and args.require_top1 is False and peft.peft["r"] == 4
    # What it does not say is the recipe's.
    assert args.learning_rate == 1e-3 and peft.peft["sparsity"] == 0.9 and script.dataset_test_split == "test"
    assert {"max_steps", "learning_rate", "peft"} <= given and "seed" not in given
