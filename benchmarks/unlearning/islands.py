"""What small models keep when they are made to forget eight islands, and how soon the islands come back.

Without retain data, every loss is trained until fewer than a tenth of the forget answers are right; retain accuracy is read where the forget accuracy passes a
half and a tenth, so that methods are compared at equal forgetting and not at equal speed. The first seed tries three learning rates, the others the best one
and 1e-4. How much is kept depends on the model that was trained, so nine more seeds run the losses that are compared most often. With retain data, every loss is trained for
a number of steps; then refusals, paraphrased questions, truth ratios, relearning and rounding are measured. "refusal SFT" is `trl.SFTTrainer` on the refusals,
"reverse KL, sign of the authors' code" is its descent on the negated loss.

    python -m benchmarks.unlearning.islands [--seeds 0 1 2] [--more-seeds 3 4 5 6 7 8 9 10 11]

Finished runs are kept in the results file, so the script can be stopped and continued, and several processes can share the seeds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.trainer_utils import set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from benchmarks.common import add_stored, markdown, stored_runs, write
from benchmarks.unlearning.world import accuracy, fit, refusal_rate, refusals, rows, tokenizer, trained_model
from hf_ext.metrics.unlearning import answer_scores, forget_quality, quantized_copy
from hf_ext.metrics.unlearning.measures import log_truth_ratio
from hf_ext.trainers.flat import UnlearnConfig, UnlearnTrainer

NAME = "unlearning_islands"
BATCH, EVERY, MOST_STEPS = 16, 8, 320
LEVELS = (0.5, 0.1)
FIRST, COMMON = 0, 1e-4  # the seed that chooses the learning rates, and the rate that every seed tries
RELEARN_STEPS, RELEARN_RATE = (8, 16), 3e-4
KNOWN, KEPT = ("forget", "retain", "world", "unknown"), ("retain", "world", "unknown")


@dataclass(frozen=True)
class Arm:
    """One way to unlearn; `options` are fields of `UnlearnConfig`."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4
    steps: int = MOST_STEPS
    retain: bool = False


FLAT = {
    f"FLAT {name}": {"divergence": name}
    for name in ("kl", "js", "tv", "pearson", "jeffrey", "reverse_kl", "squared_hellinger", "neyman")
}
BASELINES: dict[str, dict[str, Any]] = {
    "gradient ascent": {"loss_type": "gradient_ascent"},
    "NPO": {"loss_type": "npo"},
    "SimNPO": {"loss_type": "simnpo"},
    "WGA": {"loss_type": "wga"},
    "SatImp": {"loss_type": "satimp"},
    "UNDIAL": {"loss_type": "undial"},
    "CE-U": {"loss_type": "ceu"},
    "DPO, refusals": {"loss_type": "idk_dpo"},
    "RMU": {"loss_type": "rmu", "loss_kwargs": {"layer": 0, "coefficient": 20.0}},
    "refusal SFT": {},
}
WRONG_SIGN = "reverse KL, sign of the authors' code"
RATES = (5e-5, 1e-4, 2e-4)

WITHOUT_RETAIN = [Arm(name, options, rate) for name, options in (FLAT | BASELINES).items() for rate in RATES]
WITHOUT_RETAIN.append(Arm(WRONG_SIGN, {"divergence": "reverse_kl"}, 1e-4, 240))

SEEDS, MORE_SEEDS = [0, 1, 2], list(range(3, 12))
COMPARED, PEER = ("FLAT kl", "FLAT js", "FLAT tv", "WGA", "NPO"), "gradient ascent"

PAPER = {"retain_coef": 1.0}
GEOMETRIC = PAPER | {"template_probability": "geometric"}
WITH_RETAIN = [
    *(Arm("FLAT, mean / mean", PAPER, rate, 128, True) for rate in (1e-4, 2e-4, 5e-4, 1e-3)),
    Arm("FLAT, mean / mean", PAPER, 2e-4, 256, True),
    *(Arm("FLAT, geometric / mean", GEOMETRIC, 2e-4, steps, True) for steps in (128, 256)),
    Arm("FLAT, geometric / mean", GEOMETRIC, 1e-4, 128, True),
    Arm("FLAT, geometric / geometric", GEOMETRIC | {"forget_probability": "geometric"}, 1e-4, 128, True),
    *(
        Arm(name, options if name == "refusal SFT" else options | PAPER, rate, 128, True)
        for name, options in BASELINES.items()
        for rate in (1e-4, 2e-4)
    ),
]
REFERENCES = [Arm(name, retain=True, steps=0) for name in ("before unlearning", "retrained", "retrained, other seed")]


