"""Twenty facts at once into Gemma 3 270M: LoRA and RoseLoRA, each with cross-entropy, stopped cross-entropy and OVERTONE.

Every arm is swept over three learning rates of its tuner, with three seeds that choose other facts and other initial weights. An arm's
row is its learning rate with the best locality among those with a mean reliability of at least 0.95 (or the most reliable
one if none reaches that). Finished runs are kept in the results file, so the script can be stopped and continued, and several processes can share the
work (with one thread each they are faster than one with all).

    python -m benchmarks.editing [--seeds 0 1 2] [--tuners lora roselora] [--losses ce ce_stop overtone]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from benchmarks.common import RESULTS, markdown, write
from hf_ext.demo.model import embedded_model
from hf_ext.demo.recipes import EditRecipe, edit
from hf_ext.demo.run import DRIFT_TEXTS
from hf_ext.metrics.editing import EditRecord, KnowledgeEditingEvaluator, load_edits
from hf_ext.tuners.roselora import density_report

NAME, DATA = "editing", Path(__file__).parent / "data" / "qaedit.jsonl"
EDITS, LOSSES, TUNERS = 20, ("ce", "ce_stop", "overtone"), ("lora", "roselora")
PROTOCOLS = ("teacher_forced_token", "generate_contains")
BASE = EditRecipe()
# RoseLoRA trains a tenth of the entries and needs larger steps.
RATES = {"lora": (2e-4, 5e-4, 1e-3), "roselora": (5e-4, 1e-3, 2e-3)}
SHOWN = {
    "reliability": "reliability/teacher_forced_token",
    "reliability (decoded)": "reliability/generate_contains",
    "generality": "generality/teacher_forced_token",
    "locality": "locality/teacher_forced_token",
    "KL drift, texts": "drift/text_kl",
    "KL drift, unrelated": "drift/locality_kl",
}


def records_of(seed: int) -> list[EditRecord]:
    """The twenty edits of a seed, each with a rephrasing and three unrelated questions."""
    return load_edits(DATA)[seed * EDITS : (seed + 1) * EDITS]


def run(recipe: EditRecipe, seed: int, evaluator: KnowledgeEditingEvaluator, reference: Any, tokenizer: Any) -> dict:
    """One edit run; the evaluator's model is as before afterwards."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = edit(evaluator.model, tokenizer, evaluator.records, recipe, scratch, seed)
    seconds = time.perf_counter() - started
    metrics = evaluator.evaluate(reference).metrics
    density = density_report(trainer.model).density
    steps = trainer.state.global_step
    trainer.model.unload()
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        "steps": steps,
        "seconds": seconds,
        "changed": density,
        "metrics": {name: value for name, value in metrics.items() if not name.startswith("before/")},
    }


def stored() -> list[dict[str, Any]]:
    """Runs in the results file."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["runs"] if path.exists() else []


def _key(run: dict[str, Any]) -> list[Any]:
    return [run["seed"], json.loads(json.dumps(run["recipe"]))]


def summary(runs: list[dict[str, Any]]) -> str:
    """The table: one row per arm, mean (and standard deviation over seeds) at its chosen learning rate."""
    rows = []
    for tuner in TUNERS:
        for loss in LOSSES:
            arm = [r for r in runs if (r["recipe"]["tuner"], r["recipe"]["loss"]) == (tuner, loss)]
            rates = sorted({r["recipe"]["learning_rate"] for r in arm})
            if not rates:
                continue
            rate = max(rates, key=lambda x: _merit([r for r in arm if r["recipe"]["learning_rate"] == x]))
            chosen = [r for r in arm if r["recipe"]["learning_rate"] == rate]
            cells = [_spread([r["metrics"][key] for r in chosen]) for key in SHOWN.values()]
            changed = f"{statistics.mean(r['changed'] for r in chosen):.1%}"
            steps = f"{statistics.mean(r['steps'] for r in chosen):.0f}"
            rows.append([tuner, loss, f"{rate:g}", *cells, changed, steps])
    return markdown(["tuner", "loss", "lr", *SHOWN, "changed entries", "steps"], rows)


def _merit(runs: list[dict[str, Any]]) -> tuple[bool, float]:
    reliability = statistics.mean(r["metrics"][SHOWN["reliability"]] for r in runs)
    locality = statistics.mean(r["metrics"][SHOWN["locality"]] for r in runs)
    return (True, locality) if reliability >= 0.95 else (False, reliability)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuners", nargs="+", default=TUNERS, choices=TUNERS)
    parser.add_argument("--losses", nargs="+", default=LOSSES, choices=LOSSES)
    options = parser.parse_args()
    logging.set_verbosity_error()
    runs = stored()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    for seed in options.seeds:
        model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32)
        texts = DRIFT_TEXTS.read_text(encoding="utf-8").splitlines()
        evaluator = KnowledgeEditingEvaluator(
            model, tokenizer, records_of(seed), protocols=PROTOCOLS, drift_texts=texts, max_new_tokens=5, batch_size=32
        )
        reference = None
        for tuner in options.tuners:
            for loss in options.losses:
                for rate in RATES[tuner]:
                    recipe = replace(BASE, tuner=tuner, loss=loss, learning_rate=rate)
                    if _key({"seed": seed, "recipe": asdict(recipe)}) in map(_key, runs):
                        continue
                    reference = reference or evaluator.predict()
                    runs.append(run(recipe, seed, evaluator, reference, tokenizer))
                    last = runs[-1]
                    shown = " ".join(f"{name}={last['metrics'][key]:.3f}" for name, key in SHOWN.items())
                    print(f"seed {seed} {tuner} {loss} {rate:g}: {shown} {last['steps']} steps", flush=True)
                    save(runs)
    print(summary(runs))


def save(runs: list[dict[str, Any]]) -> None:
    """Write all runs, with those that another process has added meanwhile."""
    known = [_key(r) for r in runs]
    runs.extend(r for r in stored() if _key(r) not in known)
    runs.sort(key=lambda r: json.dumps(_key(r)))
    seeds = len({r["seed"] for r in runs})
    note = (
        f"{EDITS} QAEdit edits in one batch, {seeds} seeds (mean ± standard deviation), Gemma 3 270M, rank "
        f"{BASE.rank}, {', '.join(BASE.target_modules)} of layers 1 to 7. Each arm is at its best of {len(RATES['lora'])} "
        "learning rates: the best locality at a mean reliability of 0.95 or more. Reliability, generality and locality are "
        "teacher-forced token accuracies, 'decoded' is greedy decoding that contains the answer; locality is the share of "
        "unchanged answer tokens on unrelated questions; drift is KL(before || after) in nats per token. "
        "`python -m benchmarks.editing` repeats it."
    )
    write(NAME, {"command": "python -m benchmarks.editing", "runs": runs, "table": f"{summary(runs)}\n\n{note}"})


if __name__ == "__main__":
    main()
