"""Whether an answer is right: SQuAD's normalisation, exact match, F1 and containment. Needs the standard library alone.

https://huggingface.co/papers/1606.05250 (section 6) defines the normalisation, exact match and F1.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

MATCHES = ("exact", "contains")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_YES_NO = ("yes", "no")
# Whole answers, and beginnings of answers.
_SINGLE_REFUSALS = ("unknown", "unanswerable", "none")
_REFUSALS = (
    "i do not know",
    "i dont know",
    "cannot be determined",
    "cannot answer",
    "cant answer",
    "not enough information",
    "no answer",
    "not mentioned",
    "not provided",
)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space.

    Unicode is folded to its compatibility form first, and its punctuation goes as ASCII's does. A text of which nothing would be left, such
    as the band "The The", keeps its words.
    """
    lowered = unicodedata.normalize("NFKC", text).lower()
    plain = "".join(character for character in lowered if not _is_punctuation(character))
    return " ".join(_ARTICLES.sub(" ", plain).split()) or " ".join(plain.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def exact_match(answer: str, golds: Sequence[str]) -> bool:
    """Whether the normalised answer is one of the normalised gold answers; an empty one never is."""
    found = normalize_answer(answer)
    return bool(found) and found in {normalize_answer(gold) for gold in golds}


def token_f1(answer: str, golds: Sequence[str]) -> float:
    """Best F1 of the normalised words over the gold answers, 0 to 1."""
    return max((_f1(normalize_answer(answer).split(), normalize_answer(gold).split()) for gold in golds), default=0.0)


def _f1(found: list[str], gold: list[str]) -> float:
    common = sum((Counter(found) & Counter(gold)).values())
    return 2 * common / (len(found) + len(gold)) if common else 0.0


def contains_answer(text: str, golds: Sequence[str]) -> bool:
    """Whether a gold answer stands in the text, at borders of words where its script has them."""
    found = normalize_answer(text)
    return any(_stands_in(normalize_answer(gold), found) for gold in golds)


def _stands_in(gold: str, text: str) -> bool:
    if not gold:
        return False
    # Scripts without spaces, such as Chinese, consist of letters without case.
    if any(unicodedata.category(character) == "Lo" for character in gold):
        return gold in text
    return f" {gold} " in f" {text} "


def is_refusal(answer: str) -> bool:
    """Whether an answer says that there is none, in one of a few common English phrases."""
    found = normalize_answer(answer)
    return found in _SINGLE_REFUSALS or any(f"{found} ".startswith(f"{refusal} ") for refusal in _REFUSALS)


@dataclass(frozen=True)
class AnswerMatcher:
    """Says whether an answer is one of the gold answers, or contains one.

    Attributes:
        match: "exact" after normalisation, or "contains": a gold answer stands somewhere in it, for long answers.

    Where all gold answers are yes or no, the first of these two words in the answer counts.
    """

    match: str = "exact"

    def __post_init__(self) -> None:
        if self.match not in MATCHES:
            raise ValueError(f"match={self.match!r}: use one of {MATCHES}.")

    def __call__(self, answer: str, golds: Sequence[str]) -> bool:
        yes_no = {normalize_answer(gold) for gold in golds}
        if yes_no and yes_no <= set(_YES_NO):
            said = next((word for word in normalize_answer(answer).split() if word in _YES_NO), None)
            return said in yes_no
        return exact_match(answer, golds) if self.match == "exact" else contains_answer(answer, golds)
