"""The mathematics of edit evaluation: plain functions on token lists and strings, no model and no library class.

Definitions follow KnowEdit (https://huggingface.co/papers/2401.01286) and, for real decoding, "The Mirage of Model Editing"
(https://huggingface.co/papers/2502.11177). Every score lies in [0, 1] unless its docstring says otherwise.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ANSWER_POLICIES = ("first", "any_alias", "all_groups")

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def token_accuracy(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """Share of equal tokens of two sequences of the same length: 1 of 3 right is 1/3."""
    return sum(p == r for p, r in zip(predicted, reference, strict=True)) / len(reference)


def token_exact(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """1.0 if every token is equal, else 0.0."""
    return float(list(predicted) == list(reference))


def normalise(text: str) -> str:
    """Lower-cases, drops ASCII punctuation and the articles a/an/the, and collapses white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalised_exact_match(prediction: str, answer: str) -> float:
    """1.0 if both texts are equal after `normalise`."""
    return float(normalise(prediction) == normalise(answer))


def answers_exactly(prediction: str, answer: str) -> float:
    """`normalised_exact_match`, but an answer that normalises to nothing ("A", "+") must be met literally.

    Without this exception every prediction made of articles and punctuation would match such an answer.
    """
    if normalise(answer):
        return normalised_exact_match(prediction, answer)
    return float(prediction.strip() == answer.strip())


def contains(generated: str, answers: str | Sequence[Sequence[str]]) -> bool:
    """True if every group of answers has an alias that is a substring of `generated` (case counts)."""
    groups = [[answers]] if isinstance(answers, str) else answers
    return all(any(alias in generated for alias in group) for group in groups)


def answer_contained(prediction: str, answer: str) -> float:
    """1.0 if the normalised answer is a substring of the normalised prediction; never below `answers_exactly`."""
    if normalise(answer):
        return float(contains(normalise(prediction), normalise(answer)))
    return float(contains(prediction, answer.strip()))


def cut_at_stop(text: str, stop_strings: Iterable[str], start: int = 0) -> str:
    """`text` up to the first stop string found at or after character `start`, without surrounding white space."""
    ends = [end for end in (text.find(stop, start) for stop in stop_strings) if end >= 0]
    return text[: min(ends, default=len(text))].strip()


def reduce_answers(scores: Sequence[Sequence[float]], policy: str) -> float:
    """One score for a question from the scores of all its answers.

    Args:
        scores: `scores[g][a]` belongs to alias `a` of answer group `g`.
        policy: `"first"` (the first alias of the first group, as EasyEdit does), `"any_alias"` (the best of all), or
            `"all_groups"` (the worst group, each group by its best alias).
    """
    if policy == "first":
        return scores[0][0]
    best = [max(group) for group in scores]
    return max(best) if policy == "any_alias" else min(best)


def ngram_entropy(tokens: Sequence[str], weights: Sequence[float] = (2 / 3, 4 / 3)) -> float:
    """Fluency: mean of the weighted bigram and trigram entropies, in bits; unbounded above, 0 for very short texts.

    H_n = −Σ_g p(g) log2 p(g) over the n-grams g of the text; the result is ½(⅔·H_2 + 4⁄3·H_3). Published tables print it
    times 100. High means "not repetitive", not "correct".
    """
    return sum(weight * _entropy(tokens, n) for n, weight in enumerate(weights, start=2)) / len(weights)


def _entropy(tokens: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(tokens[offset:] for offset in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; NaN for no values, so that an empty section cannot pass for a zero."""
    return math.fsum(values) / len(values) if values else math.nan


def section_score(record: Mapping[str, Sequence[float]]) -> float:
    """One record's score of a section such as portability: mean over its kinds of the mean over the kind's questions."""
    return mean([mean(items) for items in record.values()])
