"""Registration with PEFT survives whatever a user's program does around it."""

import copy
import enum
import importlib
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import hf_ext
from hf_ext.registry import METHODS

OURS = [m.peft_type for m in METHODS if m.peft_type]


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def check(script: str, **environment: str) -> str:
    done = run_python(script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", OURS)
def test_the_member_behaves_like_a_native_one(name):
    member = PeftType(name)
    assert member is PeftType[name] is getattr(PeftType, name)
    assert member in list(PeftType) and name in list(PeftType)
    assert isinstance(member, PeftType) and isinstance(member, enum.Enum) and isinstance(member, str)
    assert member == name and hash(member) == hash(name)
    assert (member.name, member.value, repr(member)) == (name, name, f"<PeftType.{name}: {name!r}>")
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.dumps({"peft_type": member}) == f'{{"peft_type": "{name}"}}'
    assert str(member) == f"PeftType.{name}"
    with pytest.raises(ValueError, match="NOT_A_TYPE"):
        PeftType("NOT_A_TYPE")


def test_registering_again_and_reloading_change_nothing():
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)
    assert all(hf_ext.tuners.register().values())
    importlib.reload(hf_ext)
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)) == before


def test_import_order_does_not_matter_and_import_is_light():
    out = check("""
import sys, time
import peft
from peft import LoraConfig
existing = LoraConfig()
before = set(sys.modules)
start = time.perf_counter()
import hf_ext
seconds = time.perf_counter() - start
added = {name.split(".")[0] for name in set(sys.modules) - before}
assert not added & {"trl", "diffusers", "bitsandbytes", "triton", "datasets"}, added
assert existing.peft_type is peft.PeftType.LORA
assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType.ROSELORA] is hf_ext.RoseLoraConfig
print("seconds", seconds)
""")
    assert float(out.split("seconds")[1].split()[0]) < 0.3
    check(
        "import hf_ext; import transformers, diffusers, trl, peft; assert peft.PeftType.ROSELORA in peft.PEFT_TYPE_TO_TUNER_MAPPING"
    )


def test_another_plugin_may_extend_the_enum_too():
    check(
        f"""
from peft import PeftType
from hf_ext._compat import extend_peft_type
import hf_ext.tuners
extend_peft_type("ANOTHER")
hf_ext.tuners.register()
extend_peft_type("THIRD")
assert list(PeftType)[-{len(OURS) + 2}:] == ["ANOTHER", *{OURS}, "THIRD"]
assert extend_peft_type("ROSELORA") is PeftType.ROSELORA
""",
        HF_EXT_AUTO_REGISTER="0",
    )


def test_a_future_peft_that_ships_the_name_wins_with_a_warning():
    out = check(
        """
from dataclasses import dataclass
from hf_ext.registry import METHODS          # importing hf_ext with HF_EXT_AUTO_REGISTER=0 registers nothing
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import LoraModel
from peft.utils import register_peft_method
from hf_ext._compat import extend_peft_type

extend_peft_type("ROSELORA")                 # stands for a member that PEFT defines itself

@dataclass
class TheirConfig(LoraConfig):
    pass

class TheirModel(LoraModel):
    pass

register_peft_method(name="roselora", config_cls=TheirConfig, model_cls=TheirModel, prefix="lora_")
import hf_ext.tuners
assert [name for name, is_ours in hf_ext.tuners.register().items() if not is_ours] == ["ROSELORA"]
assert PEFT_TYPE_TO_CONFIG_MAPPING["ROSELORA"] is TheirConfig
assert hf_ext.RoseLoraConfig(r=2).r == 2
""",
        HF_EXT_AUTO_REGISTER="0",
    )
    assert "PEFT already provides the type ROSELORA" in out


def test_without_registration_a_configuration_says_what_to_do():
    done = run_python("import hf_ext; hf_ext.RoseLoraConfig()", HF_EXT_AUTO_REGISTER="0")
    assert "PeftType.ROSELORA is not registered; call hf_ext.tuners.register() first" in done.stderr


def test_pickled_configurations_need_no_import(tmp_path):
    path = tmp_path / "config.pkl"
    path.write_bytes(pickle.dumps(hf_ext.RoseLoraConfig(r=3, sparsity=0.5)))
    check(f"""
import pickle
config = pickle.load(open(r"{path}", "rb"))
assert (config.r, config.sparsity, config.peft_type.value) == (3, 0.5, "ROSELORA")
""")


def test_loading_without_the_plugin_fails_and_the_remedy_works(tmp_path):
    """The error is PEFT's; docs/methods/roselora.md and every model card name the remedy."""
    from tests.tuners.roselora.conftest import make_model

    make_model().save_pretrained(tmp_path)
    done = run_python(f'from peft import PeftConfig; PeftConfig.from_pretrained(r"{tmp_path}")')
    assert "KeyError: 'ROSELORA'" in done.stderr
    check(f'import hf_ext; from peft import PeftConfig; PeftConfig.from_pretrained(r"{tmp_path}")')


def test_configurations_reach_the_workers_of_a_data_loader():
    check("""
import torch, hf_ext

class Data(torch.utils.data.Dataset):
    config = None
    def __len__(self): return 2
    def __getitem__(self, i): return self.config.r

if __name__ == "__main__":
    data = Data()
    data.config = hf_ext.RoseLoraConfig(r=5)
    loader = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context="fork")
    assert [int(x) for x in loader] == [5, 5]
""")
