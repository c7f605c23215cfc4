"""`save` writes everything or nothing, and respects what it did not write."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import PartialState
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_ext.model_cards import Cost, build_card, check_adapter, package, publish, save, validate
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import BASE, lora_model, roselora_model
from tests.trainers.distributed import run_two_processes

# Most tests here are about files and leave out a licence on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:model card")
TOKENS = torch.arange(3, 11)[None]


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("make", [lora_model, roselora_model])
def test_round_trip(tmp_path, make):
    model = make()
    save(model, tmp_path / "adapter", base_model=BASE, license="mit")
    assert sorted(everything(tmp_path / "adapter")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "hf_ext_card.json",
    ]
    assert validate(tmp_path / "adapter").errors == []
    check_adapter(tmp_path / "adapter", make_tiny_llama())
    loaded = PeftModel.from_pretrained(make_tiny_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


def test_no_local_path_in_any_file(tmp_path):
    from peft import get_peft_model

    make_tiny_llama().save_pretrained(tmp_path / "secret-base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "secret-base")
    save(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")), tmp_path / "adapter")
    assert not [name for name, data in everything(tmp_path / "adapter").items() if b"secret-base" in data]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None


def test_same_bytes_in_another_process(tmp_path):
    """PEFT writes sets in hash order, which differs from process to process."""
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    code = (
        "import sys; from tests.model_cards.tiny import lora_model; from hf_ext.model_cards import save;"
        f"save(lora_model(target_modules={modules}), sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True, env=environment)
    save(lora_model(target_modules=modules), tmp_path / "here")
    assert everything(tmp_path / "here") == everything(tmp_path / "other")


def test_saving_again_replaces_weights_and_keeps_human_text(tmp_path):
    target = tmp_path / "adapter"
    save(lora_model(), target, license="mit")
    readme = target / "README.md"
    readme.write_text(readme.read_text().replace("license: mit", "license: mit\nthumbnail: x.png") + "\nOur note.\n")
    save(lora_model(r=2), target, license="apache-2.0")
    text = readme.read_text()
    assert "Our note." in text and "thumbnail: x.png" in text and "license: apache-2.0" in text
    assert text.count("hf_ext:begin card") == 1
    assert load_file(target / "adapter_model.safetensors").popitem()[1].shape[1] == 2


def test_what_is_not_said_any_more_is_gone(tmp_path):
    """Results, cost, data and licence of other weights would contradict the text; what people wrote stays."""
    told = {
        "license": "mit",
        "datasets": "user/old",
        "metrics": {"accuracy": 0.9},
        "evaluated_on": "user/probe",
        "cost": Cost(1.0, 400.0, "DEU", "a meter"),
    }
    target = save(lora_model(), tmp_path / "adapter", base_model="user/old", **told)
    readme = target / "README.md"
    card = ModelCard.load(readme)
    card.data["thumbnail"], card.data["tags"] = "x.png", [*card.data.tags, "mine"]
    card.data["datasets"] = ["user/old", "user/theirs"]
    card.save(readme)
    save(lora_model(r=2), target, base_model="user/new")
    data = ModelCard.load(readme).data.to_dict()
    assert data["base_model"] == "user/new" and "base_model:adapter:user/old" not in data["tags"]
    assert data["thumbnail"] == "x.png" and "mine" in data["tags"] and data["datasets"] == ["user/theirs"]
    assert not {"license", "model-index", "model_name", "co2_eq_emissions"} & data.keys()
    save(lora_model(r=2), target, base_model="user/new")
    assert ModelCard.load(readme).data.to_dict() == data


def test_code_that_people_wrote_is_not_ours(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    target = save(model, tmp_path / "model")
    readme = target / "README.md"
    theirs = "```python\nprint('human')\n```\n"
    readme.write_text(readme.read_text().replace("<!-- hf_ext:begin card", f"{theirs}\n<!-- hf_ext:begin card"))
    save(model, target, run_snippet=True)
    text = readme.read_text()
    assert theirs in text and "parameters\n```\n<!-- hf_ext:end run -->" in text and "human\n```\n<!--" not in text
    # A card that tells of a run is not believed for other weights.
    save(model, tmp_path / "again", ModelCard.load(readme))
    assert "it was not run before publishing" in (tmp_path / "again" / "README.md").read_text()


def test_a_link_and_strange_bytes(tmp_path):
    target = save(lora_model(), tmp_path / "real", license="mit")
    (tmp_path / "link").symlink_to(target)
    readme = target / "README.md"
    readme.write_bytes(b"\xef\xbb\xbf" + (readme.read_text() + "Ours.\n").replace("\n", "\r\n").encode())
    for _ in range(2):
        save(lora_model(), tmp_path / "link", license="mit")
    assert (tmp_path / "link").is_symlink() and readme.read_text().endswith("Ours.\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


@pytest.mark.parametrize("name", ["notes.md", "README.md", "checkpoint.pt"])
def test_foreign_folder_is_refused(tmp_path, name):
    target = tmp_path / "adapter"
    target.mkdir()
    if name == "checkpoint.pt":
        save(lora_model(), target)
    (target / name).write_text("precious")
    before = everything(target)
    with pytest.raises(ValueError, match="overwrite=True"):
        save(lora_model(), target)
    assert everything(target) == before
    save(lora_model(), target, overwrite=True)
    assert name == "README.md" or name not in everything(target)


def test_file_in_the_way(tmp_path):
    (tmp_path / "adapter").write_text("precious")
    with pytest.raises(ValueError, match="holds something"):
        save(lora_model(), tmp_path / "adapter", overwrite=True)


def test_failure_while_writing_leaves_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    save(lora_model(), target)
    before = everything(target)

    def failing(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(package, "_rewrite_adapter_config", failing)
    with pytest.raises(OSError, match="disk full"):
        save(lora_model(r=2), target)
    assert everything(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_killed_between_the_renames(tmp_path):
    save(lora_model(), tmp_path / "adapter")
    before = everything(tmp_path / "adapter")
    (tmp_path / "adapter").rename(tmp_path / ".adapter.previous")
    with pytest.raises(ValueError, match="license"):
        save(lora_model(), tmp_path / "adapter", license="none such")
    assert everything(tmp_path / "adapter") == before


def test_killed_while_writing(tmp_path):
    """SIGKILL after the weights were written and before the rename: the target does not exist, and can be made."""
    code = (
        "import sys, time; from tests.model_cards.tiny import lora_model; from hf_ext.model_cards import package, save;"
        "package._rewrite_adapter_config = lambda *a: (print('written', flush=True), time.sleep(60));"
        "save(lora_model(), sys.argv[1])"
    )
    target = tmp_path / "adapter"
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "written\n"
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not target.exists()
    save(lora_model(), target)
    assert list(tmp_path.iterdir()) == [target]


def test_warnings_are_passed_on(tmp_path):
    with pytest.warns(UserWarning, match=r"model card:\n- no-license(.|\n)*snippet-not-run"):
        save(lora_model(), tmp_path / "adapter")


def test_finished_card_takes_no_more_arguments(tmp_path):
    with pytest.raises(ValueError, match="license: give these to `build_card`"):
        save(lora_model(), tmp_path / "adapter", build_card(lora_model()), license="mit")


def test_a_card_with_errors_is_refused(tmp_path):
    card = build_card(lora_model(), license="other")
    with pytest.raises(ValueError, match="license-other"):
        save(lora_model(), tmp_path / "adapter", card)
    card.data["license_name"], card.data["license_link"] = "mine", "LICENSE"
    save(lora_model(), tmp_path / "adapter", card)


def test_adapters_with_their_own_name_and_injected_adapters(tmp_path):
    model = lora_model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("second")
    save(model, tmp_path / "named")
    assert json.loads((tmp_path / "named" / "adapter_config.json").read_text())["r"] == 2
    plain = make_tiny_llama()
    plain.add_adapter(LoraConfig(r=3, target_modules=["q_proj"]))
    save(plain, tmp_path / "injected", base_model=BASE)
    assert json.loads((tmp_path / "injected" / "adapter_config.json").read_text())["r"] == 3
    check_adapter(tmp_path / "injected", make_tiny_llama())


def test_full_model(tmp_path):
    model = make_tiny_llama()
    save(model, tmp_path / "model", license="mit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(("fields", "saved"), [({}, False), ({"target_modules": ["embed_tokens"]}, True)])
def test_embeddings_are_saved_when_they_are_adapted(tmp_path, fields, saved):
    save(lora_model(**fields), tmp_path / "adapter")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == saved


def test_embeddings_are_saved_when_the_vocabulary_grew(tmp_path):
    from peft import get_peft_model

    make_tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(120)
    save(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")), tmp_path / "adapter")
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def save_everywhere(folder, run):
    """As a script does that asks nobody which process it is."""
    state = PartialState(cpu=True)
    saved = save(lora_model(), folder / "model", **run)
    published = state.is_main_process or publish(lora_model(), "user/x") is None
    state.wait_for_everyone()
    (folder / f"{state.process_index}.txt").write_text(f"{saved == folder / 'model'} {published}")
    state.wait_for_everyone()
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_the_first_of_several_processes_writes(tmp_path):
    assert run_two_processes(save_everywhere, tmp_path, [{"license": "mit"}]) == [["0.txt", "1.txt", "model"]]
    assert all((tmp_path / name).read_text() == "True True" for name in ("0.txt", "1.txt"))
    assert validate(tmp_path / "model").errors == []
