"""What a question is asked with: its gold passages among distractors, among passages that lie, or nothing.

All choices are drawn by (seed, question id), so that two models see the same passages in the same order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_ext.metrics.rag.matching import normalize_answer

NO_GOLD = "no gold"
"""The condition in which distractors are given, and no gold passage."""
CLOSED_BOOK = "closed book"
"""The condition in which no passage is given."""
ADVERSARIAL = "adversarial"
"""What the names of conditions call copies of gold passages with a wrong answer in the place of the right one."""
Passage = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers and its passages.

    Attributes:
        id: unique.
        question: its text.
        answers: accepted ones, at least one.
        documents: passages in their order.
        is_gold: which of them hold the answer.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    documents: tuple[Passage, ...] = ()
    is_gold: tuple[bool, ...] = ()

    @property
    def gold(self) -> list[Passage]:
        """Passages that hold the answer."""
        return [passage for passage, gold in zip(self.documents, self.is_gold, strict=True) if gold]

    @property
    def distractors(self) -> list[Passage]:
        """Passages that do not."""
        return [passage for passage, gold in zip(self.documents, self.is_gold, strict=True) if not gold]


def iter_questions(rows: Iterable[Mapping[str, Any]]) -> Iterator[Question]:
    """What `read_questions` reads, row by row."""
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"row {number} is {row!r:.40}; give rows with `question` and `answers`, one split of a dataset."
            )
        name = str(row.get("id", number))
        where = f"row {number} (id {name!r})"
        if name in seen:
            raise ValueError(f"{where}: the id occurs twice; give every question its own.")
        seen.add(name)
        question, answers = row.get("question"), row.get("answers")
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"{where}: question={question!r}; give a text.")
        if isinstance(answers, (str, Mapping)):
            raise ValueError(f"{where}: answers={answers!r:.80} is no list; give a list of accepted answers.")
        usable = tuple(answer for answer in answers or () if isinstance(answer, str) and normalize_answer(answer))
        if not usable:
            raise ValueError(f"{where}: answers={answers!r} has no gold answer; give at least one, or drop the row.")
        if isinstance(row.get("documents"), Mapping):
            raise ValueError(f"{where}: documents has columns; give a list of {{'title', 'text'}}.")
        passages = list(row.get("documents") or ())
        for passage in passages:
            if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
                raise ValueError(f"{where}: the passage {passage!r:.80} has no text; give {{'title', 'text'}}.")
        documents = tuple({"title": passage.get("title") or "", "text": passage["text"]} for passage in passages)
        gold = tuple(bool(passage.get("is_gold")) for passage in passages)
        yield Question(name, question, usable, documents, gold)
    if not seen:
        raise ValueError("there are no questions: give at least one row.")


def read_questions(rows: Iterable[Mapping[str, Any]]) -> list[Question]:
    """Questions from rows with `question`, `answers`, optional `id`, and optional `documents` with `title`, `text` and `is_gold`.

    Raises:
        ValueError: naming the row: a question or answers that are missing or empty, an id that occurs twice, a passage without text.
    """
    return list(iter_questions(rows))


@dataclass(frozen=True)
class Condition:
    """What a question is asked with: gold passages, distractors, and false copies of gold passages.

    Attributes:
        gold: whether its gold passages are there.
        distractors: how many passages without the answer are added; None: all there are.
        adversarial: how many copies of gold passages with a wrong answer in the place of the right one are added.
    """

    gold: bool = True
    distractors: int | None = 0
    adversarial: int = 0

    def __post_init__(self) -> None:
        if self.adversarial < 0 or (self.distractors is not None and self.distractors < 0):
            raise ValueError(f"{self}: give numbers of passages >= 0.")

    @property
    def name(self) -> str:
        """Different for different conditions: "gold + 4", "no gold + 4", "gold + 1 adversarial", "closed book"."""
        parts = ["gold" if self.gold else NO_GOLD]
        if self.distractors is None or self.distractors or not self.adversarial:
            parts.append("all" if self.distractors is None else str(self.distractors))
        if self.adversarial:
            parts.append(f"{self.adversarial} {ADVERSARIAL}")
        elif not self.gold and self.distractors == 0:
            return CLOSED_BOOK
        return " + ".join(parts)

    def passages(self, question: Question, wrong_answers: Sequence[str], seed: int) -> list[Passage] | None:
        """The passages in the order they are read; None if the question has not enough for this condition."""
        chooser = random.Random(f"{seed}/{question.id}/{self.name}")
        if self.gold and not question.gold:
            return None
        found = list(question.gold) if self.gold else []
        # The same distractors at every level, more of them at higher ones.
        others = list(question.distractors)
        random.Random(f"{seed}/{question.id}").shuffle(others)
        wanted = len(others) if self.distractors is None else self.distractors
        if wanted > len(others) or (not others and self.distractors is None and not self.gold):
            return None
        found += others[:wanted]
        if self.adversarial:
            lies = counterfactuals(question, wrong_answers, self.adversarial, chooser)
            if lies is None:
                return None
            found += lies
        chooser.shuffle(found)
        return found


def counterfactuals(
    question: Question, wrong_answers: Sequence[str], count: int, chooser: random.Random
) -> list[Passage] | None:
    """Copies of gold passages in which the answer is replaced by another question's; None if no passage has the answer.

    Yes and no, and answers that already stand in the passages, are no replacements.
    """
    golds = sorted((answer for answer in question.answers if normalize_answer(answer) not in ("yes", "no")), key=len)
    if not golds:
        return None
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(answer)}(?!\w)" for answer in reversed(golds)), re.IGNORECASE)
    sources = [passage for passage in question.gold if pattern.search(passage["text"])]
    if not sources:
        return None
    told = normalize_answer(" ".join(passage["text"] for passage in question.gold))
    usable = [wrong for wrong in wrong_answers if f" {normalize_answer(wrong)} " not in f" {told} "]
    # Of the same kind: a number for a number, a name for a name.
    digits = any(character.isdigit() for character in golds[0])
    alike = [wrong for wrong in usable if any(character.isdigit() for character in wrong) == digits] or usable
    if not alike:
        return None
    lies: list[Passage] = []
    for number in range(count):
        source, wrong = sources[number % len(sources)], chooser.choice(alike)
        # Joined, since a replacement would read backslashes.
        lies.append({"title": source["title"], "text": wrong.join(pattern.split(source["text"]))})
    return lies