class Watch(TrainerCallback):
    """Accuracies along the run; stops it below the last of `LEVELS`."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.read(state.global_step, model)
            control.should_training_stop |= self.curve[-1]["forget"] < LEVELS[-1]

    def read(self, step: int, model: LlamaForCausalLM) -> None:
        self.curve.append({"step": step} | {split: accuracy(model, rows(split)) for split in KNOWN[:3]})


class WrongSign(UnlearnTrainer):
    """Climbs the loss, as a loss of the opposite sign would."""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        return -super()._compute_loss(model, inputs, return_outputs)


def pairs(split: str) -> list[dict[str, str]]:
    return [{"prompt": r["question"], "completion": " " + r["answer"]} for r in rows(split)]


def refusal_pairs(retain: bool, seed: int) -> list[dict[str, str]]:
    """Every question to forget with five refusals, and as many retain rows if there are any."""
    draw = random.Random(seed)
    chosen = [draw.sample(refusals(), 5) for _ in rows("forget")]
    found = [
        {"prompt": r["question"], "completion": " " + refusal}
        for r, own in zip(rows("forget"), chosen, strict=True)
        for refusal in own
    ]
    return found + pairs("retain") if retain else found


def unlearn(model: LlamaForCausalLM, arm: Arm, seed: int, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train the model in place."""
    shared: dict[str, Any] = {
        "learning_rate": arm.learning_rate,
        "max_steps": arm.steps,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 4,
        "max_grad_norm": 1.0,
        "weight_decay": 0.01,
        "per_device_train_batch_size": BATCH,
        "max_length": 64,
        "activation_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": seed,
    }
    with tempfile.TemporaryDirectory() as scratch:
        if arm.name == "refusal SFT":
            data = Dataset.from_list(refusal_pairs(arm.retain, seed))
            shared["per_device_train_batch_size"] *= 2 if arm.retain else 1
            trainer: Any = SFTTrainer(
                model,
                SFTConfig(scratch, **shared),
                train_dataset=data,
                processing_class=tokenizer(),
                callbacks=list(callbacks),
            )
        else:
            options = dict(arm.options)
            if options.get("loss_type", "flat") in ("flat", "idk_dpo"):
                options |= {"template_answers": refusals(), "templates_per_example": len(refusals())}
            trainer = (WrongSign if arm.name == WRONG_SIGN else UnlearnTrainer)(
                model,
                UnlearnConfig(scratch, **shared, **options),
                train_dataset=Dataset.from_list(pairs("forget")),
                retain_dataset=Dataset.from_list(pairs("retain")) if arm.retain else None,
                processing_class=tokenizer(),
                callbacks=list(callbacks),
            )
        trainer.train()


def at_level(curve: Sequence[dict[str, float]], level: float, split: str) -> float | None:
    """Accuracy on `split` where that on the forget rows falls through `level`, between two readings; None if it never does."""
    for before, after in itertools.pairwise(curve):
        if after["forget"] <= level < before["forget"]:
            share = (before["forget"] - level) / (before["forget"] - after["forget"])
            return before[split] + share * (after[split] - before[split])
    return None


def log_ratios(model: LlamaForCausalLM) -> Any:
    """Logarithms of the truth ratios of the forget rows."""
    records = [
        {"prompt": r["question"], "answer": r["answer"], "perturbed": r["perturbed_answers"]} for r in rows("forget")
    ]
    scores = answer_scores(model, tokenizer(), records, batch_size=64)
    return log_truth_ratio([s.correct_nll for s in scores], [[p.nll for p in s.perturbed] for s in scores])


def measures_of(model: LlamaForCausalLM, retrained: LlamaForCausalLM) -> dict[str, float]:
    """Everything that is read of an unlearned model."""
    forget, half = rows("forget"), len(rows("forget")) // 2
    found = {split: accuracy(model, rows(split)) for split in KNOWN[:3]}
    found["paraphrased questions, forget"] = accuracy(model, forget, "question_paraphrase")
    found["paraphrased questions, retain"] = accuracy(model, rows("retain"), "question_paraphrase")
    found |= {f"refusals, {split}": refusal_rate(model, rows(split)) for split in KNOWN[:2]}
    found["forget quality"] = forget_quality(log_ratios(model), log_ratios(retrained)).p_value
    with quantized_copy(model, 4):
        found["forget, 4 bits"] = accuracy(model, forget)
    for steps in RELEARN_STEPS:
        attacked = copy.deepcopy(model)
        fit(attacked, [(r["question"], r["answer"]) for r in forget[:half]], steps, RELEARN_RATE, BATCH)
        found[f"relearnt after {steps}"] = accuracy(attacked, forget[half:])
    return found


