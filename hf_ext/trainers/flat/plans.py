"""How the rows of a user's dataset become prompts and answers, and which are refused."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import extract_prompt


@dataclass(frozen=True)
class RowPlan:
    """How the rows of one dataset become prompts and answers.

    Attributes:
        name: of the dataset, for messages.
        column: the answer to forget (or to retain): "completion" or "rejected".
        template_column: the refusal of preference data, "chosen", if the method uses refusals.
        templates: refusals for prompt-completion data, if the method uses refusals.
        variants: refusals per prompt.
        seed: draws them.
        eos: end token appended to plain text.
    """

    name: str
    column: str
    template_column: str | None = None
    templates: tuple[str, ...] = ()
    variants: int = 1
    seed: int = 0
    eos: str | None = None

    def prompt_and_answers(self, example: dict[str, Any], row: int) -> tuple[Any, list[Any]]:
        """(prompt, [answer, refusal, ...]); raises `ValueError` naming column and row of what cannot be used."""
        if "prompt" not in example:
            for column in ("chosen", "rejected"):
                self._checked(example[column], column, row)
            example = extract_prompt(example)
        prompt, answer = example["prompt"], example[self.column]
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
            raise ValueError(
                f"{self.name}, row {row}: the column prompt holds {prompt!r}, which is no prompt: give text or "
                "messages, or drop the row."
            )
        text = self._checked(answer, self.column, row)
        if self.template_column is not None:
            refusals: list[Any] = [example[self.template_column]]
        else:
            # A completion that brings its own space after the prompt gets a refusal that does so too.
            space = text[: len(text) - len(text.lstrip())]
            drawn = random.Random(f"{self.seed}:{row}").sample(self.templates, self.variants) if self.templates else []
            refusals = [
                space + sentence if isinstance(answer, str) else [{"role": "assistant", "content": sentence}]
                for sentence in drawn
            ]
        for refusal in refusals:
            column = self.template_column or "template_answers"
            if self._checked(refusal, column, row).strip() == text.strip():
                raise self.cancelling(row, text)
        answers = [answer, *refusals]
        columns = [self.column, *[self.template_column or "template_answers"] * len(refusals)]
        for value, column in zip(answers, columns, strict=True):
            if isinstance(value, str) != isinstance(prompt, str):
                raise ValueError(
                    f"{self.name}, row {row}: of prompt and {column} one is text and the other messages: give both in "
                    "the same form."
                )
        if self.eos is not None and isinstance(answer, str):
            answers = [value if value.endswith(self.eos) else value + self.eos for value in answers]
        return prompt, answers

    def cancelling(self, row: int, text: str) -> ValueError:
        """The error for a refusal that is the answer to forget."""
        return ValueError(
            f"{self.name}, row {row}: the refusal in {self.template_column or 'template_answers'} is the answer to "
            f"forget in {self.column} ({text.strip()!r}), so the two terms cancel. Change one of them or drop the row."
        )

    def _checked(self, answer: Any, column: str, row: int) -> str:
        text = answer[-1]["content"] if isinstance(answer, list) and answer else answer
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{self.name}, row {row}: the column {column} holds {answer!r}, which is no answer: fill it or drop "
                "the row."
            )
        return text


def plan_rows(
    dataset: Dataset, name: str, *, templates: Sequence[str] | None, variants: int, seed: int, eos: str | None
) -> RowPlan:
    """The plan for a forget dataset; `templates` is None for methods without refusals.

    Raises:
        TypeError: a stream, whose rows cannot be numbered.
        ValueError: columns are missing, or there are fewer refusals than variants.
    """
    columns = _columns(dataset, name)
    preference = "rejected" in columns
    if not preference and not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"{name} has the columns {columns}: it needs `prompt` and `completion` (the answer to forget), or "
            "`prompt`, `chosen` (a refusal) and `rejected` (the answer to forget). Rename yours with "
            "dataset.rename_columns(...)."
        )
    if preference and not {"prompt", "chosen"} & set(columns):
        raise ValueError(f"{name} has the columns {columns}: `prompt` is missing, the question to each answer.")
    column = "rejected" if preference else "completion"
    if templates is None:
        return RowPlan(name, column, eos=eos)
    if preference:
        if "chosen" not in columns:
            raise ValueError(f"{name} has the columns {columns}: `chosen` is missing, the refusal to each prompt.")
        return RowPlan(name, column, "chosen", eos=eos)
    if variants > len(templates):
        raise ValueError(
            f"templates_per_example={variants} exceeds the {len(templates)} refusals of template_answers: lower it or "
            "add some."
        )
    return RowPlan(name, column, None, tuple(templates), variants, seed, eos)


def plan_retain_rows(dataset: Dataset, eos: str | None) -> RowPlan:
    """The plan for a retain dataset, of prompts and completions."""
    columns = _columns(dataset, "retain_dataset")
    if {"image", "images"} & set(columns):
        raise ValueError("retain_dataset has images, which are not supported there: give a text dataset, or none.")
    if not {"prompt", "completion"} <= set(columns):
        raise ValueError(
            f"retain_dataset has the columns {columns}: it needs `prompt` and `completion` (the answer to keep). "
            "Rename yours with dataset.rename_columns(...)."
        )
    return RowPlan("retain_dataset", "completion", eos=eos)


def _columns(dataset: Any, name: str) -> list[str]:
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}: rows are drawn by their number, so give a datasets.Dataset, e.g. "
            "Dataset.from_list(list(stream))."
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows.")
    return dataset.column_names
