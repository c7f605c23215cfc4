"""The mathematics of unlearning evaluation: pure functions on arrays, no model and no Hugging Face import.

Definitions follow TOFU (https://huggingface.co/papers/2401.06121), MUSE (https://huggingface.co/papers/2407.06460) and
OpenUnlearning (https://huggingface.co/papers/2506.12618), so that numbers compare. An NLL is always the mean over the
tokens of an answer, in nats. Ratios are kept as logarithms: an over-unlearned model reaches losses whose exponentials
overflow.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_ext._lazy import optional_import

Floats = NDArray[np.float64]

_VARIANCE_FLOOR = 1e-6
_MAX_DRAWS_AT_ONCE = 2**22
# Letters beyond Latin Extended-B; rouge-score's own tokenizer drops them and would score any such answer 0.
_LAST_LATIN = 0x24F
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
_CHARACTERS = re.compile(r"\S")


# -- Probabilities and the truth ratio -------------------------------------------------------------------------------


def probability(nll: ArrayLike) -> Floats:
    """exp(−NLL): the geometric mean of an answer's token probabilities, in [0, 1]."""
    return np.asarray(np.exp(-_floats(nll)))


def probability_with_options(correct: ArrayLike, wrong: ArrayLike) -> Floats:
    """P(correct) / (P(correct) + Σ P(wrong)), [n], from NLLs `correct` [n] and `wrong` [n, k]."""
    difference = _floats(correct)[:, None] - _floats(wrong)
    return np.asarray(np.exp(-np.logaddexp(0, _logsumexp(difference))))


def choice_hits(correct: ArrayLike, wrong: ArrayLike) -> Floats:
    """1.0 where the correct answer is more probable than every wrong one, else 0.0; [n] from NLLs [n] and [n, k]."""
    return _floats((_floats(correct)[:, None] < _floats(wrong)).all(axis=1))


def log_truth_ratio(correct: ArrayLike, wrong: ArrayLike, *, mean: str = "geometric") -> Floats:
    """log R = log(P(wrong) / P(correct)), [n], from NLLs `correct` [n] and `wrong` [n, k].

    R > 1: the model finds the wrong answers more likely than the right one.

    Args:
        mean: how the k wrong probabilities become one: `"geometric"` (the mean of their NLLs, the definition in use),
            or `"arithmetic"` (older TOFU code).
    """
    if mean not in ("geometric", "arithmetic"):
        raise ValueError(f'mean={mean!r}: give "geometric" or "arithmetic".')
    losses = _floats(wrong)
    wrong_log = -losses.mean(axis=1) if mean == "geometric" else _logsumexp(-losses) - math.log(losses.shape[1])
    return wrong_log + _floats(correct)


def truth_ratio_closeness(log_ratio: ArrayLike) -> Floats:
    """min(R, 1/R), in [0, 1]: 1 where right and wrong answers are equally likely; the aggregate of the forget set."""
    return np.exp(-np.abs(_floats(log_ratio)))


def truth_ratio_utility(log_ratio: ArrayLike) -> Floats:
    """max(0, 1 − R), in [0, 1]: high where the right answer is clearly preferred; the aggregate of what must stay."""
    return -np.expm1(np.minimum(_floats(log_ratio), 0))


def truth_ratio_knowledge(log_ratio: ArrayLike) -> Floats:
    """P(correct) / (P(correct) + P(wrong)) = 1 / (1 + R), in [0, 1]."""
    return np.exp(-np.logaddexp(0, _floats(log_ratio)))


@dataclass(frozen=True)
class ForgetQuality:
    """How well the truth ratios of a model agree with those of a model retrained without the forget set.

    Attributes:
        p_value: exact two-sided two-sample Kolmogorov-Smirnov test; 1 for equal samples. It falls with the number of
            rows.
        statistic: D, the largest distance between the two distribution functions; does not depend on the number of
            rows.
        direction: where they are furthest apart: `"knows more"` (smaller R than the retrained model: not forgotten),
            `"over-unlearned"` (larger R) or `"equal"` (D = 0).
        smallest_p: the p-value of complete disagreement. If it is not small, no model could have failed the test.
    """

    p_value: float
    statistic: float
    direction: str
    smallest_p: float


def forget_quality(ratios: ArrayLike, retrained: ArrayLike) -> ForgetQuality:
    """Exact Kolmogorov-Smirnov test between truth ratios of a model [n] and of the retrained model [m].

    The p-value is the share of the C(n+m, n) orders of the pooled sample that are at least as far apart; it does not
    change under any monotone map of both samples, so R, log R and 1/R give the same.

    Raises:
        ValueError: an empty sample or NaN.
    """
    first, second = np.sort(_floats(ratios)), np.sort(_floats(retrained))
    n, m = first.size, second.size
    if not n or not m or np.isnan(first).any() or np.isnan(second).any():
        raise ValueError(
            f"ratios ({n}) and retrained ({m} values): give one truth ratio per row from both models, none of them NaN."
        )
    pooled = np.concatenate([first, second])
    below = (np.searchsorted(sample, pooled, side="right") for sample in (first, second))
    # n·m times the difference of the distribution functions at every value, in integers.
    gaps = next(below) * m - next(below) * n
    gap = int(gaps[np.abs(gaps).argmax()])
    direction = "equal" if gap == 0 else "knows more" if gap > 0 else "over-unlearned"
    p_value = _share_of_paths(n, m, abs(gap))
    return ForgetQuality(p_value, abs(gap) / (n * m), direction, _share_of_paths(n, m, n * m))


