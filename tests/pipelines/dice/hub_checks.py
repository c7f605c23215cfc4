"""Pipelines pushed to the loopback Hub, and loaded in new processes, with hf_ext and without. Run by `test_publishing.py` in a child process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from tests.hub.card_rules import problems
from tests.hub.fixtures import put_card
from tests.pipelines.dice.kinds import KINDS, inverted, seeded

# Without hf_ext: importing it fails as where it is not installed.
BLOCKED = "import sys; sys.modules['hf_ext'] = None\n"
# Edits and reconstructs with each of the pipelines that `load` gives; the jobs are in a file.
EDIT = """
import json, sys
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
{load}
for cls, repo, trace, target, found in json.load(open(sys.argv[1])):
    pipe = load(cls, repo)
    pipe.set_progress_bar_config(disable=True)
    trace_class = getattr(sys.modules[type(pipe).__module__], "DiceTrace", None)
    if trace_class is None:
        from hf_ext.pipelines.dice import DiceTrace as trace_class
    trace = trace_class.load(trace)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    edited = pipe.edit(trace, target, lambda1=0.3, generator=generators, output_type="seq").sequences
    save_file({{"sequences": edited, "back": pipe.reconstruct(trace, output_type="seq").sequences}}, found)
    print(type(pipe).__module__)
"""
WITH = """
import hf_ext
def load(cls, repo):
    cls = getattr(hf_ext, cls)
    assert type(DiffusionPipeline.from_pretrained(repo)) is cls
    return cls.from_pretrained(repo)
"""
# diffusers gives the pipeline.py of every repository the same module.
WITHOUT = """
def load(cls, repo):
    sys.modules.pop("diffusers_modules.local.pipeline", None)
    return DiffusionPipeline.from_pretrained(repo, custom_pipeline="pipeline", trust_remote_code=True)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def test_round_trips(hub, tmp_path):
    """One process with hf_ext and one without load and use a pipeline of every kind."""
    expected, jobs = {}, []
    for name in ("masked text", "diffusion text", "DiffusionGemma", "aMUSEd", "VQ-Diffusion"):
        pipe, target = KINDS[name].pipeline(), KINDS[name].prompts[1]
        cls = type(pipe).__name__
        repo, trace_file, found = f"user/{cls}", str(tmp_path / f"{cls}.trace"), str(tmp_path / f"{cls}.found")
        trace = inverted(name, pipe)
        trace.save(trace_file)
        edited = pipe.edit(trace, target, lambda1=0.3, generator=seeded(2, 5), output_type="seq").sequences
        expected[found] = {"sequences": edited, "back": pipe.reconstruct(trace, output_type="seq").sequences}
        pipe.push_to_hub(repo)
        assert len(HfApi().list_repo_commits(repo)) == 2  # the first is that of the empty repository
        jobs.append((cls, repo, trace_file, target, found))
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    ways = {"diffusers_modules": BLOCKED + EDIT.format(load=WITHOUT), "hf_ext": EDIT.format(load=WITH)}
    for module, code in ways.items():
        done = run(code, tmp_path / "jobs.json")
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert [line.split(".")[0] for line in done.stdout.splitlines()] == [module] * len(jobs)
        for file, tensors in expected.items():
            found = load_file(file)
            assert all(found[name].equal(value) for name, value in tensors.items()), (module, file)
            Path(file).unlink()


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
