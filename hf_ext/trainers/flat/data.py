"""Data of the unlearning trainers: refusals, tokenised rows, and the collator that stacks the groups of a batch.

A prepared row holds `row` (its number in the user's dataset), `prompt_ids`, `forget_ids` and, for methods with
refusals, `template_ids`: one list of tokens per variant, after `prompt_ids` or, where tokens merge across the boundary,
after a prompt of its own in `template_prompt_ids`. Which variant and which retain row it meets is a function of
(seed, epoch, row) alone, so batches, workers and processes do not matter, and a resumed run sees what the first one
would have seen.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from trl import is_conversational

from hf_ext._compat import dataset_fingerprint, shared_prefix, tokenise_for_trl
from hf_ext.trainers.flat.plans import RowPlan

DEFAULT_TEMPLATES = (
    "I don't know the answer to that.",
    "I'm afraid I have no information about this.",
    "That is something I cannot tell you.",
    "I'm not familiar with that topic.",
    "Sorry, I can't answer this question.",
    "I have no knowledge of this matter.",
    "This is outside of what I know.",
    "I'm unable to say anything about that.",
    "I would only be guessing, so I'd rather not answer.",
    "Nothing about this is known to me.",
    "I can't help with that, as I lack the facts.",
    "I haven't learnt anything about this subject.",
    "Unfortunately, I have no answer for you.",
    "I'm not aware of any details on this.",
    "That question goes beyond my knowledge.",
    "I'm sorry, but I don't have that information.",
    "I am not the right source for this, because I don't know.",
    "I couldn't tell you that.",
    "I have nothing to say on this point.",
    "My knowledge does not cover this.",
)


def load_templates(source: Sequence[str] | str | None) -> list[str]:
    """Refusals from a list, a `.txt` file (one per line) or a `.jsonl` file (`answer` of each line); `None`: ours.

    Raises:
        ValueError: another kind of file, a line that cannot be read, or an empty refusal.
        FileNotFoundError: there is no such file.
    """
    if source is None:
        return list(DEFAULT_TEMPLATES)
    answers: list[Any]
    if isinstance(source, str):
        path = Path(source)
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(
                f"template_answers={source!r} is not a .txt or .jsonl file: for a single refusal give a list with one "
                "entry."
            )
        lines = [(n, line) for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
        answers = [line if path.suffix == ".txt" else _json_answer(line, f"{source}, line {n}") for n, line in lines]
    else:
        answers = list(source)
    if not answers:
        raise ValueError(
            f"template_answers={source!r} is empty: give at least one refusal, or None for the built-in list."
        )
    for index, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise ValueError(
                f"template_answers: entry {index} is {answer!r}, which is no sentence: remove or complete it."
            )
    return [answer.strip() for answer in answers]


def _json_answer(line: str, where: str) -> Any:
    try:
        return json.loads(line)["answer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{where}: expected an object with the key `answer`, e.g. {{"answer": "I don\'t know."}}.'
        ) from error


def _tokenised(example: dict[str, Any], row: int, plan: RowPlan, processing_class: Any) -> dict[str, Any]:
    prompt, answers = plan.prompt_and_answers(example, row)
    tools = example.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(example.get("chat_template_kwargs") or {}),
    }
    if is_conversational({"prompt": prompt}):
        prompt_ids = tokenise_for_trl(processing_class, prompt, add_generation_prompt=True, **options)
        full_ids = [tokenise_for_trl(processing_class, prompt + answer, **options) for answer in answers]
    else:
        prompt_ids = tokenise_for_trl(processing_class, prompt)
        full_ids = [tokenise_for_trl(processing_class, prompt + answer) for answer in answers]
    # As in TRL: tokens may merge across the boundary, and the prompt ends where the sequence still agrees with it.
    starts = [shared_prefix(prompt_ids, ids) for ids in full_ids]
    if plan.template_column is not None:
        starts = [min(starts)] * len(starts)
    prompts = [prompt_ids[:start] for start in starts]
    answer_ids = [ids[start:] for ids, start in zip(full_ids, starts, strict=True)]
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    _check_tokens(prompt_ids, prompts, answer_ids, row, plan, tokenizer)
    return {
        "row": row,
        "prompt_ids": prompts[0],
        "forget_ids": answer_ids[0],
        "template_ids": answer_ids[1:],
        "template_prompt_ids": prompts[1:],
        "lost": tokenizer.decode(prompt_ids[min(starts) :]),
    }


def _check_tokens(
    prompt_ids: list[int], prompts: list[list[int]], answers: list[list[int]], row: int, plan: RowPlan, tokenizer: Any
) -> None:
    special = set(tokenizer.all_special_ids)
    if set(prompt_ids) - special and not all(set(prompt) - special for prompt in prompts):
        raise ValueError(
            f"{plan.name}, row {row}: nothing is left of the prompt, because its tokens merge with those of an answer: "
            f"end the prompt where a token ends, e.g. put the space at the start of {plan.column}, or drop the row."
        )
    if not all(set(answer) - {tokenizer.eos_token_id} for answer in answers):
        raise ValueError(
            f"{plan.name}, row {row}: an answer has no tokens of its own; check {plan.column} and the tokenizer."
        )
    if any(
        prompt + answer == prompts[0] + answers[0] for prompt, answer in zip(prompts[1:], answers[1:], strict=True)
    ):
        raise plan.cancelling(row, tokenizer.decode(answers[0]))


def _fingerprint(dataset: Dataset, plan: RowPlan, processing_class: Any) -> str | None:
    """Of the tokenised rows, from what decides on them; `None` leaves it to datasets, which pickles all that the tokenizer holds.

    That takes 4 to 20 seconds for Gemma's 262,144 tokens and their merges, which the tokenizer holds twice.
    """
    if not isinstance(processing_class, PreTrainedTokenizerFast):
        return None
    hasher = Hasher()
    for part in (
        dataset_fingerprint(dataset),
        _tokenised,
        plan,
        type(processing_class),
        processing_class.backend_tokenizer.to_str(),
        processing_class.init_kwargs,
        processing_class.special_tokens_map,
        processing_class.chat_template,
    ):
        hasher.update(part)
    return hasher.hexdigest()


def _without_notes(dataset: Dataset, name: str) -> Dataset:
    """Drop what `_tokenised` noted of shortened prompts; warn of them."""
    lost = [(row, text) for row, text in enumerate(dataset["lost"]) if text]
    if not lost:
        return dataset.remove_columns(["lost", "template_prompt_ids"])
    row, text = lost[0]
    warnings.warn(
        f"{name}: in {len(lost)} of {len(dataset)} rows the end of the prompt counts as part of the answer, e.g. "
        f"{text!r} in row {row}: its tokens merge with those of the answer, or the chat template renders it differently "
        "without one. End the prompt where a token ends, e.g. put the space at the start of the completion.",
        stacklevel=3,
    )
    return dataset.remove_columns("lost")


def prepare_rows(dataset: Dataset, plan: RowPlan, processing_class: Any, args: Any, resampled: bool) -> Dataset:
    """Tokenise a dataset; rows without room for an answer are dropped with a warning.

    Args:
        dataset: rows as the user gave them.
        plan: how they are read.
        processing_class: tokenizer or processor.
        args: an `UnlearnConfig`.
        resampled: draw variants and retain rows anew in every epoch, as in training.

    Raises:
        ValueError: a row that cannot be used, or none is left.
    """
    with PartialState().main_process_first():
        prepared = dataset.map(
            _tokenised,
            with_indices=True,
            fn_kwargs={"plan": plan, "processing_class": processing_class},
            remove_columns=dataset.column_names,
            num_proc=args.dataset_num_proc,
            new_fingerprint=_fingerprint(dataset, plan, processing_class),
            desc=f"Tokenizing {plan.name}",
        )
    prepared = _without_notes(prepared, plan.name).add_column("resampled", [resampled] * len(prepared))
    if args.max_length is None:
        return prepared
    return _with_room(prepared, plan.name, args.max_length, args.truncation_mode)


def _with_room(dataset: Dataset, name: str, max_length: int, truncation_mode: str) -> Dataset:
    pairs = [sequences(row) for row in dataset]
    prompts = [max(len(prompt) for prompt, _ in row) for row in pairs]
    lengths = [max(len(prompt) + len(answer) for prompt, answer in row) for row in pairs]
    kept = [i for i, length in enumerate(prompts) if length < max_length or truncation_mode == "keep_end"]
    dropped = len(prompts) - len(kept)
    cut = sum(lengths[i] > max_length for i in kept)
    if not kept:
        raise ValueError(
            f"{name}: every prompt fills max_length={max_length} tokens, so no answer is left: raise max_length (the "
            f"longest row has {max(lengths)} tokens) or shorten the prompts."
        )
    if dropped or cut:
        warnings.warn(
            f"{name}: {dropped} of {len(prompts)} rows were dropped because the prompt alone fills "
            f"max_length={max_length} tokens, and {cut} were truncated; raise max_length to use them whole.",
            stacklevel=2,
        )
    return dataset.select(kept) if dropped else dataset


def sequences(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of a prepared row's answer to forget and of each of its refusals."""
    prompts = row.get("template_prompt_ids") or [row["prompt_ids"]] * len(row["template_ids"])
    return list(zip([row["prompt_ids"], *prompts], [row["forget_ids"], *row["template_ids"]], strict=True))


