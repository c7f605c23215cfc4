"""A rectangle takes another colour: what of a picture of codes is kept, with DICE and without residuals.

Pictures of 8 x 8 codes: plain ground, one of four codes, and on it a rectangle of a colour, whose three codes are mixed at random. An aMUSEd model (`UVit2DModel`) of 0.3 million weights learns them, told the colour, with
noise of random codes or of masks alone. 64 other pictures get the prompt of another colour. The ground should stay, the rectangle take the colour, and keep its outline (IoU).

    python -m benchmarks.dice_image [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from benchmarks.common import markdown, run_seeds, spread
from examples.edit_a_digit import learn_pictures, parts_for
from hf_ext import DiceMaskedImagePipeline
from hf_ext.metrics.discrete_editing import exactness, preserved

NAME, SEEDS, COUNT, CODES, GROUNDS = "dice_image", (0, 1, 2), 64, 16, 4
COLOURS = ["red", "green", "blue", "grey"]
TRAINED, STEPS = 4096, 10


def pictures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Codes `(count, 8, 8)` and the numbers of their colours."""

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ground, colour = draw(0, GROUNDS, count, 1, 1), draw(0, len(COLOURS), count)
    places = torch.arange(8)
    inside = torch.ones(count, 8, 8, dtype=torch.bool)
    for shape in ((1, 8, 1), (1, 1, 8)):
        size = draw(3, 6, count, 1, 1)
        first = (torch.rand(count, 1, 1, generator=generator) * (9 - size)).long()
        along = places.view(shape)
        inside &= (along >= first) & (along < first + size)
    texture = GROUNDS + 3 * colour[:, None, None] + draw(0, 3, count, 8, 8)
    return torch.where(inside, texture, ground), colour


def judged(found: Tensor, source: Tensor, colour: Tensor) -> dict[str, float]:
    """
    Args:
        colour: number of the colour that the rectangles should have.
    """
    thing, other = source >= GROUNDS, found >= GROUNDS
    right = (found - GROUNDS) // 3 == colour[:, None, None]
    union = (thing | other).flatten(1).sum(-1)
    return {
        "ground": preserved(found, source, ~thing),
        "recoloured": (right & other)[thing].float().mean().item(),
        "outline": ((thing & other).flatten(1).sum(-1) / union).mean().item(),
    }


def arms() -> dict[str, tuple[str, float, str, float | None, float, float]]:
    """Noise, guidance, anchor, floor, tau and lambda1 of each arm."""
    found: dict[str, tuple[str, float, str, float | None, float, float]] = {
        "painted anew": ("random", 1.0, "corrected", None, 1.0, 0.0),
        "painted anew from 90 % noise": ("random", 1.0, "corrected", None, 0.9, 0.0),
        "painted anew from 50 % noise": ("random", 1.0, "corrected", None, 0.5, 0.0),
    }
    for strength in (0.3, 0.5, 0.7, 0.9):
        found[f"DICE, lambda {strength}"] = ("random", 1.0, "auto", None, 0.9, strength)
    found["DICE, lambda 0.7, one-hot anchor, floor -10"] = ("random", 1.0, "onehot", -10.0, 0.9, 0.7)
    found["guidance 3, painted anew from 90 % noise"] = ("random", 3.0, "onehot", None, 0.9, 0.0)
    found["guidance 3, DICE, lambda 0.7, published anchor"] = ("random", 3.0, "model", None, 0.9, 0.7)
    for strength in (0.5, 0.7, 0.9):
        found[f"guidance 3, DICE, lambda {strength}"] = ("random", 3.0, "auto", None, 0.9, strength)
    for anchor in ("model", "auto"):
        name = {"model": "published anchor", "auto": "DICE"}[anchor]
        found[f"trained on masks alone, {name}, lambda 0.7"] = ("mask", 1.0, anchor, None, 0.9, 0.7)
        found[f"trained on masks alone, guidance 3, {name}, lambda 0.7"] = ("mask", 3.0, anchor, None, 0.9, 0.7)
    return found


def measure(seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    codes, colours = pictures(TRAINED, generator)
    source, before = pictures(COUNT, generator)
    after = (before + torch.randint(1, 4, (COUNT,), generator=generator)) % 4
    pipes = {}
    for noise in ("random", "mask"):
        pipe = DiceMaskedImagePipeline(**parts_for(VQModel(num_vq_embeddings=CODES), CODES, seed), noise=noise)
        pipe.set_progress_bar_config(disable=True)
        learn_pictures(pipe, codes, [COLOURS[number] for number in colours], seed=seed)
        pipes[noise] = pipe
    runs = []
    for arm, (noise, guidance, anchor, floor, tau, strength) in arms().items():
        pipe = pipes[noise]
        trace = pipe.invert(
            source,
            [COLOURS[number] for number in before],
            num_inference_steps=STEPS,
            tau=tau,
            guidance_scale=guidance,
            anchor=anchor,
            anchor_floor=floor,
            generator=torch.Generator().manual_seed(100 + seed),
        )
        target = [COLOURS[number] for number in after]
        seeded = torch.Generator().manual_seed(200 + seed)
        found = pipe.edit(trace, target, lambda1=strength, generator=seeded, output_type="seq").sequences
        back = pipe.reconstruct(trace, output_type="seq").sequences
        exact = exactness(back.flatten(1), trace.tokens)
        runs.append({"seed": seed, "arm": arm, **judged(found, source, after), "exact": exact})
        print(runs[-1], flush=True)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    rows = []
    for arm in arms():
        mine = [run for run in runs if run["arm"] == arm]
        rows.append(
            [
                arm,
                *(spread([100 * run[name] for run in mine]) for name in ("ground", "recoloured", "outline", "exact")),
            ]
        )
    head = ["", "ground kept", "rectangle recoloured", "outline kept (IoU)", "exact reconstructions"]
    note = f"{COUNT} pictures, {len({run['seed'] for run in runs})} seeds, percent, mean and standard deviation; {STEPS} steps, tau 0.9 with DICE; lambda is lambda1, and lambda2 = 1 - lambda1. `python -m benchmarks.dice_image` repeats it."
    return markdown(head, rows) + "\n\n" + note


def main() -> None:
    run_seeds(NAME, SEEDS, measure, table, lambda run: (run["arm"], run["seed"]))


if __name__ == "__main__":
    main()
