"""Prompts on digits: a frozen model that has lost its eyes gets them back by one picture, or does not.

A small ViT and a small ResNet learn 1,200 of scikit-learn's digits, enlarged to 32 x 32. Then every digit wears the same pattern, a random value for each row and one for each column, of
size 1, in each colour; 400 of them are for training, 200 others choose the learning rates, and 397 others judge. In "turned", digits are turned by a quarter instead, which no picture
that is added could undo. All arms train the classifier anew (AdamW, 20 epochs, cosine), but "label map", which trains the prompt alone and gives each class a source class after every epoch.

Learning rates are the best in validation, for each arm and seed: of the classifier alone one of four, of a prompt one of four, with the classifier's at 0.01 or where it was best alone.

    python -m benchmarks.lorvp_digits [--seeds 0 1 2]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.common import markdown, run_seeds, spread
from hf_ext import LorVpConfig, fit_label_map

NAME, SEEDS, SIZE, EPOCHS, BATCH = "lorvp_digits", (0, 1, 2), 32, 20, 64
SOURCE, TRAINED, VALIDATION = 1200, 400, 200
HEAD_RATES, PROMPT_RATES = (3e-3, 1e-2, 3e-2, 1e-1), (2e-2, 5e-2, 1e-1, 2e-1)
STD = 0.5
MODELS = ("ViT", "ResNet")
# Configuration of the prompt; None: the classifier alone.
ARMS: dict[str, dict[str, Any] | None] = {
    "classifier alone": None,
    "frame of 2 pixels": {"prompt": "frame", "width": 2},
    "frame of 4 pixels": {"prompt": "frame", "width": 4},
    "tile of 8 pixels": {"prompt": "tile", "width": 8},
    "free": {"prompt": "free"},
    "LoR-VP, r = 1": {"r": 1},
    "LoR-VP, r = 2": {"r": 2},
    "LoR-VP, r = 4": {"r": 4},
    "shared factors, r = 4": {"r": 4, "prompt": "low_rank_shared"},
    "LoR-VP, r = 4, label map": {"r": 4, "head": "label_map", "num_labels": 10},
}


def backbone(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if name == "ViT":
        config = ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=SIZE, patch_size=8, num_labels=10,
        )  # fmt: skip
        return ViTForImageClassification(config)
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    )


def digits(seed: int) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Normalised pictures and labels, by world and part."""
    loaded = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(loaded.images), generator=generator)
    small, y = torch.tensor(loaded.images, dtype=torch.float32)[order, None] / 16, torch.tensor(loaded.target)[order]
    x = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    rows, columns = (torch.randn(3, *shape, generator=generator) for shape in ((SIZE, 1), (1, SIZE)))
    worlds = {"plain": x, "pattern": x + (rows + columns) / 2**0.5, "turned": x.rot90(1, (2, 3))}
    parts = {
        "source": slice(0, SOURCE),
        "train": slice(0, TRAINED),
        "validation": slice(SOURCE, SOURCE + VALIDATION),
        "test": slice(SOURCE + VALIDATION, None),
    }
    return {
        world: {part: ((pixels[where] - STD) / STD, y[where]) for part, where in parts.items()}
        for world, pixels in worlds.items()
    }


def fit(model: nn.Module, data: tuple[Tensor, Tensor], groups: list[dict[str, Any]], epochs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    x, y = data
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // BATCH))
    for _ in range(epochs):
        if model_maps(model):
            fit_label_map(model, [{"pixel_values": x, "labels": y}])
        model.train()
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(pixel_values=x[rows]).logits, y[rows]).backward()
            optimizer.step()
            schedule.step()
    if model_maps(model):
        fit_label_map(model, [{"pixel_values": x, "labels": y}])
    model.eval()


def model_maps(model: Any) -> bool:
    return "peft_config" in vars(model) and model.peft_config["default"].head == "label_map"


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return (model(pixel_values=data[0]).logits.argmax(1) == data[1]).float().mean().item()


def source_model(name: str, seed: int, data: tuple[Tensor, Tensor]) -> nn.Module:
    model = backbone(name, seed)
    fit(model, data, [{"params": list(model.parameters()), "lr": 3e-3}], 20, seed)
    return model.requires_grad_(False)


