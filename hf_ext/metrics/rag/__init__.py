"""How good answers from retrieved passages are, and how much worse they become when passages mislead."""

from hf_ext.metrics.rag.conditions import ADVERSARIAL, CLOSED_BOOK, NO_GOLD, Condition, Question, read_questions
from hf_ext.metrics.rag.evaluate import evaluate_rag
from hf_ext.metrics.rag.matching import AnswerMatcher, exact_match, normalize_answer, token_f1
from hf_ext.metrics.rag.report import RagComparison, RagReport, compare

__all__ = [
    "ADVERSARIAL",
    "CLOSED_BOOK",
    "NO_GOLD",
    "AnswerMatcher",
    "Condition",
    "Question",
    "RagComparison",
    "RagReport",
    "compare",
    "evaluate_rag",
    "exact_match",
    "normalize_answer",
    "read_questions",
    "token_f1",
]
