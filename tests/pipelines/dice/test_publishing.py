"""Pipelines with their own code: in one file, in a folder, on a Hub."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_ext.pipelines.standalone import standalone_source
from tests.hub.fixtures import run_against_hub
from tests.pipelines.dice.kinds import KINDS

HERE = Path(__file__).parent


@pytest.mark.slow
def test_against_hub():
    run_against_hub(HERE / "hub_checks.py", timeout=500)


@pytest.mark.parametrize("cls", dict.fromkeys(kind.cls for kind in KINDS.values()), ids=lambda cls: cls.__name__)
def test_one_file_has_all_it_needs(cls):
    source = standalone_source(cls.__module__)
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    own = {"torch", "diffusers", "transformers", "safetensors", "huggingface_hub"}
    assert modules - set(sys.stdlib_module_names) <= own
    # diffusers takes the one pipeline of a file.
    derived = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and any("DiffusionPipeline" in ast.unparse(base) for base in node.bases)
    ]
    assert derived == [cls.__name__]


def test_a_copy_saves_itself(tmp_path):
    """Loaded without hf_ext and saved again, the code is the same."""
    KINDS["masked text"].pipeline().save_pretrained(tmp_path / "first")
    code = (
        "import sys; sys.modules['hf_ext'] = None\nfrom diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline='pipeline', trust_remote_code=True)\n"
        "pipe.save_pretrained(sys.argv[2])"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(tmp_path / "first"), str(tmp_path / "second")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "hf_ext" not in done.stderr
    first, second = ((tmp_path / each / "pipeline.py").read_text() for each in ("first", "second"))
    assert first == second


def test_names_that_stand_for_two_things_are_refused(tmp_path, monkeypatch):
    package = tmp_path / "hf_ext_copied"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from hf_ext_copied.two import other\n\nname = 1\n")
    (package / "two.py").write_text("name = 2\n\n\ndef other():\n    return name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("hf_ext.pipelines.standalone.PACKAGE", "hf_ext_copied")
    with pytest.raises(ValueError, match=r"name is in hf_ext_copied.two and in hf_ext_copied.one"):
        standalone_source("hf_ext_copied.one")
    (package / "two.py").write_text("def other():\n    return 2\n")
    assert standalone_source("hf_ext_copied.one").endswith("name = 1\n")
    (package / "one.py").write_text("from hf_ext_copied.two import other as another\n")
    with pytest.raises(ValueError, match=r"line 1: import names of ours as they are"):
        standalone_source("hf_ext_copied.one")


def test_adapters_are_not_left_out(tmp_path):
    pipe = KINDS["masked text"].pipeline()
    base = pipe.model
    pipe.model = get_peft_model(base, LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"model is a PeftModel, which diffusers does not save: set pipeline.model"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pipe.model = pipe.model.merge_and_unload()
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "model/config.json").exists()


def test_adapters_that_were_added_are_not_saved_for_the_weights(tmp_path):
    pipe = KINDS["masked text"].pipeline()
    pipe.model.add_adapter(LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"model has adapters, .* call pipeline.model.delete_adapter"):
        pipe.save_pretrained(tmp_path)


def test_models_of_remote_code_are_refused(tmp_path):
    """diffusers would write down the module of the moment, which is not there the next time."""
    pipe = KINDS["diffusion text"].pipeline()
    pipe.model.__class__ = type("Remote", (type(pipe.model),), {"__module__": "transformers_modules.hub.modeling"})
    with pytest.raises(ValueError, match="model is a Remote of remote code"):
        pipe.save_pretrained(tmp_path)


def test_a_compiled_gemma_is_saved(tmp_path):
    kind = KINDS["DiffusionGemma"]
    pipe = kind.pipeline()
    pipe.model = torch.compile(pipe.model, backend="eager")
    pipe.save_pretrained(tmp_path)
    assert type(kind.cls.from_pretrained(tmp_path).model).__name__ == "DiffusionGemmaForBlockDiffusion"


def test_a_subclass_of_a_user_brings_no_code(tmp_path):
    kind = KINDS["masked text"]
    own = type("Own", (kind.cls,), {"__module__": "somewhere"})
    own(**kind.parts()).save_pretrained(tmp_path)
    assert not (tmp_path / "pipeline.py").exists()
    assert isinstance(own.from_pretrained(tmp_path), own)


def test_without_diffusers():
    """The package can be imported, and says what is missing where it is used."""
    code = "import sys; sys.modules['diffusers'] = None\nimport hf_ext\nhf_ext.DiceTextEditPipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'diffusers is not installed: pip install "hf-ext[diffusers]"' in done.stderr
