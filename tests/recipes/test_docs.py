"""The commands and the recipe of docs/TRAINING_FROM_RECIPES.md; the one with `accelerate launch` in two real processes."""

import re
import shlex
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from hf_ext.cli import main
from hf_ext.recipes.methods import NOT_TRAINED, TRAINED
from tests.recipes.conftest import ROOT, environment, train

PAGE = (ROOT / "docs/TRAINING_FROM_RECIPES.md").read_text()
COMMANDS = re.findall(r"^(?:hf-ext train|accelerate launch) .*$", PAGE, re.M)
OWN = [command for command in COMMANDS if command.startswith("hf-ext") and ".yaml" in command]
LAUNCHES = [command for command in COMMANDS if command.startswith("accelerate")]


@pytest.mark.slow
@pytest.mark.parametrize("command", OWN)
def test_commands_run(command, tmp_path):
    short = ["--max_steps", "2", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main([*shlex.split(command)[1:], *short]) == 0
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_recipe_runs(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(re.search(r"```yaml\n(.*?)```", PAGE, re.S)[1])
    assert train("roselora", tmp_path / "out", config=recipe) == 0


def test_every_method_has_a_row():
    for slug in (*TRAINED, *NOT_TRAINED):
        assert f"| `{slug}` |" in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("command", LAUNCHES)
def test_two_processes_train_what_one_does(command, cache, tmp_path):
    """Half of the rows each, and the same weights in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    _, *launcher, module, _, slug, option, recipe, use_cpu = shlex.split(command)
    rows = yaml.safe_load((ROOT / recipe).read_text())["per_device_train_batch_size"]
    # Steps in proportion to gradients: Adam's would not show a gradient of another size.
    short = ("--max_steps", 3, "--optim", "sgd", "--learning_rate", 0.5)
    own = (*short, "--output_dir", tmp_path / "both", "--per_device_train_batch_size", rows // 2)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", port, *launcher[1:], module),
            *("train", slug, option, recipe, use_cpu, *map(str, own)),
        ],
        capture_output=True,
        text=True,
        env=environment(cache, GLOO_SOCKET_IFNAME="lo"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert train(slug, tmp_path / "one", *short) == 0
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {path.name for path in (tmp_path / "both").iterdir()}
    file = next(name for name in names if name.endswith(".safetensors"))
    one, both = (load_file(tmp_path / folder / file) for folder in ("one", "both"))
    for name, value in one.items():
        torch.testing.assert_close(both[name], value, rtol=1e-5, atol=1e-6, msg=name)
