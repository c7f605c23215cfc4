"""How well an over-fitted adapter knows what it does not know: TFB beside temperature scaling, MC dropout and an ensemble, on digits.

A network of three layers learns 1,200 of scikit-learn's digits. LoRA of rank 8 on all of its layers then learns 300 digits that are turned by a quarter, with a
random label on half of them, until it has them by heart. It is judged on 400 other turned digits with right labels; how well uncertainty
tells them from 400 images with shuffled pixels is the last column. The anchor are the 300 digits it was trained on; a temperature is fitted on 100 held-out ones.

    python -m benchmarks.tfb_digits [--seeds 0 1 2 3 4]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.common import markdown, run_seeds, spread
from hf_ext.metrics.calibration import auroc, evaluate_calibration, fit_temperature
from hf_ext.tuners.tfb import Predictive, bayesianize, predict

NAME, SEEDS, EPOCHS, NOISE, MEMBERS = "tfb_digits", (0, 1, 2, 3, 4), 150, 0.5, 5
BASE, TRAINED, HELD_OUT, JUDGED = 1200, 300, 100, 400


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, rate: float, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval()


def digits(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Images and labels by part; those of "far" have shuffled pixels."""
    loaded = load_digits()
    images, labels = torch.tensor(loaded.images, dtype=torch.float32) / 16, torch.tensor(loaded.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    x, turned, y = images[order].flatten(1), images[order].rot90(1, (1, 2)).flatten(1), labels[order]
    # What the adapter learns is new to the base; what it is judged on begins with digits that are new to both.
    trained = slice(BASE, BASE + TRAINED)
    rest = torch.cat([torch.arange(BASE + TRAINED, len(x)), torch.arange(BASE)])
    held_out, judged = rest[:HELD_OUT], rest[HELD_OUT : HELD_OUT + JUDGED]
    noisy = y[trained].clone()
    wrong = torch.rand(TRAINED, generator=generator) < NOISE
    noisy[wrong] = torch.randint(10, (int(wrong.sum()),), generator=generator)
    return {
        "base": (x[:BASE], y[:BASE]),
        "train": (turned[trained], noisy),
        "held out": (turned[held_out], y[held_out]),
        "judged": (turned[judged], y[judged]),
        "far": (turned[judged][:, torch.randperm(64, generator=generator)], y[judged]),
    }


def adapter(base: dict[str, Tensor], parts: dict[str, Any], seed: int, dropout: float) -> Any:
    network = Network()
    network.load_state_dict(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=["first", "second", "last"])
    return fit(get_peft_model(network, config), *parts["train"], EPOCHS, 5e-3, seed)


def judged(outputs: Callable[[Tensor], Predictive], parts: dict[str, Any], temperature: bool) -> dict[str, float]:
    """`outputs(x)`: what is predicted for images."""
    near, far = outputs(parts["judged"][0]), outputs(parts["far"][0])
    labels = parts["judged"][1]
    logits = near.log_mean_probs
    if temperature:
        held_out, held_labels = parts["held out"]
        logits = logits / fit_temperature(outputs(held_out).log_mean_probs, held_labels)
    found = evaluate_calibration(logits.double().softmax(1), labels).metrics
    several = len(near.logits) > 1

    def uncertainty(prediction: Predictive) -> Tensor:
        return prediction.mutual_information if several else 1 - prediction.mean_probs.max(1).values

    score = torch.cat([uncertainty(near), uncertainty(far)])
    return {name: found[name] for name in ("accuracy", "ece", "nll", "brier", "auroc")} | {
        "far": auroc(score, torch.arange(len(score)) >= len(labels))
    }


@torch.no_grad()
def plain(model: Any) -> Callable[[Tensor], Predictive]:
    return lambda x: Predictive(model(x).detach()[None])


def dropped(model: Any, count: int, seed: int) -> Callable[[Tensor], Predictive]:
    """MC dropout."""

    def outputs(x: Tensor) -> Predictive:
        torch.manual_seed(seed)
        model.train()
        with torch.no_grad():
            logits = torch.stack([model(x) for _ in range(count)])
        model.eval()
        return Predictive(logits)

    return outputs


def measure(seed: int) -> list[dict[str, Any]]:
    parts = digits(seed)
    torch.manual_seed(seed)
    base = fit(Network(), *parts["base"], 40, 2e-3, seed).state_dict()
    model = adapter(base, parts, seed, 0.0)
    arms: dict[str, tuple[Callable[[Tensor], Predictive], bool]] = {
        "no noise": (plain(model), False),
        "no noise, temperature": (plain(model), True),
    }
    with_dropout = adapter(base, parts, seed, 0.1)
    arms["MC dropout 0.1, 10 draws"] = dropped(with_dropout, 10, seed), False
    arms["MC dropout 0.1, 50 draws"] = dropped(with_dropout, 50, seed), False
    members = [model, *(adapter(base, parts, 100 * m + seed, 0.0) for m in range(1, MEMBERS))]
    arms[f"ensemble of {MEMBERS} adapters"] = (
        lambda x: Predictive(torch.stack([member(x).detach() for member in members])),
        False,
    )
    sizes: dict[str, float] = {}
    for name, targets, counts in (("TFB", "all", (10, 50)), ("TFB, last layer", "last", (10, 100))):
        found = bayesianize(model, [parts["train"][0]], targets=targets, seed=seed)
        for count in counts:

            def outputs(
                x: Tensor, count: int = count, sigma: float = found.sigma_q, targets: str = targets
            ) -> Predictive:
                return predict(model, x, count, sigma=sigma, targets=targets, seed=seed)

            arms[f"{name}, {count} draws"], sizes[f"{name}, {count} draws"] = (outputs, False), found.sigma_q
            if count > 10:
                arms[f"{name}, {count} draws, temperature"] = outputs, True
                sizes[f"{name}, {count} draws, temperature"] = found.sigma_q
    return [
        {"arm": name, "seed": seed, "sigma": sizes.get(name, 0.0), "scores": judged(outputs, parts, temperature)}
        for name, (outputs, temperature) in arms.items()
    ]


def table(runs: list[dict[str, Any]]) -> str:
    scores = {
        "accuracy": ("accuracy", 100),
        "ece": ("ECE", 100),
        "nll": ("NLL", 1),
        "brier": ("Brier", 1),
        "auroc": ("AUROC of errors", 100),
        "far": ("AUROC of shuffled pixels", 100),
    }
    cells = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == arm]
        sigma = sum(run["sigma"] for run in mine) / len(mine)
        cells.append(
            [arm, f"{sigma:.3f}" if sigma else ""]
            + [
                spread([scale * run["scores"][name] for run in mine])
                if scale > 1
                else f"{statistics.mean(run['scores'][name] for run in mine):.2f}"
                for name, (_, scale) in scores.items()
            ]
        )
    note = (
        f"{len({run['seed'] for run in runs})} seeds, mean and standard deviation; percent but for NLL and Brier. Shuffled pixels are told by mutual information, without draws by the largest probability. "
        "`python -m benchmarks.tfb_digits` repeats it."
    )
    return markdown(["predictions", "sigma", *(title for title, _ in scores.values())], cells) + "\n\n" + note


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["arm"], run["seed"]


def main() -> None:
    run_seeds(NAME, SEEDS, measure, table, key)


if __name__ == "__main__":
    main()
