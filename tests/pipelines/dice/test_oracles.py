"""The pipelines' own loop on recorded models of the authors' code: residuals, and every token of every step."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_ext.pipelines.dice.editing import DiceEditing
from hf_ext.pipelines.dice.trace import DiceSettings, MaskedTrace
from tests.oracles import ORACLES

META = json.loads((ORACLES / "dice/meta.json").read_text())
CLOSE = dict(rtol=0, atol=1e-9)


def rows(grid: Tensor) -> Tensor:
    """`(B, V, H, W)` as `(B, H W, V)`, `(B, H, W)` as `(B, H W)`."""
    return grid.flatten(-2).movedim(1, -1) if grid.ndim == 4 else grid.flatten(-2)


class Toy(DiceEditing, DiffusionPipeline):
    """A recorded model and recorded noise in the place of theirs."""

    _output_types = ("seq",)

    def __init__(self) -> None:
        super().__init__()
        self.register_to_config()
        self.set_progress_bar_config(disable=True)

    @classmethod
    def of(cls, logits, prompts: dict) -> "Toy":
        """
        Args:
            logits: of tokens, a condition and a time.
            prompts: conditions by name.
        """
        toy = cls()
        toy.logits, toy.prompts = logits, prompts
        return toy

    def _denoiser(self):
        return nn.Identity()

    def _dtype(self):
        return torch.float64

    def _about(self):
        return {}

    def _denoise(self, trace, tokens_BN, condition, time):
        return self.logits(tokens_BN, condition, time)

    def _conditions(self, trace, prompts):
        return self.prompts[prompts[0]]

    def _output(self, trace, tokens_BN, steps_SBN, kind):
        return SimpleNamespace(sequences=tokens_BN, trajectory=steps_SBN)

    def _gumbel(self, lengths, count, values, generator, device):
        return next(self.recorded)


def trace_of(x0, noise, u, settings, source, negative, model_anchor=True) -> MaskedTrace:
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    onehot = torch.full((len(x0),), not model_anchor)
    return MaskedTrace(x0, everywhere, settings, source, negative, {}, noise=noise, uniforms=u, onehot=onehot)


def toy_grid(name: str):
    """The recorded picture model: logits of tokens, under a condition, at a time."""
    recorded, settings = load_file(ORACLES / f"dice/{name}.safetensors"), META[name]
    model = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}

    def logits(tokens_BN, condition, time):
        h = torch.tanh(model["E"][tokens_BN] + model["P"] + time * model["tau"] + condition["cond"][:, None])
        seen = nn.functional.one_hot(tokens_BN, settings["K"]).to(h.dtype)
        return (torch.tanh(model["A"] @ h) + h) @ model["O"] + model["copy"] * seen

    prompts = {each: {"cond": recorded[f"cond_{each}"]} for each in ("source", "target", "uncond")}
    return recorded, settings, Toy.of(logits, prompts)


@pytest.mark.parametrize("name", ["grid_copy", "grid_nocopy"])
@pytest.mark.parametrize("stored", [False, True])
def test_pictures(name, stored):
    recorded, settings, toy = toy_grid(name)
    x0, noise, u = (rows(recorded[key]) for key in ("x0", "noise", "u"))
    chosen = DiceSettings(
        settings["steps"],
        settings["tau"],
        temperatures=settings["temperature_inversion"],
        guidance_scale=settings["cfg"],
        anchor="model",
        convention="paella",
    )
    trace = trace_of(x0, noise, u, chosen, toy.prompts["source"], toy.prompts["uncond"])
    count = len(trace.states)
    for number, expected in zip(range(count), recorded["x_noised"], strict=False):
        assert torch.equal(trace.state(number), rows(expected))
    torch.testing.assert_close(toy._plain(trace), rows(recorded["y0"]), **CLOSE)
    with_residuals = toy._with_residuals(trace)
    torch.testing.assert_close(with_residuals.residuals, torch.stack([rows(each) for each in recorded["z"]]), **CLOSE)
    assert torch.equal(trace.state(count - 1), rows(recorded["x_T"]))
    if stored:
        trace = with_residuals
    for edit, options in settings["edits"].items():
        kind = {"None": "constant"}.get(options["lambda_schedule"], options["lambda_schedule"])
        toy.recorded = iter([rows(each) for each in recorded[f"{edit}.gumbel"]])
        found = toy.edit(
            trace, options["prompt"], lambda1=options["lambda1"], lambda_schedule=kind, return_trajectory=True
        )
        expected = recorded[f"{edit}.trajectory"].flatten(-2)
        assert torch.equal(found.trajectory, expected[::2]), edit
        for step, tokens in enumerate(expected[1::2]):
            assert torch.equal(trace.noised(found.trajectory[step], count - 2 - step), tokens), edit
        assert torch.equal(found.sequences, rows(recorded[f"{edit}.tokens"]))


def test_texts():
    recorded, settings = load_file(ORACLES / "dice/text_pair.safetensors"), META["text_pair"]
    model = {key.removeprefix("model."): value for key, value in recorded.items() if key.startswith("model.")}
    source, target = recorded["source_ids"], recorded["target_ids"]
    # The sentence and the token that ends it, which is predicted but never noise.
    width = settings["sentence_len"] + 1

    def logits(tokens_BN, condition, time):
        ids_BL = torch.cat([condition["ids"][:, :-width], tokens_BN], 1)
        length = ids_BL.shape[1]
        h = torch.tanh(model["E"][ids_BL] + model["P"][:length])
        seen = nn.functional.one_hot(ids_BL, settings["V"]).to(h.dtype)
        whole = (torch.tanh(model["A"][:length, :length] @ h) + h) @ model["O"] + model["copy"] * seen
        return whole[:, -width:]

    toy = Toy.of(logits, {"source": {"ids": source}, "target": {"ids": target}})
    u = torch.cat([recorded["u"], torch.tensor([2.0])])[None]
    chosen = DiceSettings(settings["steps"], settings["tau"], anchor="model")
    trace = trace_of(source[:, -width:], recorded["noise"][None, -width:], u, chosen, toy.prompts["source"], {})
    for number, expected in enumerate(recorded["x_noised"]):
        assert torch.equal(trace.state(number)[0], expected[-width:])
    torch.testing.assert_close(toy._plain(trace), recorded["y0"][:, -width:], **CLOSE)
    torch.testing.assert_close(toy._with_residuals(trace).residuals[:, 0], recorded["z"], **CLOSE)
    for edit, options in settings["edits"].items():
        toy.recorded = iter([each[None] for each in recorded[f"{edit}.gumbel"]])
        found = toy.edit(trace, options["prompt"], lambda1=options["lambda1"], return_trajectory=True)
        count = len(trace.states)
        # Recorded after noise has been put back.
        states = [trace.noised(found.trajectory[step], count - 2 - step) for step in range(count - 1)]
        states = torch.cat([*states, found.sequences])
        assert torch.equal(states, recorded[f"{edit}.trajectory"][:, -width:]), edit
        assert torch.equal(found.sequences, recorded[f"{edit}.ids"][:, -width:])


@pytest.mark.parametrize("anchor", ["model", "corrected", "onehot"])
def test_what_the_published_anchor_leads_back_to(anchor):
    """The recorded model without a way to copy: its own anchor loses the tokens, the others do not."""
    recorded, settings, toy = toy_grid("grid_nocopy")
    x0, noise, u = (rows(recorded[key]) for key in ("x0", "noise", "u"))
    chosen = DiceSettings(settings["steps"], settings["tau"], guidance_scale=settings["cfg"], anchor=anchor)
    trace = trace_of(x0, noise, u, chosen, toy.prompts["source"], toy.prompts["uncond"], anchor != "onehot")
    found = toy.reconstruct(trace).sequences
    assert torch.equal(found, x0) == (anchor != "model")