def adapt(
    name: str, seed: int, source: dict[str, Tensor], arm: dict[str, Any] | None, rates: tuple[float, float], data: Any
) -> Any:
    """A source model with one arm; `rates` are those of the prompt and of the classifier."""
    model: Any = backbone(name, seed)
    model.load_state_dict(source)
    maps = arm is not None and arm.get("head") == "label_map"
    if not maps:
        torch.manual_seed(seed)
        (model.classifier if name == "ViT" else model.classifier[1]).reset_parameters()
    model.requires_grad_(False)
    if arm is None:
        head = list(model.classifier.requires_grad_(True).parameters())
        model.train = lambda mode=True: model  # as a prompt's model: what is frozen stays in eval mode
        fit(model.eval(), data, [{"params": head, "lr": rates[1]}], EPOCHS, seed)
        return model
    torch.manual_seed(seed)
    model = get_peft_model(model, LorVpConfig(image_size=SIZE, pixel_scale=1 / STD, **arm))
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    prompt, head = ([p for key, p in trained.items() if ("lorvp_" in key) == mine] for mine in (True, False))
    fit(model, data, [{"params": prompt, "lr": rates[0]}, {"params": head, "lr": rates[1]}], EPOCHS, seed)
    return model


def measure(seed: int) -> list[dict[str, Any]]:
    worlds, runs = digits(seed), []
    for name in MODELS:
        base = source_model(name, seed, worlds["plain"]["source"])
        at_home = accuracy(base, worlds["plain"]["test"])
        for world in ("pattern", "turned"):
            parts, shared = worlds[world], {"model": name, "world": world, "seed": seed}
            runs.append(
                {**shared, "arm": "source model", "rates": (0.0, 0.0), "prompt": 0, "test": accuracy(base, parts["test"]), "at home": at_home}
            )  # fmt: skip
            alone = HEAD_RATES[0]
            for arm, options in ARMS.items():
                grid = [(0.0, rate) for rate in HEAD_RATES]
                if options is not None:
                    heads = {HEAD_RATES[1], alone} if options.get("head") is None else {0.0}
                    grid = [(rate, head) for rate in PROMPT_RATES for head in sorted(heads)]
                tried = []
                for rates in grid:
                    model = adapt(name, seed, base.state_dict(), options, rates, parts["train"])
                    numbers = sum(
                        p.numel() for key, p in model.named_parameters() if "lorvp_" in key and p.requires_grad
                    )
                    scores = {part: accuracy(model, parts[part]) for part in ("validation", "test")}
                    tried.append({**shared, "arm": arm, "rates": rates, "prompt": numbers, **scores})
                runs.append(max(tried, key=lambda run: run["validation"]))
                if options is None:
                    alone = runs[-1]["rates"][1]
                print(runs[-1], flush=True)
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    columns = [(model, world) for world in ("pattern", "turned") for model in MODELS]
    cells = []
    for arm in ("source model", *ARMS):
        mine = [run for run in runs if run["arm"] == arm]
        tests = [[100 * run["test"] for run in mine if (run["model"], run["world"]) == column] for column in columns]
        cells.append([arm, f"{mine[0]['prompt']:,}", *map(spread, tests)])
    home = {
        model: spread([100 * run["at home"] for run in runs if run["model"] == model and "at home" in run])
        for model in MODELS
    }
    note = (
        f"Test accuracy in percent, {len({run['seed'] for run in runs})} seeds, mean and standard deviation; on digits as they learnt them the source models have {home['ViT']} (ViT) and {home['ResNet']} (ResNet). "
        "`python -m benchmarks.lorvp_digits` repeats it."
    )
    head = ["arm", "numbers in the prompt", *(f"{world}, {model}" for model, world in columns)]
    return markdown(head, cells) + "\n\n" + note


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["model"], run["world"], run["arm"], run["seed"]


def main() -> None:
    run_seeds(NAME, SEEDS, measure, table, key)


if __name__ == "__main__":
    main()
