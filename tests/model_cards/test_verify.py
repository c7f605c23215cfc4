"""What was published is tried again: files, answers, and the code of the card."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_ext import LorVpConfig
from hf_ext.model_cards import save, verify
from hf_ext.model_cards.manifest import FILE
from hf_ext.model_cards.markers import BEGIN
from hf_ext.model_cards.probe import Probe, record
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import lora_model, roselora_model


def found(verification) -> dict[str, bool | None]:
    return {check.name: check.holds for check in verification.checks}


@pytest.fixture
def adapter(tmp_path):
    """A saved LoRA adapter, and the folder of its base."""
    make_tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    return save(model, tmp_path / "adapter", base_model="user/base"), str(tmp_path / "base")


def test_an_adapter(adapter):
    folder, base = adapter
    verification = verify(folder, base_model=base)
    assert found(verification) == {"files": True, "answers": True, "code": None} and verification.holds
    assert "32 as recorded, bit by bit" in str(verification)


@pytest.mark.parametrize("make", [roselora_model, make_tiny_llama])
def test_other_models(tmp_path, make):
    folder = save(make(), tmp_path / "model")
    assert found(verify(folder, base_model=make_tiny_llama()))["answers"]


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_virtual_tokens(tmp_path, config):
    model = get_peft_model(make_tiny_llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    folder = save(model, tmp_path / "adapter")
    probe = json.loads((folder / FILE).read_text())["probe"]
    assert probe["metric"] == "loss of the next token" and len(probe["predictions"].split()) == 32
    assert found(verify(folder, base_model=make_tiny_llama()))["answers"]


def test_a_classifier_without_padding(tmp_path):
    config = make_tiny_llama().config
    config.pad_token_id = None
    folder = save(LlamaForSequenceClassification(config), tmp_path / "model")
    assert found(verify(folder))["answers"]


def clip() -> CLIPModel:
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision = {**small, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 50}, vision_config=vision, projection_dim=8))


def bert(cls, **fields):
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99)
    return cls(BertConfig(**small, **fields)).eval()


@pytest.mark.parametrize("make", [clip, lambda: bert(BertForMultipleChoice)], ids=["clip", "multiple-choice"])
def test_a_model_that_cannot_be_asked_is_saved_all_the_same(tmp_path, make):
    with pytest.warns(UserWarning, match="no answers of this .* were recorded.*Error: "):
        folder = save(make(), tmp_path / "model")
    assert found(verify(folder))["answers"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_that_lost_its_embeddings(tmp_path, dtype):
    """Two classes and small logits: their mean and the predictions hardly change."""
    torch.manual_seed(0)
    model = bert(BertForSequenceClassification, num_labels=2).to(dtype)
    folder = save(model, tmp_path / "model")
    assert found(verify(folder))["answers"]
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight.zero_()
    model.save_pretrained(folder)
    verification = verify(folder)
    assert found(verification)["answers"] is False and "of 32 examples differ" in str(verification)


def test_logits_may_differ_by_rounding():
    """Recorded in 32 bits, answered in 16."""
    torch.manual_seed(0)
    model = bert(BertForSequenceClassification, num_labels=3)
    recorded, other = record(model), record(model.to(torch.bfloat16))
    assert recorded.digest != other.digest and recorded.differences(other) == []
    assert Probe.from_dict(recorded.to_dict()) == recorded and len(recorded.logits[0]) == 3


def test_half_precision(tmp_path):
    folder = save(make_tiny_llama().to(torch.bfloat16), tmp_path / "model")
    assert json.loads((folder / FILE).read_text())["probe"]["dtype"] == "bfloat16"
    assert found(verify(folder))["answers"]


def test_an_image_classifier_with_its_own_classes(tmp_path):
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16)
    ViTForImageClassification(ViTConfig(**small, num_labels=7)).save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    model = get_peft_model(base, LorVpConfig(pixel_scale=2.0, init_weights=False)).eval()
    folder = save(model, tmp_path / "prompt")
    assert found(verify(folder, base_model=str(tmp_path / "base")))["answers"]


def test_other_weights(adapter):
    folder, base = adapter
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    verification = verify(folder, base_model=base)
    assert found(verification) == {"files": False, "answers": False, "code": None} and not verification.holds
    assert "changed adapter_model.safetensors" in str(verification) and "predictions differ" in str(verification)


@pytest.mark.parametrize("name", ["modeling.py", "sub/optimizer.PT", "pytorch_model.bin"])
def test_an_added_file_that_can_run(adapter, name):
    folder, base = adapter
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    verification = verify(folder, base_model=base)
    assert found(verification)["files"] is False and f"added, which can run code, {name}" in str(verification)


def test_an_added_picture_is_told(adapter):
    folder, base = adapter
    (folder / "plot.png").write_bytes(b"")
    verification = verify(folder, base_model=base)
    assert verification.holds and f"files as recorded in {FILE}; added plot.png" in str(verification)


def test_another_base_model(adapter):
    folder, _ = adapter
    torch.manual_seed(5)
    other = make_tiny_llama(seed=5)
    assert found(verify(folder, base_model=other)) == {"files": True, "answers": False, "code": None}


@pytest.mark.parametrize("make", [lora_model, roselora_model])
def test_a_given_base_model_stays_as_it_is(tmp_path, make):
    folder = save(make(), tmp_path / "adapter")
    base = make_tiny_llama().train()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base.state_dict().items()}
    assert found(verify(folder, base_model=base))["answers"]
    after = base.state_dict()
    assert list(after) == list(before) and all(module.training for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all(
        after[name].data_ptr() == where and after[name].equal(tensor) for name, (where, tensor) in before.items()
    )


def test_an_adapter_of_a_quantised_base(adapter):
    """On one that is not quantised, other answers prove nothing; the same answers do."""
    folder, base = adapter
    manifest = json.loads((folder / FILE).read_text())
    manifest["model"]["quantization"] = "bitsandbytes"
    (folder / FILE).write_text(json.dumps(manifest))
    assert found(verify(folder, base_model=base))["answers"]
    verification = verify(folder, base_model=make_tiny_llama(seed=5))
    assert found(verification)["answers"] is None and "quantised with bitsandbytes" in str(verification)


def test_the_commit_of_the_base_model(adapter, tmp_path, monkeypatch):
    """Another commit has taken its place on the Hub, here in the local cache."""
    folder, base = adapter
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache" / "models--user--base"
    shutil.copytree(base, cached / "snapshots" / ("1" * 40))
    make_tiny_llama(seed=5).save_pretrained(cached / "snapshots" / ("2" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("2" * 40)
    verification = verify(folder)
    assert found(verification)["answers"] is False and "predictions differ" in str(verification)
    manifest = json.loads((folder / FILE).read_text())
    manifest["model"]["base_commit"] = "1" * 40
    (folder / FILE).write_text(json.dumps(manifest))
    assert found(verify(folder))["answers"]


def test_a_base_that_is_not_there(adapter):
    folder, _ = adapter
    (check,) = [check for check in verify(folder, base_model="user/nowhere").checks if check.name == "answers"]
    assert check.holds is False and "cannot be loaded" in check.found


def test_code_that_prints_something_else(adapter):
    folder, base = adapter
    manifest = json.loads((folder / FILE).read_text())
    manifest["snippet"] = {"output_sha256": "0" * 64}
    (folder / FILE).write_text(json.dumps(manifest))
    checks = {check.name: check for check in verify(folder, base_model=base, run_snippet=True).checks}
    assert checks["code"].holds is False and "prints something else" in checks["code"].found


def test_the_code_is_that_of_our_part_with_the_base_model_given(tmp_path):
    """People may put code of their own in front of it; a base model is a folder, or an id, for which the local cache is asked."""
    code = 'from pathlib import Path\nbase = Path("user/base")\nprint(base.is_dir() == base.is_absolute())'
    card = ModelCard(f"---\nbase_model: user/base\n---\n# T\n\n```python\n{code}\n```\n")
    make_tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    folder = save(model, tmp_path / "adapter", card, run_snippet=True)
    readme = folder / "README.md"
    front = f"# Theirs\n\n```python\nprint(1)\n```\n\n{BEGIN}"
    readme.write_text(readme.read_text().replace(BEGIN, front))
    assert verify(folder, base_model=str(tmp_path / "base"), run_snippet=True).holds
    assert found(verify(folder, base_model="user/base", run_snippet=True))["code"]
    readme.write_text(readme.read_text() + BEGIN)
    assert "FAILS: code: README.md" in str(verify(folder, base_model=base, run_snippet=True))


def test_no_card(adapter):
    folder, base = adapter
    (folder / "README.md").unlink()
    assert "FAILS: code: README.md is missing" in str(verify(folder, base_model=base, run_snippet=True))


def test_paths_outside_of_the_folder_are_not_read(adapter):
    folder, base = adapter
    manifest = json.loads((folder / FILE).read_text())
    manifest["files"] = {"../base/config.json": "0"}
    (folder / FILE).write_text(json.dumps(manifest))
    assert "missing ../base/config.json" in str(verify(folder, base_model=base))


@pytest.fixture
def stock(tmp_path):
    """An adapter as PEFT saves it, and the folder of its base."""
    make_tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", tmp_path / "base"


def test_what_was_not_made_with_us(stock):
    """Without a manifest: what files and code say of themselves, and what nobody recorded is not claimed."""
    folder, base = stock
    code = "```python\nprint(1)\n```\n"
    (folder / "README.md").write_text(code)
    for given in (None, str(base), make_tiny_llama()):
        verification = verify(folder, base_model=given, run_snippet=given is None)
        assert found(verification) == {
            **{"weights": True, "adapter": True, "files": None, "answers": None},
            "code": True if given is None else None,
        }
        assert "adapter: fits its base model" in str(verification)
    assert f"not checked: answers: there is no {FILE}" in str(verification)
    (folder / "README.md").write_text(code.replace("1", "1 / 0"))
    assert "ZeroDivisionError" in str(verify(folder, base_model="user/nowhere", run_snippet=True))
    assert found(verify(base)) == {"weights": True, "files": None, "answers": None, "code": None}
    assert "adapter: sound by itself; not compared" in str(verify(folder, base_model="user/nowhere"))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION", None])
def test_the_outline_of_a_base_model_is_that_of_the_adapters_task(stock, tmp_path, task_type):
    auto_class = {"SEQ_CLS": AutoModelForSequenceClassification, "FEATURE_EXTRACTION": AutoModel}
    base = auto_class.get(task_type, AutoModelForCausalLM).from_pretrained(stock[1])
    get_peft_model(base, LoraConfig(task_type=task_type)).save_pretrained(tmp_path / "other")
    assert "adapter: fits its base model" in str(verify(tmp_path / "other"))


def cut_short(folder, base):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def wider_base(folder, base):
    make_tiny_llama(hidden_size=32).save_pretrained(base)


def another_rank(folder, base):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))


@pytest.mark.parametrize(
    ("damage", "failed", "message"),
    [
        (cut_short, {"weights", "adapter"}, "damaged or cut short"),
        (wider_base, {"adapter"}, "maps 64 to 64 features, but this LlamaForCausalLM has 32 to 32"),
        (another_rank, {"adapter"}, "gives r=3"),
    ],
)
def test_damages_without_a_manifest(stock, damage, failed, message):
    damage(*stock)
    verification = verify(stock[0])
    assert {name for name, holds in found(verification).items() if holds is False} == failed
    assert message in str(verification) and not verification.holds


def test_a_folder_of_something_else(tmp_path, stock):
    with pytest.raises(ValueError, match=f"no {FILE}, and no model in safetensors"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "is not a manifest"), ('{"schema": 9}', "has schema 9"), ("{", "is not a manifest")],
)
def test_damaged_manifests(adapter, content, message):
    folder, _ = adapter
    (folder / FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        verify(folder)


MISSING = object()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("card", MISSING),
        ("card", "x"),
        ("files", None),
        ("files", []),
        ("files", MISSING),
        ("files", {"config.json": 1}),
        ("model", MISSING),
        ("model", {}),
        ("model", {"class": "LlamaForCausalLM", "num_labels": "2"}),
        ("probe", MISSING),
        ("probe", []),
        ("snippet", MISSING),
        ("snippet", {}),
        ("inputs", []),
        ("inputs", [""] * 32),
        ("inputs", ["1 -2"] * 32),
        ("inputs", None),
        ("value", "low"),
        ("value", float("nan")),
        ("predictions", "1 2 3"),
        ("predictions", MISSING),
        ("dtype", "float33"),
        ("dtype", None),
        ("seed", None),
    ],
    ids=lambda value: "missing" if value is MISSING else str(value)[:20],
)
def test_damaged_parts_are_named(damaged_at, key, value):
    with pytest.raises(ValueError, match=f"damaged.*{key}.*fetch"):
        damaged_at(key, value)


@pytest.fixture
def damaged_at(tmp_path):
    """Verifies a model after one part of its manifest, or of the probe in it, was replaced."""
    folder = save(make_tiny_llama(), tmp_path / "model")

    def verified(key, value):
        manifest = json.loads((folder / FILE).read_text())
        part = manifest if key in manifest else manifest["probe"]
        part[key] = value
        if value is MISSING:
            del part[key]
        (folder / FILE).write_text(json.dumps(manifest))
        return verify(folder)

    return verified


def test_tokens_that_the_model_does_not_have(damaged_at):
    verification = damaged_at("inputs", ["1 2 1000000000000"] * 32)
    assert "cannot be asked: ValueError: the recorded probe asks for token 1000000000000" in str(verification)


def test_neither_folder_nor_repository():
    with pytest.raises(ValueError, match="folder_or_repo='a b'"):
        verify("a b")


def test_questions_of_ones_own(tmp_path):
    with pytest.raises(ValueError, match="probe= needs a tokenizer"):
        save(lora_model(), tmp_path / "adapter", probe=["a text"])
    folder = save(lora_model(), tmp_path / "adapter", probe=False)
    assert found(verify(folder, base_model=make_tiny_llama()))["answers"] is None
