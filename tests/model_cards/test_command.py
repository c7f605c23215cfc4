"""`hf-ext card`: cards of folders that anybody saved, with the host libraries alone."""

from __future__ import annotations

import json
import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from hf_ext.cli import main
from hf_ext.model_cards import build_card, score, validate, verify
from hf_ext.model_cards.running import code_of
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import lora_model, tiny_tokenizer
from tests.pipelines.dice.models import amused_parts


@pytest.fixture
def stock(tmp_path):
    """An adapter as PEFT saves it, of a base in a folder: its card is a template with the folder's path."""
    make_tiny_llama().save_pretrained(tmp_path / "secret")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "secret")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=3)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_build_replaces_a_template(stock, capsys):
    (stock / "results.json").write_text(json.dumps({"accuracy": 0.5}))
    words = [
        "--license",
        "mit",
        "--base-model",
        "user/base",
        "--metrics",
        str(stock / "results.json"),
        "--caveats",
        "One.",
        "Two.",
    ]
    assert main(["card", "build", str(stock), *words]) == 0
    out = capsys.readouterr().out
    assert "README.md" in out and "warning: section-intended-use" in out and out.endswith("warnings\n")
    card = ModelCard.load(stock / "README.md")
    assert card.data.base_model == "user/base" and "| `r` | `3` |" in card.text and "- One.\n- Two." in card.text
    assert "secret" not in str(card) and validate(stock).errors == [] and all(score(card).values())
    assert "| Parameters of the adapter | 1,344 " in card.text
    (stock / "README.md").write_text(str(card) + "\nOur note.\n")
    assert main(["card", "build", str(stock), "--license", "apache-2.0"]) == 0
    assert (stock / "README.md").read_text().endswith("Our note.\n")


def test_errors_write_nothing(stock, capsys):
    before = (stock / "README.md").read_text()
    assert main(["card", "build", str(stock), "--license", "free"]) == 1
    assert "error: license" in capsys.readouterr().out
    for words, message in (
        ([str(stock), "--metrics", "absent.json"], "--metrics absent.json"),
        (["a b"], "neither a folder nor a Hub id"),
        ([str(stock.parent)], "no folder with adapter_config.json, model_index.json, modules.json or config.json"),
    ):
        assert main(["card", "build", *words]) == 2
        assert message in capsys.readouterr().err
    (stock / "adapter_model.safetensors").write_bytes(b"1")
    assert main(["card", "build", str(stock)]) == 2
    assert "adapter_model.safetensors is damaged" in capsys.readouterr().err
    assert (stock / "README.md").read_text() == before


def test_another_folder_for_the_card(stock, tmp_path):
    before = (stock / "README.md").read_text()
    assert main(["card", "build", str(stock), "--output", str(tmp_path / "card"), "--license", "mit"]) == 0
    assert (tmp_path / "card" / "README.md").is_file() and (stock / "README.md").read_text() == before


def test_a_full_model(tmp_path):
    for part in (make_tiny_llama(), tiny_tokenizer()):
        part.save_pretrained(tmp_path)
    card = build_card(tmp_path, license="mit")
    parameters = sum(parameter.numel() for parameter in make_tiny_llama().parameters())
    assert f"A `LlamaForCausalLM` with {parameters:,} parameters" in card.text
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert "model.generate" in card.text


def test_a_pipeline_of_diffusers(tmp_path):
    from diffusers import AmusedPipeline

    pipeline = AmusedPipeline(**amused_parts())
    pipeline.save_pretrained(tmp_path)
    for card in (build_card(tmp_path, license="mit"), build_card(pipeline, license="mit")):
        assert card.data.library_name == "diffusers" and "# AmusedPipeline\n" in card.text
        assert "`scheduler` (AmusedScheduler)" in card.text and "from diffusers import AmusedPipeline" in card.text
        assert all(score(card).values()) and validate(card).errors == []


