"""Each touch of another library's inside, so that a new version of it fails here and says where."""

import pytest
from peft import LoraConfig, PeftType
from peft.utils import hotswap
from transformers import AutoConfig

from hf_ext import _compat


def test_enum_extension_checks_itself():
    class Stubborn(str):
        value = name = "ROSELORA"

    with pytest.raises(RuntimeError, match=r"PeftType.ROSELORA could not be added.*PeftType\(name\)"):
        _compat._check_member(Stubborn("ROSELORA"), "ROSELORA")


def test_hotswap_table_is_where_we_expect_it():
    assert hotswap.CONFIG_KEYS_TO_CHECK[PeftType.ROSELORA] == hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA]


def test_an_unregistered_type_is_named():
    with pytest.raises(RuntimeError, match=r"PeftType.UNKNOWN is not registered; call hf_ext.tuners.register"):
        _compat.peft_type("UNKNOWN")


def test_injected_adapters_are_seen(tiny_llama):
    assert not _compat.has_injected_adapters(tiny_llama)
    tiny_llama.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert _compat.has_injected_adapters(tiny_llama)


def test_the_attention_of_one_config_is_set_and_not_saved():
    config = AutoConfig.for_model("gemma3")
    config._attn_implementation = "sdpa"
    _compat.set_own_attention(config, "eager")
    assert (config._attn_implementation, config.text_config._attn_implementation) == ("eager", "sdpa")
    assert not [name for name in config.to_dict() if "attn_implementation" in name]
