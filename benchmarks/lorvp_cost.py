"""What a prompt costs: as a constant map behind the first convolution, and added to the pixels.

Sixteen pictures of 224 x 224. First the convolution alone, forward and backward to the prompt, of a ViT-B/16 (patches of 16, 768 channels) and of a ResNet-50 (7 x 7, stride 2, 64 channels). Then a
whole ViT-B/16 and a whole ResNet-50, random weights: a training step of the prompt with the classifier, and a forward pass with the prompt next to one without.

    python -m benchmarks.lorvp_cost
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.common import write
from benchmarks.cost import Line, compare, keep_freed_memory, show, table_of_peers, time_line
from hf_ext import LorVpConfig
from hf_ext.tuners.lorvp import LorVpConvolution, reference

NAME, SEED, PIXELS, SCALE = "lorvp_cost", 0, 224, [1 / 0.229, 1 / 0.224, 1 / 0.225]
SAME, NONE = "the prompt added to the pixels", "without a prompt"
CONVOLUTIONS = {"ViT-B/16": (768, 16, 16, 0), "ResNet-50": (64, 7, 2, 3)}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": lambda: ViTForImageClassification(ViTConfig(num_labels=10)),
    "ResNet-50": lambda: ResNetForImageClassification(ResNetConfig(num_labels=10)),
}


class Size(NamedTuple):
    """How much is measured: pictures at once, and pairs of the convolution, of a step and of a forward pass."""

    pictures: int
    convolutions: int
    steps: int
    passes: int


FULL, SMALL = Size(16, 15, 5, 9), Size(2, 9, 3, 3)


def config() -> LorVpConfig:
    return LorVpConfig(r=4, image_size=PIXELS, pixel_scale=SCALE)


def convolution(name: str, pixels: Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    outputs, kernel, stride, padding = CONVOLUTIONS[name]
    base = nn.Conv2d(3, outputs, kernel, stride, padding).requires_grad_(False)
    layer = LorVpConvolution(base)
    layer.update_layer("default", config())
    layer.set_adapter("default")
    gradient = torch.randn_like(base(pixels))
    return lambda: layer(pixels).backward(gradient), lambda: base(
        pixels + reference.scaled(layer.prompt("default"), SCALE)
    ).backward(gradient)


class PromptedPixels(nn.Module):
    """The peer: a picture that is added to the input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        model.get_submodule("classifier").requires_grad_(True)
        self.left, self.right = nn.Parameter(torch.zeros(3, PIXELS, 4)), nn.Parameter(torch.randn(3, 4, PIXELS) * 0.01)

    def forward(self, pixel_values: Tensor) -> Any:
        return self.model(
            pixel_values=pixel_values + reference.scaled(reference.low_rank(self.left, self.right), SCALE)
        )


def step(model: nn.Module, pixels: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)

    def run() -> None:
        F.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def read(model: nn.Module, pixels: Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model(pixel_values=pixels)

    return run


def measure(size: Size) -> list[dict[str, Any]]:
    torch.manual_seed(SEED)
    pixels, labels = torch.randn(size.pictures, 3, PIXELS, PIXELS), torch.arange(size.pictures) % 10
    sides = {}
    for name, build in MODELS.items():
        sides[f"{name}: first convolution, forward and backward", SAME] = *convolution(name, pixels), size.convolutions
        prompted = get_peft_model(build(), config()).train()
        sides[f"{name}: training step", SAME] = (
            step(prompted, pixels, labels),
            step(PromptedPixels(build()), pixels, labels),
            size.steps,
        )
        evaluated = get_peft_model(build(), config()).eval().requires_grad_(False)  # as it is loaded
        plain = read(build().eval(), pixels)
        sides[f"{name}: forward pass", NONE] = read(evaluated, pixels), plain, size.passes
    results = []
    for (work, against), (ours, other, repeats) in sides.items():
        row = compare(ours, other, repeats=repeats)
        show(work, row)
        results.append({"name": work, "peer": against, **row})
    return results


def table(rows: list[dict[str, Any]]) -> str:
    return table_of_peers(rows, "ms")


def lines(rows: list[dict[str, Any]], size: Size) -> list[Line]:
    return [
        time_line(
            {**row, "name": f"{size.pictures} pictures, {row['name']}"},
            row["peer"],
            bar=1.0 if row["peer"] == SAME else None,
        )
        for row in rows
    ]


def main() -> None:
    keep_freed_memory()
    warnings.filterwarnings("ignore")
    results = measure(FULL)
    note = (
        f"{FULL.pictures} pictures of {PIXELS} x {PIXELS}, float32, {torch.get_num_threads()} threads; medians of {FULL.convolutions} pairs (convolution), {FULL.steps} (step) and {FULL.passes} (forward pass). "
        "`python -m benchmarks.lorvp_cost` repeats it."
    )
    report = {"command": "python -m benchmarks.lorvp_cost", "seed": SEED, "results": results}
    write(NAME, report | {"table": f"{table(results)}\n\n{note}"})


if __name__ == "__main__":
    main()
