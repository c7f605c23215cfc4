"""Leaving RoseLoRA: as stock LoRA, as a merged model, as a sparse patch."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_ext.tuners.roselora import SparsePatch, density_report, relabel_as_lora, save_as_lora
from tests.conftest import make_tiny_llama
from tests.tuners.roselora.conftest import batch, make_model, rose_config, train


@pytest.fixture
def trained():
    model = make_model()
    train(model)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(batch(5)["input_ids"]).logits


def test_round_trip_gives_equal_logits(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(trained))
    assert loaded.peft_config["default"].sparsity == 0.9


def test_saved_as_lora_loads_where_this_package_is_not_imported(trained, tmp_path):
    save_as_lora(trained, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "sparsity" not in config
    assert trained.peft_config["default"].peft_type == "ROSELORA"
    torch.save({"ids": batch(5)["input_ids"], "logits": logits(trained)}, tmp_path / "expected.pt")
    make_tiny_llama().save_pretrained(tmp_path / "base")
    script = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(r"{tmp_path}/base"), r"{tmp_path}").eval()
expected = torch.load(r"{tmp_path}/expected.pt")
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
assert "hf_ext" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_relabelling_in_place(trained):
    before = logits(trained)
    relabel_as_lora(trained)
    assert trained.peft_config["default"].peft_type == "LORA"
    assert torch.equal(logits(trained), before)
    with pytest.raises(ValueError, match="adapter_name='default' is not a RoseLoRA adapter"):
        relabel_as_lora(trained)


def test_density_report_reads_like_the_tensors(trained):
    report = trained.base_model.density()
    layer = next(entry for entry in report.layers if entry.name.endswith("layers.1.self_attn.v_proj"))
    delta = trained.get_submodule("base_model.model." + layer.name).get_delta_weight("default")
    assert (layer.nonzeros, layer.entries) == (int((delta != 0).sum()), delta.numel())
    assert report.nonzeros == sum(entry.nonzeros for entry in report.layers)
    assert json.loads(json.dumps(report.to_dict()))["density"] == report.density
    assert f"{report.nonzeros:,} of {report.entries:,}" in str(report)
    with pytest.raises(ValueError, match="adapter_name='absent'"):
        density_report(trained, "absent")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patch_equals_merging_and_reverts_exactly(dtype, tmp_path):
    base = make_tiny_llama().to(dtype)
    pristine = copy.deepcopy(base.state_dict())
    model = get_peft_model(copy.deepcopy(base), rose_config())
    train(model)
    SparsePatch.from_model(model).save(tmp_path / "edit.safetensors")
    patch = SparsePatch.load(tmp_path / "edit.safetensors")
    assert patch.changed == model.base_model.density().nonzeros

    merged = model.merge_and_unload().state_dict()
    patch.apply(base)
    assert all(torch.equal(value, merged[name]) for name, value in base.state_dict().items())
    again = SparsePatch.load(tmp_path / "edit.safetensors")
    again.revert(base)  # in another process: from the recorded base values
    assert all(torch.equal(value, pristine[name]) for name, value in base.state_dict().items())


def test_patch_knows_its_base(trained, tmp_path):
    patch = SparsePatch.from_model(trained)
    other = make_tiny_llama(seed=9)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"q_proj.weight differs from the base"):
        patch.apply(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    patch.apply(other, strict=False)
    patch.revert(other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="shape"):
        patch.apply(make_tiny_llama(hidden_size=32))
    with pytest.raises(ValueError, match="no such weight"):
        patch.apply(torch.nn.Linear(2, 2))


def test_patches_of_two_edits_stack(tmp_path):
    patches = []
    for seed in (0, 1):
        model = make_model()
        train(model, first=10 * seed)
        patches.append(SparsePatch.from_model(model))
    results = []
    for order in ((0, 1), (1, 0)):
        base = make_tiny_llama()
        for index in order:
            patches[index].apply(base, strict=False)
        results.append(base.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=0, atol=1e-7)


def test_patch_of_a_merged_model_or_a_damaged_file_is_refused(trained, tmp_path):
    path = tmp_path / "edit.safetensors"
    SparsePatch.from_model(trained).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        SparsePatch.load(path)
    trained.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a sparse patch"):
        SparsePatch.load(tmp_path / "adapter_model.safetensors")
    trained.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        SparsePatch.from_model(trained)


def test_saved_tensors_are_stock_lora(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
    assert len(keys) == 8