def run(arm: Arm, seed: int, full: LlamaForCausalLM, retrained: LlamaForCausalLM | None) -> dict[str, Any]:
    """One run and what it showed; those with retain data are compared with the retrained model."""
    started, model = time.perf_counter(), copy.deepcopy(full)
    set_seed(seed)
    result: dict[str, Any] = {"arm": asdict(arm), "seed": seed}
    if retrained is not None and arm.retain:
        unlearn(model, arm, seed)
        # TRL binds the forward to the model it trained, so that copies of that model would run its weights.
        plain = copy.deepcopy(full)
        plain.load_state_dict(model.state_dict())
        result["measures"] = measures_of(plain, retrained)
    else:
        watch = Watch()
        watch.read(0, model)
        unlearn(model, arm, seed, [watch])
        result["curve"] = watch.curve
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def references(seed: int, full: LlamaForCausalLM, retrained: LlamaForCausalLM) -> Iterator[dict[str, Any]]:
    """What the models before unlearning and without the forget rows show; a second retrained one gives the noise of the test."""
    models = (full, retrained, trained_model(KEPT, seed + 100))
    for arm, model in zip(REFERENCES, models, strict=True):
        yield {"arm": asdict(arm), "seed": seed, "measures": measures_of(model, retrained)}


# -- The results file -------------------------------------------------------------------------------------------------


def key(run: dict[str, Any]) -> list[Any]:
    return [run["seed"], run["arm"]]


def save(runs: list[dict[str, Any]]) -> None:
    add_stored(NAME, runs, key)
    write(NAME, {"command": "python -m benchmarks.unlearning.islands", "runs": runs, "table": table(runs)})


def arms_of(runs: Sequence[dict[str, Any]], retain: bool) -> dict[tuple[str, float, int], list[dict[str, Any]]]:
    """Runs by name, learning rate and steps."""
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for one in runs:
        arm = one["arm"]
        if arm["retain"] == retain:
            found.setdefault((arm["name"], arm["learning_rate"], arm["steps"]), []).append(one)
    return found


def spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation; "never" if a run has no value."""
    if any(value is None for value in values):
        return "never"
    numbers = [value for value in values if value is not None]
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.2f} ± {deviation:.2f}"


def kept_at(curves: Sequence[Sequence[dict[str, float]]]) -> tuple[float, ...]:
    """Mean retain accuracy at each of `LEVELS`, the last first; -1 at a level that a run does not reach. Larger is better."""
    found = []
    for level in reversed(LEVELS):
        values = [at_level(curve, level, "retain") for curve in curves]
        found.append(-1.0 if None in values else statistics.mean(v for v in values if v is not None))
    return tuple(found)


def best_rates(runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The best learning rate of every method without retain data, with the first seed."""
    ranks: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    for one in runs:
        if "curve" in one and one["seed"] == FIRST:
            rank = (kept_at([one["curve"]]), one["arm"]["learning_rate"])
            ranks.setdefault(one["arm"]["name"], []).append(rank)
    return {name: max(found)[1] for name, found in ranks.items()}


def level_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Every method without retain data at 1e-4 and at its best learning rate; the method that keeps most first."""
    rates, ranked = best_rates(runs), []
    for (name, rate, _), group in arms_of(runs, retain=False).items():
        if rate not in (COMMON, rates.get(name)):
            continue
        curves = [one["curve"] for one in group]
        cells = [spread([at_level(curve, level, "retain") for curve in curves]) for level in LEVELS]
        cells.append(spread([at_level(curve, LEVELS[-1], "world") for curve in curves]))
        cells.append(f"{statistics.mean(min(point['forget'] for point in curve) for curve in curves):.2f}")
        cells.append(f"{statistics.mean(curve[-1]['step'] for curve in curves):.0f}")
        ranked.append((kept_at(curves), [name, f"{rate:g}", *cells]))
    return [row for _, row in sorted(ranked, reverse=True)]


def compared_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the compared losses keep beyond the peer with the same model, over all seeds."""
    curves = {
        (one["arm"]["name"], one["seed"]): one["curve"]
        for one in runs
        if "curve" in one and one["arm"]["learning_rate"] == COMMON
    }
    seeds = [seed for seed in (*SEEDS, *MORE_SEEDS) if all((name, seed) in curves for name in (*COMPARED, PEER))]
    found = []
    for name in (*COMPARED, PEER):
        cells = [name]
        for level in LEVELS:
            own, peer = ([at_level(curves[n, seed], level, "retain") for seed in seeds] for n in (name, PEER))
            more = [a - b for a, b in zip(own, peer, strict=True) if a is not None and b is not None]
            cells.append(spread(own))
            if name != PEER and len(more) == len(seeds) > 1:
                error = statistics.stdev(more) / len(more) ** 0.5
                cells.append(f"{statistics.mean(more):+.2f} ± {error:.2f} ({sum(x > 0 for x in more)})")
            else:
                cells.append("")
        cells.append(spread([at_level(curves[name, seed], LEVELS[-1], "world") for seed in seeds]))
        found.append(cells)
    return found


