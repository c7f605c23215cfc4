"""Adapters that cannot be loaded as what they claim to be are refused, with the reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from hf_ext import NeatConfig
from hf_ext.model_cards import check_adapter
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import lora_model, roselora_model


@pytest.fixture
def adapter(tmp_path):
    lora_model(r=4, rank_pattern={"v_proj": 2}).save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def change_config(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_good_adapters(adapter, tmp_path):
    check_adapter(adapter)
    check_adapter(str(adapter), make_tiny_llama())
    check_adapter(adapter, lora_model())
    roselora_model().save_pretrained(tmp_path / "rose", save_embedding_layers=False)
    check_adapter(tmp_path / "rose", make_tiny_llama())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"target_modules": "all-linear"},
        {"trainable_token_indices": [1, 2]},
    ],
)
def test_good_adapters_of_other_forms(tmp_path, fields):
    lora_model(**fields).save_pretrained(tmp_path, save_embedding_layers=False)
    check_adapter(tmp_path, make_tiny_llama())


@pytest.mark.parametrize("name", ["peanut_A", "peanut_encoders.0"])
def test_neat_adapters_name_their_layers(tmp_path, name):
    config = NeatConfig(r=2, depth=1, target_modules=["q_proj"])
    get_peft_model(make_tiny_llama(), config).save_pretrained(tmp_path)
    check_adapter(tmp_path, make_tiny_llama())
    key = f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight"
    change_tensors(
        tmp_path, lambda tensors: {k.replace(key, key.replace("q_proj", "absent")): v for k, v in tensors.items()}
    )
    with pytest.raises(ValueError, match=f"has no module for .*absent.{name}"):
        check_adapter(tmp_path, make_tiny_llama())


@pytest.mark.parametrize("kind", ["VeraConfig", "LoHaConfig", "IA3Config", "PromptTuningConfig"])
def test_good_adapters_of_other_types(tmp_path, kind):
    import peft

    fields = {"num_virtual_tokens": 2} if kind == "PromptTuningConfig" else {"target_modules": ["q_proj"]}
    if kind == "IA3Config":
        fields["feedforward_modules"] = []
    model = peft.get_peft_model(make_tiny_llama(), getattr(peft, kind)(task_type="CAUSAL_LM", **fields))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    check_adapter(tmp_path, make_tiny_llama())


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True, None])
def test_absurd_rank(adapter, rank):
    change_config(adapter, r=rank)
    with pytest.raises(ValueError, match=r"adapter_config.json: r=.* must be a positive integer"):
        check_adapter(adapter)


@pytest.mark.parametrize("rank", [10**9, 8])
def test_rank_other_than_the_tensors(adapter, rank):
    change_config(adapter, r=rank)
    with pytest.raises(ValueError, match=rf"q_proj.lora_A.*rank 4, but adapter_config.json gives r={rank}"):
        check_adapter(adapter)


def test_bad_rank_pattern(adapter):
    change_config(adapter, rank_pattern={"v_proj": 0})
    with pytest.raises(ValueError, match="rank_pattern"):
        check_adapter(adapter)
    change_config(adapter, rank_pattern=3)
    with pytest.raises(ValueError, match="rank_pattern=3"):
        check_adapter(adapter)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("[]", "holds a list"), ("\xff", "is not JSON")]
)
def test_bad_config_file(adapter, content, message):
    (adapter / "adapter_config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"adapter_config.json {message}"):
        check_adapter(adapter)


def test_missing_config(tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config.json is missing"):
        check_adapter(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(adapter, keep):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"adapter_model.safetensors .* damaged or cut short"):
        check_adapter(adapter)


def test_missing_weights(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        check_adapter(adapter)


def test_pickled_weights(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin, which can run code"):
        check_adapter(adapter)


def test_missing_factor(adapter):
    change_tensors(adapter, lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q_proj.lora_B" not in k})
    with pytest.raises(ValueError, match=r"lora_A.* has no counterpart .*lora_B"):
        check_adapter(adapter)


def test_no_lora_tensors(adapter):
    change_tensors(adapter, lambda t: {"other": torch.ones(1)})
    with pytest.raises(ValueError, match="does not hold a LORA adapter"):
        check_adapter(adapter)
    change_tensors(adapter, lambda t: {})
    with pytest.raises(ValueError, match="contains no tensors"):
        check_adapter(adapter)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 32}, r"q_proj maps 64 to 64 features, but this LlamaForCausalLM has 32 to 32"),
        ({"num_key_value_heads": 4}, r"v_proj maps 64 to 32 features, but .* has 64 to 64"),
        ({"num_hidden_layers": 1}, r"no module for .*layers.1"),
    ],
)
def test_adapter_for_another_base(adapter, overrides, message):
    change_config(adapter, base_model_name_or_path="user/tiny-base")
    with pytest.raises(ValueError, match=message + ".*made for 'user/tiny-base'"):
        check_adapter(adapter, make_tiny_llama(**overrides))


def test_unknown_type(adapter):
    change_config(adapter, peft_type="MAGIC")
    with pytest.raises(ValueError, match="peft_type='MAGIC' is unknown"):
        check_adapter(adapter)


def test_our_type_before_registration_in_a_process_that_imports_little(adapter):
    change_config(adapter, peft_type="ROSELORA")
    code = (
        "import sys; from hf_ext.model_cards import check_adapter;"
        "print([name for name in ('trl', 'diffusers') if name in sys.modules]);"
        f"check_adapter({str(adapter)!r})"
    )
    environment = {**os.environ, "HF_EXT_AUTO_REGISTER": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "peft_type='ROSELORA' is not registered" in done.stderr and "import hf_ext" in done.stderr
    assert done.stdout == "[]\n"


def test_neither_folder_nor_id(tmp_path):
    for name in (tmp_path / "absent", "absent", "a/b/c"):
        with pytest.raises(ValueError, match="neither a folder nor a Hub id"):
            check_adapter(name)
