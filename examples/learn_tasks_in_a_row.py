"""Teach a model the numbers and colours of three languages, one language after another, and see what is left of the first.

    python examples/learn_tasks_in_a_row.py

Adaptive SVD protects what the pretrained model and the earlier languages put into the large singular directions of the weights; plain
fine-tuning runs beside it. Both task matrices are printed, heat maps are drawn, and the model is saved with its card. About ten minutes on
two cores; `--quick` takes two steps per language and proves nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_ext import AdaptiveSVDConfig, AdaptiveSVDTrainer, ContinualTask, TaskSequenceTrainer
from hf_ext.demo.model import embedded_model
from hf_ext.model_cards import save

ENGLISH = "one two three four five six seven eight nine ten red blue green yellow black white"
LANGUAGES = {
    "Spanish": "uno dos tres cuatro cinco seis siete ocho nueve diez rojo azul verde amarillo negro blanco",
    "French": "un deux trois quatre cinq six sept huit neuf dix rouge bleu vert jaune noir blanc",
    "German": "eins zwei drei vier fünf sechs sieben acht neun zehn rot blau grün gelb schwarz weiß",
}


def make_task(language: str) -> ContinualTask:
    """Every word is a row, to be known by heart."""
    rows = [
        {"prompt": f"In {language}, the word {english} is", "completion": f" {word}"}
        for english, word in zip(ENGLISH.split(), LANGUAGES[language].split(), strict=True)
    ]
    return ContinualTask(language, Dataset.from_list(rows), Dataset.from_list(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output/languages"))
    parser.add_argument("--model", help="a folder or a Hub id; Gemma 3 270M as it comes with the demo by default")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    settings = {
        "learning_rate": 3e-5,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 8,
        "num_train_epochs": 6,
        "max_steps": 2 if options.quick else -1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
    }
    tasks = [make_task(language) for language in LANGUAGES]
    model = options.model or str(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = TaskSequenceTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        SFTConfig(str(options.output / "plain"), **settings),
        tasks,
        processing_class=tokenizer,
    )
    protected = AdaptiveSVDTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        AdaptiveSVDConfig(str(options.output / "protected"), first_task_retention=0.8, **settings),
        tasks,
        processing_class=tokenizer,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    for name, trainer in (("plain fine-tuning", plain), ("adaptive SVD", protected)):
        trainer.train()
        print(f"\n{name}\n\n{trainer.matrix.table()}\n")
        for metric, value in trainer.matrix.metrics().items():
            if value is not None:
                print(f"{metric.replace('_', ' ')}: {value:.1f}")
        trainer.matrix.plot(options.output / f"{name.replace(' ', '_')}.png", title=name)
    save(protected, options.output / "model", license="gemma" if options.model is None else None)
    print(f"\nThe model and its card are in {options.output / 'model'}, the heat maps beside it.")


if __name__ == "__main__":
    main()
