"""Reads rows: questions with their answers, checked once, with split, row and remedy in every message."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_ext.metrics.editing.records import checked_text, checked_texts

Message = Mapping[str, str]

# Punctuation by Unicode's categories that tells names and numbers apart all the same: "C#", "5%", "A*".
_TELLING = frozenset("#%&*/@\\")


@dataclass(frozen=True)
class Row:
    """A question with its answers; `read_rows` makes and checks it.

    Attributes:
        id: unique in its split.
        prompt: a text, or messages of a conversation that ends with the user.
        answer: the answer that was to be forgotten, or to be kept.
        paraphrase: the answer in other words; stands for the right answer in the truth ratio.
        perturbed: wrong answers in the same words.
        prompt_paraphrases: the question in other words.
        context: facts that the in-context attack puts in front of the prompt.
    """

    id: str
    prompt: str | tuple[Message, ...]
    answer: str
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    prompt_paraphrases: tuple[str, ...] = ()
    context: str | None = None

    @property
    def prompt_text(self) -> str:
        """The prompt as one string, for reports."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(turn["content"] for turn in self.prompt)

    @property
    def key(self) -> str:
        """Equal for rows that ask and answer the same, whatever their case, punctuation and white space."""
        return f"{_telling(self.prompt_text)} {_telling(self.answer)}"

    def asked(self, prompt: str, suffix: str) -> Row:
        """The same row with another question, which takes the place of the last turn of a conversation."""
        new = prompt if isinstance(self.prompt, str) else (*self.prompt[:-1], {**self.prompt[-1], "content": prompt})
        return replace(self, id=f"{self.id}/{suffix}", prompt=new)

    @property
    def answers(self) -> list[str]:
        """Everything that is scored after the prompt: the answer, its paraphrase if there is one, the wrong ones."""
        return [self.answer, *([] if self.paraphrase is None else [self.paraphrase]), *self.perturbed]

    @property
    def question(self) -> str:
        """The prompt, or what the user says last."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


def read_rows(rows: Iterable[Mapping[str, Any] | Row], split: str) -> list[Row]:
    """Reads and checks the rows of a split.

    Raises:
        ValueError: no row, a missing or empty field, a wrong type, an id that occurs twice, unequal numbers of
            perturbed answers, or a perturbed answer that equals the right one. The message names split, row and
            remedy.
    """
    found = [row if isinstance(row, Row) else _row(row, split, index) for index, row in enumerate(rows)]
    if not found:
        raise ValueError(f"split {split!r} has no rows; leave it out, or fill it.")
    places: dict[str, int] = {}
    for index, row in enumerate(found):
        where = f"split {split!r}, row {index} (id {row.id!r})"
        if row.id in places:
            raise ValueError(
                f"{where}: the id already belongs to row {places[row.id]}; give every row its own, or none."
            )
        places[row.id] = index
        if len(row.perturbed) != len(found[0].perturbed):
            raise ValueError(
                f"{where}: {len(row.perturbed)} perturbed answers, but row 0 has {len(found[0].perturbed)}; give "
                "every row the same number."
            )
        right = {row.answer, row.paraphrase}
        same = [text for text in row.perturbed if text in right]
        if same:
            raise ValueError(f"{where}: the perturbed answer {same[0]!r} is the right answer; replace it.")
    return found


def refuse_overlap(rows: Sequence[Row], split: str, others: Sequence[Row], other_split: str) -> None:
    """Refuses rows that two splits share, up to case, punctuation and white space.

    Raises:
        ValueError: naming both rows.
    """
    known = {row.key: row.id for row in others}
    for row in rows:
        if row.key in known:
            raise ValueError(
                f"split {split!r}, row {row.id!r} is also row {known[row.key]!r} of split {other_split!r}; take it "
                "out of one of them, or the result says nothing."
            )


def digest(rows: Sequence[Row]) -> str:
    """Identifies the questions and answers of a split."""
    content = [[row.id, row.prompt_text, *row.answers, *row.prompt_paraphrases, row.context] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _row(row: Mapping[str, Any], split: str, index: int) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"split {split!r}, row {index}: this is a {type(row).__name__}; give a dict.")
    given = row.get("id")
    where = f"split {split!r}, row {index}" + (f" (id {given!r})" if given is not None else "")
    for name in ("prompt", "answer"):
        if row.get(name) is None:
            raise ValueError(f"{where}: no {name!r} among the columns {sorted(row)}; rename the one that holds it.")
    return Row(
        id=str(index if given is None else given),
        prompt=_prompt(row["prompt"], where),
        answer=checked_text(row["answer"], where, "answer"),
        paraphrase=None if row.get("paraphrase") is None else checked_text(row["paraphrase"], where, "paraphrase"),
        perturbed=checked_texts(row.get("perturbed"), where, "perturbed"),
        prompt_paraphrases=checked_texts(row.get("prompt_paraphrases"), where, "prompt_paraphrases"),
        context=None if row.get("context") is None else checked_text(row["context"], where, "context"),
    )


def _prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: prompt={value!r}: give a string or a list of messages.")
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{where}: the message {turn!r} of the prompt lacks one of the strings 'role' and 'content'; give both."
            )
    if value[-1]["role"] != "user":
        raise ValueError(f"{where}: the prompt ends with the role {value[-1]['role']!r}; end it with the user.")
    return tuple(dict(turn) for turn in value)


def _telling(text: str) -> str:
    """The words of a text and the symbols that tell it from others ("C++", "C#", "−5"); all of it if it has neither."""
    # A hyphen before a number is a sign, as opposed to one between words.
    signed = re.sub(r"(?<!\S)-(?=\d)", "\N{MINUS SIGN}", text.casefold())
    parts = re.findall(r"\w+|[^\w\s`´]", signed)
    kept = [
        part for part in parts if part in _TELLING or unicodedata.category(part[0])[0] not in "PC" or part[0] == "_"
    ]
    return " ".join(kept or parts)