def test_validate_and_verify(tmp_path, capsys):
    from hf_ext.model_cards import save

    folder = save(lora_model(), tmp_path / "adapter", license="mit")
    make_tiny_llama().save_pretrained(tmp_path / "base")
    assert main(["card", "validate", str(folder)]) == 0
    assert "0 errors" in capsys.readouterr().out
    assert main(["card", "verify", str(folder), "--base-model", str(tmp_path / "base")]) == 0
    assert "holds: answers: 32 as recorded" in capsys.readouterr().out
    (folder / "adapter_config.json").write_text("{}")
    assert main(["card", "verify", str(folder), "--base-model", str(tmp_path / "base")]) == 1
    assert "FAILS: files: changed adapter_config.json" in capsys.readouterr().out
    assert main(["card", "verify", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "[]", "adapter_config.json holds a list"),
        ("adapter_config.json", "{", "adapter_config.json cannot be read"),
        ("adapter_config.json", "[" * 100_000, "adapter_config.json cannot be read"),
        ("adapter_config.json", {"peft_type": None}, "adapter_config.json: peft_type=None"),
        ("adapter_config.json", {"peft_type": 5}, "adapter_config.json: peft_type=5"),
        ("adapter_config.json", {"auto_mapping": "x"}, "adapter_config.json: auto_mapping='x'"),
        ("adapter_config.json", {"auto_mapping": {"base_model_class": 5}}, "adapter_config.json: base_model_class=5"),
        ("adapter_config.json", {"base_model_name_or_path": 5}, "adapter_config.json: base_model_name_or_path=5"),
        ("adapter_config.json", {"revision": 5}, "adapter_config.json: revision=5"),
        ("adapter_config.json", {"task_type": "NOPE"}, "adapter_config.json is no configuration of LORA"),
        ("config.json", "5", "config.json holds a int"),
        ("config.json", {"_name_or_path": 5}, "config.json: _name_or_path=5"),
        ("config.json", {"architectures": {"a": 1}}, "config.json: architectures={'a': 1}"),
        ("config.json", {"architectures": [1]}, "config.json: architectures=[1]"),
        ("config.json", {"quantization_config": 7}, "config.json: quantization_config=7"),
        ("model_index.json", {"_name_or_path": 5}, "model_index.json: _name_or_path=5"),
    ],
)
def test_damaged_configurations_are_named(tmp_path, file, content, message):
    sound = {"peft_type": "LORA"} if file == "adapter_config.json" else {}
    text = content if isinstance(content, str) else json.dumps(sound | content)
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message) + ".*save or fetch the folder again"):
        build_card(tmp_path)


def test_an_adapter_of_a_type_that_nobody_knows_here(tmp_path):
    config = {"peft_type": "NOPE", "task_type": "CAUSAL_LM", "rank": 3, "x": None, "base_model_name_or_path": "user/b"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = build_card(tmp_path, license="mit")
    assert "| `rank` | `3` |" in card.text and "does not know the adapter type `NOPE`" in card.text
    assert card.data.base_model == "user/b" and "nope" in card.data.tags
    assert validate(card).errors == []


def test_a_pipeline_with_parts_that_are_none(tmp_path):
    index = {"_class_name": "P", "unet": [], "vae": ["a"], "size": [1, 2], "text": [None, None], "net": ["lib", "Net"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "| Components | `net` (Net) |" in build_card(tmp_path).text


@pytest.mark.parametrize("config", ["[]", "{", '{"_name_or_path": 5, "architectures": 5, "vocab_size": "x"}'])
def test_a_damaged_base_tells_nothing(tmp_path, config):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(config)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: [a: b: c\n---\n")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    data = build_card(tmp_path).data
    assert data.base_model is None and data.license is None


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    for part in (BertModel(BertConfig(vocab_size=40, **small)), tiny_tokenizer()):
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "task", "output"),
    [
        (SentenceTransformer, "sentence-similarity", "(16,)"),
        (
            lambda _: SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer().backend_tokenizer, None, 8)]),
            "sentence-similarity",
            "(8,)",
        ),
        (lambda folder: CrossEncoder(folder, num_labels=1), "text-ranking", "["),
        (lambda folder: CrossEncoder(folder, num_labels=3), "text-classification", "[["),
    ],
    ids=["transformer", "static", "ranking", "classes"],
)
def test_sentence_transformers(bert, tmp_path, monkeypatch, capsys, make, task, output):
    """The parts behind the transformer, such as the pooling, are loaded by its own library only."""
    model = make(bert)
    model.save_pretrained(str(tmp_path))
    card = build_card(tmp_path, license="mit")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", task)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code_of(card.text), {})
    assert capsys.readouterr().out.startswith(output)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f"A `{type(model).__name__}` with {parameters:,} parameters" in card.text
    (tmp_path / "README.md").write_text(str(card))
    report = validate(tmp_path)
    assert report.errors == [] and "library-name" not in {finding.rule for finding in report.warnings}
    assert verify(tmp_path).holds


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", {}, "modules.json holds a dict, not a list"),
        ("modules.json", [5], "modules.json must be a list of objects with a type"),
        (
            "config_sentence_transformers.json",
            {"model_type": "X"},
            "model_type='X' must be one of SentenceTransformer,",
        ),
        ("config.json", {"_name_or_path": 5}, "config.json: _name_or_path=5"),
    ],
)
def test_damaged_sentence_transformers(tmp_path, file, content, message):
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)):
        build_card(tmp_path)


def test_a_model_is_not_its_own_base(tmp_path):
    config = {"_name_or_path": "user/me", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build_card(tmp_path, repo_id="user/other").data.base_model == "user/me"
    card = build_card(tmp_path, repo_id="user/me")
    assert card.data.base_model is None and "| Base model |" not in card.text
