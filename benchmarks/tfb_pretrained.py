"""How well Gemma 3 270M knows what it does not know about news: an over-fitted LoRA adapter before and after TFB, with temperature scaling beside it.

LoRA of rank 8 on the query and value projections learns 160 items of AG News, 40 of each of four classes, until it has them by heart: the class is the token after the text. 160 items of the test set judge it,
and 60 reviews of restaurants, which are no news, show whether the draws disagree more about what they have never seen. The anchor are 100 of the items it was trained on; a temperature is fitted on 100 others.

    python -m benchmarks.tfb_pretrained [--seeds 0 1 2]

Finished seeds are kept in the results file, so the script can be stopped and continued.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.common import markdown, run_seeds, spread
from hf_ext.demo.model import embedded_model
from hf_ext.metrics.calibration import auroc, evaluate_calibration, fit_temperature
from hf_ext.tuners.tfb import Predictive, bayesianize, predict

NAME, SEEDS, DATA = "tfb_pretrained", (0, 1, 2), Path(__file__).parent / "data" / "continual"
# The word that stands for a class is one token.
WORDS = {"World": " World", "Sports": " Sports", "Business": " Business", "Science or Technology": " Technology"}
CHARACTERS, EPOCHS, BATCH, RATE = 160, 8, 8, 5e-4
TRAINED, HELD_OUT, JUDGED, FAR, ANCHOR = 160, 100, 160, 60, 100
DRAWS, SEARCH_DRAWS, ITERATIONS = 10, 4, 8


def items(name: str, split: str, count: int, seed: int, skip: int = 0) -> list[dict[str, Any]]:
    """Items of a file, as many of each class."""
    with (DATA / f"{name}.jsonl").open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split]
    random.Random(seed).shuffle(rows)
    labels = sorted({row["label"] for row in rows})
    each, first = count // len(labels), skip // len(labels)
    by_class = [[row for row in rows if row["label"] == label][first : first + each] for label in labels]
    return [row for group in zip(*by_class, strict=True) for row in group]


class Reader:
    """Batches of a tokenizer, padded on the left, and classes as tokens."""

    def __init__(self, tokenizer: Any) -> None:
        tokenizer.padding_side = "left"
        self.tokenizer = tokenizer
        self.classes = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS.values()]

    def batches(self, rows: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        texts = [f"{row['text'][:CHARACTERS]}\nThe topic is" for row in rows]
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return [dict(self.tokenizer(part, return_tensors="pt", padding=True)) for part in parts]

    def labels(self, rows: list[dict[str, Any]]) -> Tensor:
        return torch.tensor([list(WORDS).index(row["label"]) for row in rows])


def fit(model: Any, reader: Reader, rows: list[dict[str, Any]], seed: int) -> None:
    order, base = random.Random(seed), model.get_base_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    model.train()
    for _ in range(EPOCHS):
        order.shuffle(rows)
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            # Of the vocabulary, four words alone.
            hidden = base.model(**reader.batches(part)[0]).last_hidden_state[:, -1]
            logits = (hidden @ base.lm_head.weight[reader.classes].mT).float()
            nn.functional.cross_entropy(logits, reader.labels(part)).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def outputs(model: Any, reader: Reader, rows: list[dict[str, Any]], draws: int, sigma: float) -> Predictive:
    return Predictive.join(
        [predict(model, batch, draws, classes=reader.classes, sigma=sigma) for batch in reader.batches(rows)]
    )


def judged(found: Predictive, labels: Tensor, held_out: tuple[Predictive, Tensor] | None) -> dict[str, float]:
    logits = found.log_mean_probs.double()
    if held_out is not None:
        logits = logits / fit_temperature(held_out[0].log_mean_probs, held_out[1])
    metrics = evaluate_calibration(logits.softmax(1), labels).metrics
    return {name: metrics[name] for name in ("accuracy", "ece", "nll", "brier", "auroc")}


def strangeness(near: Predictive, far: Predictive) -> float:
    """How well reviews are told from news: by mutual information, without draws by the largest probability."""

    def score(found: Predictive) -> Tensor:
        return found.mutual_information if len(found.logits) > 1 else 1 - found.mean_probs.max(1).values

    both = torch.cat([score(near), score(far)])
    return auroc(both, torch.arange(len(both)) >= len(score(near)))


def measure(seed: int) -> list[dict[str, Any]]:
    start = time.perf_counter()
    reader = Reader(AutoTokenizer.from_pretrained(embedded_model()))
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    model: Any = get_peft_model(
        base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    trained = items("agnews", "train", TRAINED, seed)
    held_out = items("agnews", "train", HELD_OUT, seed, skip=TRAINED)
    test, far = items("agnews", "test", JUDGED, seed), items("yelp", "test", FAR, seed)
    anchor = trained[:ANCHOR]
    fit(model, reader, list(trained), seed)
    found = bayesianize(
        model,
        reader.batches(anchor),
        classes=reader.classes,
        n_samples=SEARCH_DRAWS,
        sigma_bracket=(1e-3, 1.0),
        max_iters=ITERATIONS,
        seed=seed,
    )
    runs = []
    for name, draws, sigma in (("no noise", 1, 0.0), (f"TFB, {DRAWS} draws", DRAWS, found.sigma_q)):
        near, strange = outputs(model, reader, test, draws, sigma), outputs(model, reader, far, draws, sigma)
        shared = {"seed": seed, "sigma": sigma, "far": strangeness(near, strange)}
        others = outputs(model, reader, held_out, draws, sigma), reader.labels(held_out)
        for arm, beside in ((name, None), (f"{name}, temperature", others)):
            runs.append({"arm": arm, **shared, "scores": judged(near, reader.labels(test), beside)})
            print(runs[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    runs[0]["trials"] = [[trial.sigma, trial.change] for trial in found.search.trials]
    runs[0]["trained"] = judged(outputs(model, reader, anchor, 1, 0.0), reader.labels(anchor), None)["accuracy"]
    return runs


def table(runs: list[dict[str, Any]]) -> str:
    percent = {"accuracy": "accuracy", "ece": "ECE", "auroc": "AUROC of errors"}
    cells = []
    for arm in dict.fromkeys(run["arm"] for run in sorted(runs, key=lambda run: run["sigma"] > 0)):
        mine = [run for run in runs if run["arm"] == arm]
        sigma = sum(run["sigma"] for run in mine) / len(mine)
        scores = {name: [run["scores"][name] for run in mine] for name in mine[0]["scores"]}
        cells.append(
            [arm, f"{sigma:.3f}" if sigma else ""]
            + [spread([100 * value for value in scores[name]]) for name in percent]
            + [_two_digits(scores[name]) for name in ("nll", "brier")]
            + [spread([100 * run["far"] for run in mine])]
        )
    note = (
        f"{len({run['seed'] for run in runs})} seeds, mean and standard deviation; percent but for NLL and Brier. The base is in bfloat16, the adapter in float32; {JUDGED} items of AG News; reviews are told from them by mutual information, without draws by the largest "
        "probability. `python -m benchmarks.tfb_pretrained` repeats it."
    )
    head = ["predictions", "sigma", *percent.values(), "NLL", "Brier", "AUROC of reviews"]
    return markdown(head, cells) + "\n\n" + note


def _two_digits(values: list[float]) -> str:
    deviation = torch.tensor(values).std().item() if len(values) > 1 else 0.0
    return f"{sum(values) / len(values):.2f} ± {deviation:.2f}"


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["arm"], run["seed"]


def main() -> None:
    logging.set_verbosity_error()
    run_seeds(NAME, SEEDS, measure, table, key)


if __name__ == "__main__":
    main()
