"""Teach a small model to answer from retrieved passages, most of which are about something else.

    python examples/answer_from_noisy_passages.py

A company's handbook says on which floor of which office things are. Gemma 3 270M writes its own reasoning to questions about half of the offices,
RoseRAG sets the right answer it is least sure of against the wrong one it is most sure of, and trains a LoRA on such pairs. Both models then answer about the other
offices, with ever more passages about something else. Interrupted, it keeps what has been written. About 25 minutes on two cores; `--quick` asks a few questions, takes one
step and proves nothing.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_ext import BM25Retriever, RagPrompts, RoseRAGConfig, RoseRAGDatasetBuilder, RoseRAGTrainer, TransformersBackend
from hf_ext.demo.model import embedded_model
from hf_ext.metrics.rag import Condition, RagReport, compare, evaluate_rag
from hf_ext.model_cards import save
from hf_ext.trainers.roserag import Sampling

CITIES = ["Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul", "Perth", "Turin", "Dakar", "Miami", "Hanoi", "Tunis"]
THINGS = ("printer", "kitchen", "library", "first-aid kit", "bicycle room", "reception")
# The model has not been taught to answer questions, so the prompt shows it how.
PROMPTS = RagPrompts(
    system="""Answer each question from its passages.

[1] Bern: The garage of the Bern office is on floor 2.
[2] Riga: The garage of the Riga office is on floor 9.
[3] Bern: The archive of the Bern office is on floor 4.

Question: On which floor of the Bern office is the archive?

Reasoning: The archive of the Bern office is on floor 4 [3].
Answer: 4""",
    question="{passages}\n\nQuestion: {question}",
    hinted="{passages}\n\nQuestion: {question} (It is floor {answer}.)",
    conclude="The floor, in one line:",
)


def handbook() -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """(passages, questions with their answer and the passage that has it)."""
    draw = random.Random(0)
    passages, questions = [], []
    for city in CITIES:
        for thing in THINGS:
            floor = str(draw.randint(1, 9))
            passage = {"title": city, "text": f"The {thing} of the {city} office is on floor {floor}."}
            question = f"On which floor of the {city} office is the {thing}?"
            passages.append(passage)
            questions.append({"id": f"{city}-{thing}", "question": question, "answers": [floor], "gold": passage})
    return passages, questions


def with_others(question: dict[str, Any], passages: list[dict[str, str]]) -> dict[str, Any]:
    """For the evaluation: the right passage, and those about other things in the same city, or the same thing elsewhere."""
    city, thing = question["id"].split("-", 1)
    others = [p for p in passages if p is not question["gold"] and (p["title"] == city or thing in p["text"])]
    random.Random(question["id"]).shuffle(others)
    return {
        **{name: question[name] for name in ("id", "question", "answers")},
        "documents": [{**question["gold"], "is_gold": True}, *({**p, "is_gold": False} for p in others)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output/handbook"))
    parser.add_argument("--model", help="a folder or a Hub id; Gemma 3 270M as it comes with the demo by default")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    name = options.model or str(embedded_model())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    passages, questions = handbook()
    known, unknown = questions[: len(questions) // 2], questions[len(questions) // 2 :]
    if options.quick:
        known, unknown = known[:3], unknown[:1]
    tests = [with_others(question, passages) for question in unknown]

    def measured(trained: Any) -> RagReport:
        reader = pipeline("rag-question-answering", model=trained, tokenizer=tokenizer, prompts=PROMPTS)
        conditions = [Condition(), Condition(distractors=3), Condition(distractors=7)]
        return evaluate_rag(lambda rows: reader(rows, batch_size=8, max_new_tokens=32), tests, conditions)

    reports = {"before": measured(model)}
    builder = RoseRAGDatasetBuilder(
        TransformersBackend(model, tokenizer),
        retriever=BM25Retriever(passages),
        prompts=PROMPTS,
        n_docs=6,
        n_hinted=4,
        n_unhinted=4 if options.quick else 12,
        sampling=Sampling(max_new_tokens=32),
        cache_dir=options.output / "work",
    )
    rows = [{column: question[column] for column in ("id", "question", "answers")} for question in known]
    folder = options.output / ("pairs-quick" if options.quick else "pairs")
    if folder.exists():
        pairs = load_from_disk(str(folder))
    else:
        pairs = builder.build(rows, folder)
        print(f"\n{builder.report.table()}\n")

    args = RoseRAGConfig(
        str(options.output / "adapter"),
        learning_rate=2e-4,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        max_steps=1 if options.quick else -1,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = RoseRAGTrainer(model, args, pairs, prompts=PROMPTS, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    reports["after"] = measured(trainer.model)
    for title, report in reports.items():
        print(f"\n{title}\n\n{report.table()}")
    print(f"\n{compare(reports).table()}")
    card = {} if options.model else {"license": "gemma", "base_model": "google/gemma-3-270m"}
    save(trainer, options.output / "model", **card)
    print(f"\nThe adapter, its prompts and its card are in {options.output / 'model'}.")


if __name__ == "__main__":
    main()
