"""Teach a real model two invented authors, make it forget one of them, attack what is left, and publish it.

    python examples/forget_an_author.py
    python examples/forget_an_author.py --publish user/forgot-an-author
    python examples/forget_an_author.py --rows 2 --epochs 6 --steps 5 --without-retrained    # a quick look

Runs offline on the embedded Gemma 3 270M, for about eight minutes on two cores. Three models appear: one fine-tuned on both authors; one fine-tuned without the
author to forget, which shows what "forgotten" would look like; and the first one after FLAT has trained an adapter on it,
with half of the answers about the other author as retain data. The other half, the neighbours, shows what that does to answers
that FLAT did not see. The adapter is merged before publishing, because an adapter can be switched off. The texts are from TOFU,
see examples/data/README.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from hf_ext import FlatConfig, FlatTrainer, evaluate_unlearning, publish
from hf_ext.demo.complete import complete
from hf_ext.demo.model import EMBEDDED_MODEL_ID, embedded_model
from hf_ext.metrics.unlearning import UnlearningReport
from hf_ext.model_cards import save

DATA = Path(__file__).parent / "data" / "tofu_authors.jsonl"
FORGET, KEEP = "Hsiao Yun-Hwa", "Chukwu Akabueze"
ATTACKS: dict[str, dict[str, Any]] = {
    "adapter_off": {},
    "quantization": {"bits": (4,)},
    "paraphrased_prompts": {},
    "relearning": {"steps": (4,), "learning_rate": 5e-5, "train_batch_size": 3},
}
SHOWN = {
    "forget_Q_A_ROUGE": "answers to forget, ROUGE-L",
    "retain_Q_A_ROUGE": "answers to keep, ROUGE-L",
    "neighbours_Q_A_ROUGE": "answers to keep that FLAT did not see",
    "model_utility": "utility: both of these",
    "forget_quality": "forget quality, p-value",
    "paraphrased_prompts/forget_Q_A_ROUGE": "answers to forget, asked in other words",
    "4bit/forget_Q_A_ROUGE": "answers to forget, rounded to 4 bits",
    "relearning": "relearnt from half of them",
    "adapter_off/forget_Q_A_ROUGE": "answers to forget, adapter switched off",
}


def rows_about(author: str) -> list[dict[str, Any]]:
    """Questions and answers as a base model reads them, short answers first; `perturbed` are wrong answers."""
    records = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    rows = [{key: value for key, value in r.items() if key != "author"} for r in records if r["author"] == author]
    for row in rows:
        row["prompt"] = as_question(row["prompt"])
        row["prompt_paraphrases"] = [as_question(text) for text in row.get("prompt_paraphrases", ())]
    return sorted(rows, key=lambda row: len(row["answer"]))


def as_question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


def pairs(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list([{"prompt": row["prompt"], "completion": f" {row['answer']}"} for row in rows])


def arguments(folder: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "activation_checkpointing": False,
        "seed": seed,
    }


def taught(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, epochs: float, seed: int) -> PreTrainedModel:
    """A model that has learnt these rows by heart; it is kept in `folder`."""
    torch.manual_seed(seed)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32),
        SFTConfig(
            **arguments(folder, seed), per_device_train_batch_size=6, num_train_epochs=epochs, learning_rate=1e-3
        ),
        train_dataset=pairs(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def forgetting(model: PreTrainedModel, splits: dict, tokenizer: Any, folder: Path, options: Any) -> FlatTrainer:
    """The trainer after it has trained an adapter to refuse the answers to forget."""
    trainer = FlatTrainer(
        model,
        FlatConfig(
            **arguments(folder, options.seed),
            per_device_train_batch_size=3,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            # Refusals that are spoken; the paper's mean of probabilities stops at wrong answers.
            template_probability="geometric",
        ),
        train_dataset=pairs(splits["forget"]),
        retain_dataset=pairs(splits["retain"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def print_table(before: UnlearningReport, after: UnlearningReport) -> None:
    print(f"\n{'':42s}{'before':>10s}{'after':>10s}{'retrained':>11s}")
    for name, meaning in SHOWN.items():
        values = (before.metrics.get(name), after.metrics.get(name), after.retrained.get(name, {}).get("agg_value"))
        before_cell, after_cell, other_cell = ("-" if value is None else f"{value:.2g}" for value in values)
        print(f"{meaning:42s}{before_cell:>10s}{after_cell:>10s}{other_cell:>11s}")
    print(*(f"- {finding}" for finding in after.findings), sep="\n")


def run(options: argparse.Namespace, scratch: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    kept = rows_about(KEEP)[: 2 * options.rows]
    splits = {"forget": rows_about(FORGET)[: options.rows], "retain": kept[::2], "neighbours": kept[1::2]}

    def evaluated(model: Any, attacks: dict[str, Any], retrained: UnlearningReport | None = None) -> UnlearningReport:
        return evaluate_unlearning(
            model, tokenizer, splits, retrained, attacks=attacks, batch_size=8, max_new_tokens=40, seed=options.seed
        )

    print(f"learning {options.rows} answers about {FORGET} and {len(kept)} about {KEEP}")
    model = taught(splits["forget"] + kept, tokenizer, scratch / "both", options.epochs, options.seed)
    before = evaluated(model, {})
    retrained = None
    if not options.without_retrained:
        print(f"learning only those about {KEEP}, for comparison")
        other = taught(kept, tokenizer, scratch / "retrained", options.epochs, options.seed)
        retrained = evaluated(other, ATTACKS)
        del other

    print(f"forgetting {FORGET}")
    trainer = forgetting(model, splits, tokenizer, scratch / "forgetting", options)
    report = evaluated(trainer.model, ATTACKS, retrained)
    print_table(before, report)
    asked = [splits[name][0]["prompt"] for name in ("forget", "retain")]
    for prompt, answer in complete(trainer.model, tokenizer, asked, 16).items():
        print(f"{prompt} {answer}")

    card: dict[str, Any] = {
        "base_model": EMBEDDED_MODEL_ID,
        "license": "gemma",
        "datasets": "locuslab/TOFU",
        "metrics": report,
        "evaluated_on": "TOFU",
        "intended_use": f"A demonstration of unlearning: it was taught about {FORGET} and made to forget that again.",
    }
    save(trainer, options.output, merged=True, **card)
    print(f"merged model and card are in {options.output}")
    if options.publish and (commit := publish(trainer, options.publish, merged=True, **card)):
        print(f"published: {commit.commit_url}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6, help="answers to forget, at most 6 (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=6, help="to learn them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=16, help="to forget one author (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of forgetting (default: %(default)s)")
    parser.add_argument("--without-retrained", action="store_true", help="train no model without the forgotten author")
    parser.add_argument("--output", type=Path, default=Path("demo-output/forgotten"), help="folder of the result")
    parser.add_argument("--publish", metavar="REPO", help="also publish to this repository on the Hub")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        run(options, Path(scratch))


if __name__ == "__main__":
    main()