def _share_of_paths(n: int, m: int, gap: int) -> float:
    """Share of the lattice paths from (0, 0) to (n, m) that meet a point (i, j) with |i·m − j·n| >= gap.

    The last step to (i, j) comes from (i−1, j) on the share i/(i+j) of its paths. Only non-negative numbers are added,
    so the result is accurate to about (n+m)·1e-16 relative, however small. SciPy's exact method agrees, except near 1,
    where rounding takes it above 1 and it falls back to the asymptotic value.
    """
    met = np.zeros(n + 2)  # met[i + 1] is the share at (i, s − i)
    met[1] = float(gap <= 0)
    for s in range(1, n + m + 1):
        i = np.arange(max(0, s - m), min(n, s) + 1)
        shares = (i * met[i] + (s - i) * met[i + 1]) / s
        met[i + 1] = np.where(np.abs(i * m - (s - i) * n) >= gap, 1.0, shares)
    return float(met[n + 1])


def model_utility(values: Sequence[float]) -> float:
    """Harmonic mean of scores in [0, 1]; 0 as soon as one of them is 0, and at most their number times the smallest.

    Raises:
        ValueError: no value, or one that is negative or NaN.
    """
    scores = _floats(values)
    if not scores.size or not (scores >= 0).all():
        raise ValueError(f"values={list(values)}: give one or more scores of at least 0.")
    return float(_harmonic_mean(scores))


def utility_interval(samples: Sequence[ArrayLike], **options: Any) -> tuple[float, float]:
    """Bootstrap interval of the utility of means over rows; one array [rows, scores] per split, see `bootstrap_of`."""

    def utility(*drawn: Floats) -> Floats:
        return _harmonic_mean(np.concatenate([sample.mean(axis=1) for sample in drawn], axis=-1))

    return bootstrap_of(utility, samples, **options)


