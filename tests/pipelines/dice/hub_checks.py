"""Pipelines pushed to the loopback Hub, and loaded in new processes, with hf_ext and without. Run by `test_publishing.py` in a child process."""

import os
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from tests.hub.card_rules import problems
from tests.hub.fixtures import put_card
from tests.pipelines.dice.kinds import KINDS, inverted, seeded

# Without hf_ext: importing it fails as where it is not installed.
BLOCKED = "import sys; sys.modules['hf_ext'] = None\n"
EDIT = """
import sys
import torch
from safetensors.torch import save_file
pipe.set_progress_bar_config(disable=True)
trace_class = getattr(sys.modules[type(pipe).__module__], "DiceTrace", None)
if trace_class is None:
    from hf_ext.pipelines.dice import DiceTrace as trace_class
trace = trace_class.load(sys.argv[1])
generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
found = pipe.edit(trace, sys.argv[2], lambda1=0.3, generator=generators, output_type="seq")
save_file({"sequences": found.sequences, "back": pipe.reconstruct(trace, output_type="seq").sequences}, sys.argv[3])
print(type(pipe).__module__)
"""
WITH = """
from diffusers import DiffusionPipeline
from hf_ext import {cls}
pipe = {cls}.from_pretrained({repo!r})
assert type(DiffusionPipeline.from_pretrained({repo!r})) is {cls}
"""
WITHOUT = (
    BLOCKED
    + """
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({repo!r}, custom_pipeline='pipeline', trust_remote_code=True)
"""
)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ)


@pytest.mark.parametrize("name", ["masked text", "diffusion text", "DiffusionGemma", "aMUSEd", "VQ-Diffusion"])
def test_round_trip(hub, name, tmp_path):
    pipe, target = KINDS[name].pipeline(), KINDS[name].prompts[1]
    trace = inverted(name, pipe)
    trace.save(tmp_path / "trace.safetensors")
    expected = pipe.edit(trace, target, lambda1=0.3, generator=seeded(2, 5), output_type="seq").sequences
    back = pipe.reconstruct(trace, output_type="seq").sequences
    repo = f"user/{type(pipe).__name__}"
    pipe.push_to_hub(repo)
    assert len(HfApi().list_repo_commits(repo)) == 2  # the first is that of the empty repository
    ways = {"diffusers_modules": WITHOUT, "hf_ext": WITH}
    if name in ("diffusion text", "aMUSEd"):
        del ways["hf_ext"]  # as the others of their kind
    for module, load in ways.items():
        code = load.format(cls=type(pipe).__name__, repo=repo) + EDIT
        done = run(code, str(tmp_path / "trace.safetensors"), target, str(tmp_path / "found.safetensors"))
        assert done.returncode == 0, done.stderr[-3000:]
        found = load_file(tmp_path / "found.safetensors")
        assert found["sequences"].equal(expected) and found["back"].equal(back)
        assert done.stdout.startswith(module)


def test_card_and_trust(hub):
    pipe = KINDS["masked text"].pipeline()
    pipe.push_to_hub("user/dice", commit_message="First")
    card = ModelCard.load("user/dice")
    errors, warnings = problems(card.content)
    assert errors == [] and warnings == []
    assert card.data.library_name == "diffusers" and {"dice", "text-editing"} <= set(card.data.tags)
    for piece in (
        'name = "user/dice"\npipeline = DiceTextEditPipeline.from_pretrained(name)',
        "trust_remote_code=True",
        "| `lambda1` | `0.7` |",
        "2410.08207",
    ):
        assert piece in card.content, piece
    # What people write stays.
    card.content += "\nBy hand."
    put_card(card, "user/dice")
    pipe.push_to_hub("user/dice")
    assert ModelCard.load("user/dice").content.endswith("By hand.")
    code = BLOCKED + "from diffusers import DiffusionPipeline\nDiffusionPipeline.from_pretrained('user/dice'{})"
    refused = run(code.format(", custom_pipeline='pipeline'"))
    assert refused.returncode and "trust_remote_code=True" in refused.stderr
    assert run(code.format("")).returncode
