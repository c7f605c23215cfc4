"""Data with images: TRL's collator for preference data tokenises them, and what is done around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from hf_ext.trainers.flat.config import UnlearnConfig
from hf_ext.trainers.flat.plans import RowPlan


def check_options(args: UnlearnConfig, with_retain: bool) -> None:
    """Raises `ValueError` for options that data with images do not support."""
    if with_retain:
        raise ValueError(
            "retain_dataset: a forget dataset with images is stacked by TRL's vision collator, which takes no retain "
            "rows. Leave it out."
        )
    if args.method.reference == "sums":
        raise ValueError(
            f"loss_type={args.loss_type!r} computes its reference before the training, which is not supported for data "
            "with images. Choose flat, simnpo, wga or another loss without a reference."
        )
    if args.templates_per_example > 1:
        raise ValueError("templates_per_example: data with images take one refusal per prompt; set it to 1.")


def with_templates(dataset: Dataset, plan: RowPlan) -> Dataset:
    """Preference form, `chosen` and `rejected`, of a vision dataset, which TRL's collator tokenises itself."""
    columns: dict[str, list] = {"prompt": [], "chosen": [], "rejected": []}
    text = dataset.remove_columns([name for name in dataset.column_names if name in ("image", "images")])
    for row, example in enumerate(text):
        prompt, answers = plan.prompt_and_answers(example, row)
        columns["prompt"].append(prompt)
        columns["rejected"].append(answers[0])
        # TRL's collator wants both halves; `ForgetHalf` drops this one for a method without refusals.
        columns["chosen"].append(answers[-1])
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


@dataclass
class ForgetHalf:
    """The rows of the answers to forget from a batch `[chosen][rejected]`, for methods that read no refusal.

    Both halves show the same images, so that every tensor of the batch is halved along its first dimension, whatever
    that counts: rows, images or patches.
    """

    collate: Callable[[list[dict[str, Any]]], Any]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {name: value[len(value) // 2 :] for name, value in self.collate(examples).items()}