def stack_sequences(
    pairs: Sequence[tuple[list[int], list[int]]],
    pad_token_id: int,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    pad_to_multiple_of: int | None = None,
) -> dict[str, Tensor]:
    """(prompt, answer) tokens -> `input_ids`, `attention_mask`, `completion_mask`, `(B, S)`, padded on the right."""
    part = slice(None) if max_length is None else slice(max_length)
    if max_length is not None and truncation_mode == "keep_end":
        part = slice(-max_length, None)
    rows = [(prompt + answer)[part] for prompt, answer in pairs]
    marks = [([0] * len(prompt) + [1] * len(answer))[part] for prompt, answer in pairs]
    length = max(map(len, rows))
    if pad_to_multiple_of is not None:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    return {
        "input_ids": padded(rows, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
        "completion_mask": padded(marks, 0),
    }


@dataclass
class UnlearnCollator:
    """Stacks the groups that the loss needs, in the order template, forget, retain, each with one row per example.

    Args:
        pad_token_id: fills the rows on the right.
        groups: names of the groups.
        seed: with the epoch and the row draws the refusal and the retain row.
        retain: prepared retain rows, paired to the forget rows by a permutation that changes with the epoch.
        max_length, truncation_mode, pad_to_multiple_of: as in `DPOConfig`.

    The output has `input_ids`, `attention_mask` and `completion_mask`, `(groups * B, S)`, and `ref_forget_logps` and
    `ref_template_logps`, `(B,)`, if the rows have them.
    """

    pad_token_id: int
    groups: tuple[str, ...]
    seed: int = 0
    retain: Dataset | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None
    # In shared memory, because persistent workers hold their own copy of the collator.
    _epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long).share_memory_(), repr=False)
    _order: tuple[int, list[int]] = field(default=(-1, []), repr=False)

    def set_epoch(self, epoch: int) -> None:
        """Draw anew for this epoch."""
        self._epoch.fill_(epoch)

    def variant(self, example: dict[str, Any]) -> int:
        """Which refusal of this row takes part."""
        count = len(example["template_ids"])
        return random.Random(f"{self.seed}:{self._epoch_of(example)}:{example['row']}").randrange(count)

    def retain_row(self, example: dict[str, Any]) -> dict[str, Any]:
        """The retain row that this row meets."""
        assert self.retain is not None
        epoch = self._epoch_of(example)
        if self._order[0] != epoch:
            order = list(range(len(self.retain)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
            self._order = (epoch, order)
        order = self._order[1]
        return self.retain[order[example["row"] % len(order)]]

    def _epoch_of(self, example: dict[str, Any]) -> int:
        return int(self._epoch) if example["resampled"] else 0

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        pairs: list[tuple[list[int], list[int]]] = []
        for group in self.groups:
            for example in examples:
                if group == "template":
                    pairs.append(sequences(example)[1 + self.variant(example)])
                elif group == "forget":
                    pairs.append(sequences(example)[0])
                else:
                    pairs.append(sequences(self.retain_row(example))[0])
        batch = stack_sequences(
            pairs, self.pad_token_id, self.max_length, self.truncation_mode, self.pad_to_multiple_of
        )
        if "ref_forget_logps" in examples[0]:
            batch["ref_forget_logps"] = torch.tensor([example["ref_forget_logps"] for example in examples])
        if "ref_template_logps" in examples[0]:
            picked = [example["ref_template_logps"][self.variant(example)] for example in examples]
            batch["ref_template_logps"] = torch.tensor(picked)
        return batch