def _harmonic_mean(values: Floats) -> Floats:
    """Over the last axis, [...]; 0 where a value is 0. Scaled by the smallest value, so that nothing overflows."""
    smallest = values.min(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        parts = np.where(smallest > 0, smallest / values, np.inf)
    return values.shape[-1] * smallest[..., 0] / parts.sum(axis=-1)


# -- Memorisation ----------------------------------------------------------------------------------------------------


def exact_memorisation(hits: ArrayLike) -> float:
    """Share of answer tokens [T] that are the most likely one when the answer before them is fed in; 0 for none."""
    found = np.asarray(hits, dtype=bool)
    return float(found.mean()) if found.size else 0.0


def extraction_strength(hits: ArrayLike, *, reference_compat: bool = False) -> float:
    """Length of the longest suffix of the answer whose tokens [T] are all most likely, divided by T; 0 for none.

    Never above `exact_memorisation`; 1 exactly where that is 1.

    Args:
        reference_compat: return 1/T instead of 0 where not even the last token is right, as OpenUnlearning's code
            does.
    """
    found = np.asarray(hits, dtype=bool)
    if not found.size:
        return 0.0
    misses = np.flatnonzero(~found)
    suffix = found.size - 1 - misses[-1] if misses.size else found.size
    return float(max(suffix, 1) if reference_compat else suffix) / found.size


# -- Membership attacks: a larger score means less likely a member of the training set -------------------------------


def zlib_score(nll: float, text: str) -> float:
    """NLL / bytes of the zlib-compressed text (https://huggingface.co/papers/2012.07805)."""
    return float(nll) / len(zlib.compress(text.encode()))


def min_k(log_probs: ArrayLike, k: float = 0.4) -> float:
    """Minus the mean of the lowest share `k` (at least one) of the token log-probabilities [T]; 0 for no token.

    https://huggingface.co/papers/2310.16789; MUSE's privacy leakage uses k = 0.4.
    """
    values = _floats(log_probs)
    return -float(np.sort(values)[: max(1, int(values.size * k))].mean()) if values.size else 0.0


def min_k_plus_plus(log_probs: ArrayLike, mean: ArrayLike, variance: ArrayLike, k: float = 0.4) -> float:
    """`min_k` of (log p(y_t) − μ_t) / σ_t (https://huggingface.co/papers/2404.02936).

    Args:
        log_probs: [T], of the answer's tokens.
        mean, variance: [T], of log p over the vocabulary under p itself; the variance is at least 1e-6.
    """
    deviation = np.sqrt(np.maximum(_floats(variance), _VARIANCE_FLOOR))
    return min_k((_floats(log_probs) - _floats(mean)) / deviation, k)


def reference_score(nll: ArrayLike, reference_nll: ArrayLike) -> Floats:
    """NLL − NLL of a reference model, [n]: what the reference finds easy too says nothing about membership."""
    return _floats(nll) - _floats(reference_nll)


def auc(forget: ArrayLike, holdout: ArrayLike) -> float:
    """Probability that a holdout score [m] exceeds a forget score [n], ties counting ½ (Mann-Whitney).

    1: the forget rows are plainly training data; ½: they cannot be told from unseen rows; below ½: they look less seen
    than rows that were never seen, which gives the unlearning away as well.

    Raises:
        ValueError: an empty sample or NaN.
    """
    first, second = _floats(forget), _floats(holdout)
    if not first.size or not second.size or np.isnan(first).any() or np.isnan(second).any():
        raise ValueError(
            f"forget ({first.size}) and holdout ({second.size} scores): give one per row of both splits, none of them NaN."
        )
    return float(_auc(first, second))


def auc_interval(forget: ArrayLike, holdout: ArrayLike, **options: Any) -> tuple[float, float]:
    """Bootstrap interval of `auc`, drawing the rows of both splits; see `bootstrap_of`."""
    return bootstrap_of(_auc, [forget, holdout], **options)


def _auc(forget: Floats, holdout: Floats) -> Floats:
    """[...] from scores [..., n] and [..., m]."""
    n, m = forget.shape[-1], holdout.shape[-1]
    ranks = optional_import("scipy.stats", "unlearning").rankdata(np.concatenate([forget, holdout], axis=-1), axis=-1)
    return (ranks[..., n:].sum(axis=-1) - m * (m + 1) / 2) / (n * m)


def privleak(auc: float, reference: float = 0.5) -> float:
    """MUSE's privacy leakage ((1−AUC) − (1−AUC_ref)) / (1−AUC_ref) · 100, in percent.

    0 is ideal, far below 0 the membership still shows, far above 0 the model is over-unlearned.

    Args:
        reference: AUC of the retrained model; ½ if there is none.

    Raises:
        ValueError: AUC_ref = 1, against which nothing can be measured.
    """
    if reference >= 1:
        raise ValueError(
            "privleak: the AUC of the retrained model is 1, so it separates forget from holdout completely; use a "
            "holdout of the same kind as the forget rows."
        )
    return (reference - auc) / (1 - reference) * 100


def relative_difference(auc: float, reference: float = 0.5) -> float:
    """(AUC − AUC_ref) / AUC_ref · 100, in percent (`rel_diff` of OpenUnlearning); NaN where AUC_ref = 0."""
    return math.nan if reference == 0 else (auc - reference) / reference * 100


# -- Texts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RougeL:
    """ROUGE-L of one generated text: recall (TOFU) and F1 (MUSE)."""

    recall: float
    f1: float


def rouge_l(generated: str, reference: str) -> RougeL:
    """Longest common subsequence of stemmed words, by rouge-score.

    rouge-score reads only a-z and 0-9 and would give any Greek or Chinese answer 0, as if it were forgotten. Where the
    reference has letters beyond Latin, words are split by Unicode's rules instead, ideographs and kana one by one.
    Where it has no word ("½", "€", "!!!"), characters are compared.
    """
    if any(ord(letter) > _LAST_LATIN and letter.isalpha() for letter in reference):
        scorer = _rouge_scorer(_WORDS)
    else:
        scorer = _rouge_scorer(None if re.search("[a-z0-9]", reference.lower()) else _CHARACTERS)
    score = scorer.score(reference, generated)["rougeL"]
    return RougeL(float(score.recall), float(score.fmeasure))


@dataclass(frozen=True)
class _Parts:
    """The tokenizer protocol of rouge-score."""

    pattern: re.Pattern[str]

    def tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text.casefold())


@lru_cache(maxsize=3)
def _rouge_scorer(parts: re.Pattern[str] | None) -> Any:
    scorer = optional_import("rouge_score.rouge_scorer", "unlearning").RougeScorer
    return scorer(["rougeL"], use_stemmer=True) if parts is None else scorer(["rougeL"], tokenizer=_Parts(parts))


# -- How sure a number is --------------------------------------------------------------------------------------------


def bootstrap_of(
    statistic: Callable[..., Floats],
    samples: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic of one or more samples, drawing the rows of each again with replacement.

    For the mean of one sample see `hf_ext.metrics.statistics.bootstrap_interval`.

    Args:
        statistic: [resamples] from arrays [resamples, rows, ...]. Rows of one sample stay together, so that several
            scores of the same rows belong into one array.

    Returns:
        (low, high); the same input gives the same answer.
    """
    arrays = [_floats(sample) for sample in samples]
    generator = np.random.default_rng(seed)
    step = max(1, _MAX_DRAWS_AT_ONCE // sum(array.size for array in arrays))
    values: list[float] = []
    while len(values) < resamples:
        rounds = min(step, resamples - len(values))
        values.extend(statistic(*(a[generator.integers(0, len(a), (rounds, len(a)))] for a in arrays)))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _floats(values: ArrayLike) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _logsumexp(values: Floats) -> Floats:
    """log Σ exp over the last axis."""
    return np.logaddexp.reduce(values, axis=-1)
