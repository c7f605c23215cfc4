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


def arms() -> dict[str, tuple[str, float, dict[str, Any]]]:
    """Noise, lambda1, and arguments of `invert`, of each arm."""
    plain = {"guidance_scale": 1.0, "tau": 0.9}
    guided = {"guidance_scale": 3.0, "tau": 0.9}
    # Every position is predicted in every step, as the authors do.
    published = {"anchor": "model", "carry_over": False, "tau": 0.9}
    found: dict[str, tuple[str, float, dict[str, Any]]] = {
        f"painted anew from {tau:.0%} noise": ("random", 0.0, {**plain, "tau": tau}) for tau in (1.0, 0.9, 0.5)
    }
    for strength in (0.3, 0.5, 0.7, 0.9):
        found[f"DICE, lambda {strength}"] = ("random", strength, plain)
    found["DICE, lambda 0.7, one-hot anchor, floor -10"] = (
        "random",
        0.7,
        {**plain, "anchor": "onehot", "anchor_floor": -10.0},
    )
    found["guidance 3, painted anew from 90 % noise"] = ("random", 0.0, guided)
    found["guidance 3, DICE, lambda 0.7, published anchor"] = ("random", 0.7, {**guided, **published})
    for strength in (0.3, 0.5, 0.7):
        found[f"guidance 3, DICE, lambda {strength}"] = ("random", strength, guided)
    for floor in (-10.0, -14.0, -17.0):
        found[f"guidance 3, DICE, lambda 0.7, floor {floor:g}"] = ("random", 0.7, {**guided, "anchor_floor": floor})
    masks = "trained on masks alone, "
    found[masks + "published anchor, lambda 0.7"] = ("mask", 0.7, {**plain, **published})
    found[masks + "one-hot anchor, lambda 0.7"] = ("mask", 0.7, {**plain, "carry_over": False})
    for strength in (0.3, 0.5, 0.7):
        found[f"{masks}DICE, lambda {strength}"] = ("mask", strength, {"guidance_scale": 1.0})
    found[masks + "guidance 3, published anchor, lambda 0.7"] = ("mask", 0.7, {**guided, **published})
    for strength in (0.3, 0.5, 0.7):
        found[f"{masks}guidance 3, DICE, lambda {strength}"] = ("mask", strength, {"guidance_scale": 3.0})
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
    for arm, (noise, strength, options) in arms().items():
        pipe = pipes[noise]
        seeded = torch.Generator().manual_seed(100 + seed)
        prompts = [COLOURS[number] for number in before]
        trace = pipe.invert(source, prompts, num_inference_steps=STEPS, generator=seeded, **options)
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
    note = f"{COUNT} pictures, {len({run['seed'] for run in runs})} seeds, percent, mean and standard deviation; {STEPS} steps; lambda is lambda1, and lambda2 = 1 - lambda1. `python -m benchmarks.dice_image` repeats it."
    return markdown(head, rows) + "\n\n" + note


def main() -> None:
    run_seeds(NAME, SEEDS, measure, table, lambda run: (run["arm"], run["seed"]))


if __name__ == "__main__":
    main()