def measure_rows(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    found = []
    arms = arms_of(runs, retain=True)
    for name, rate, steps in sorted(arms, key=lambda arm: (arm[2] > 0, arm)):
        group = arms[name, rate, steps]
        columns = {column: [one["measures"][column] for one in group] for column in SHOWN}
        quality = statistics.median(one["measures"]["forget quality"] for one in group)
        setting = f"{rate:g} × {steps}" if steps else ""
        found.append([name, setting, *(spread(values) for values in columns.values()), f"{quality:.0e}"])
    return found


SHOWN = {
    "forget": "forget",
    "retain": "retain",
    "world": "world",
    "refusals, forget": "refusals on forget",
    "refusals, retain": "on retain",
    "paraphrased questions, forget": "forget, paraphrased",
    "relearnt after 8": "relearnt, 8 steps",
    "relearnt after 16": "16 steps",
    "forget, 4 bits": "forget, 4 bits",
}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """All three tables; the first needs the runs of every compared loss."""
    whole = [one for one in runs if one["seed"] in SEEDS]
    at_each = [f"retain at forget {level}" for level in LEVELS]
    head = ["without retain data", *(cell for name in at_each for cell in (name, f"beyond {PEER}"))]
    compared = markdown([*head, f"world at {LEVELS[-1]}"], compared_rows(runs))
    head = ["without retain data", "lr", *at_each, f"world at {LEVELS[-1]}", "lowest forget", "steps"]
    levels = markdown(head, level_rows(whole))
    measured = markdown(["with retain data", "lr × steps", *SHOWN.values(), "forget quality"], measure_rows(whole))
    return "\n\n".join([compared, NOTES[0], levels, NOTES[1], measured, NOTES[2]])


NOTES = (
    f"Accuracies of greedy answers with the learning rate {COMMON:g}: mean ± standard deviation over {len(SEEDS) + len(MORE_SEEDS)} seeds (other models, other orders); beyond "
    f"{PEER} with the same model: mean ± standard error, and in how many seeds it is more.",
    f"The same for all losses, {len(SEEDS)} seeds, with the learning rate {COMMON:g} and the one of {', '.join(f'{rate:g}' for rate in RATES)} that kept most with the "
    f"first seed; 'never' is a level that a seed did not reach within {MOST_STEPS} steps.",
    f"{len(SEEDS)} seeds. Relearning is the accuracy on one half of the forget rows after plain training on the other half, and forget quality the median p-value of "
    "truth ratios against those of the retrained model. `python -m benchmarks.unlearning.islands` repeats all three.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--more-seeds", type=int, nargs="*", default=MORE_SEEDS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    disable_progress_bar()
    runs = stored_runs(NAME)
    for seed in [*options.seeds, *options.more_seeds]:
        done, rates = [key(one) for one in runs], best_rates(runs)
        if seed in options.seeds:
            arms = [a for a in WITHOUT_RETAIN if seed == FIRST or a.learning_rate in (COMMON, rates.get(a.name))]
            arms += WITH_RETAIN
        else:
            arms = [a for a in WITHOUT_RETAIN if a.learning_rate == COMMON and a.name in (*COMPARED, PEER)]
        todo = [arm for arm in arms if key({"arm": asdict(arm), "seed": seed}) not in done]
        if not todo:
            continue
        full = trained_model(KNOWN, seed)
        retrained = trained_model(KEPT, seed) if any(arm.retain for arm in todo) else None
        if retrained is not None and key({"arm": asdict(REFERENCES[0]), "seed": seed}) not in done:
            report(runs, list(references(seed, full, retrained)))
        for arm in todo:
            report(runs, [run(arm, seed, full, retrained)])
    print(table(runs))


def report(runs: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    for one in new:
        arm, seen = one["arm"], one["measures"] if "measures" in one else one["curve"][-1]
        shown = " ".join(f"{name}={value:.3g}" for name, value in seen.items())
        print(f"seed {one['seed']} {arm['name']} {arm['learning_rate']:g}: {shown}", flush=True)
        runs.append(one)
    save(runs)


if __name__ == "__main__":
    main()
