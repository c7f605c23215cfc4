"""Ask a reader the same questions with ever worse passages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hf_ext.metrics.rag.conditions import Condition, Question, read_questions
from hf_ext.metrics.rag.matching import AnswerMatcher, contains_answer, exact_match, is_refusal, token_f1
from hf_ext.metrics.rag.report import RagReport

# Takes questions with their passages, and gives a dict with `answer`, and `rationale` if there is one, for each.
Reader = Callable[[list[dict[str, Any]]], Sequence[Mapping[str, Any]]]
# Answers that counterfactual passages choose from.
_WRONG_ANSWERS = 200
DEFAULT_CONDITIONS = (
    Condition(distractors=0),
    Condition(distractors=2),
    Condition(distractors=4),
    Condition(distractors=8),
    Condition(adversarial=1),
    Condition(gold=False, distractors=4),
    Condition(gold=False),
)


def evaluate_rag(
    reader: Reader,
    questions: Iterable[Mapping[str, Any]] | Sequence[Question],
    conditions: Sequence[Condition] = DEFAULT_CONDITIONS,
    *,
    matcher: AnswerMatcher | None = None,
    seed: int = 0,
) -> RagReport:
    """Answers under every condition, judged.

    Args:
        reader: called once per condition with a list of `{"question", "documents"}`, such as our `rag-question-answering` pipeline.
        questions: rows as `read_questions` takes them, or its result.
        conditions: passages that come with the questions. A question that has too few of them is left out of a condition, and
            the report says how many were asked.
        matcher: what `correct` is judged by; by default exact match.
        seed: of the choice and the order of passages.

    Raises:
        ValueError: questions that cannot be used, conditions without a question or of the same name, or a reader that gives another number of answers.
    """
    asked = [q for q in questions if isinstance(q, Question)] if _are_read(questions) else read_questions(questions)  # type: ignore[arg-type]
    names = [condition.name for condition in conditions]
    if len(set(names)) < max(len(names), 1):
        raise ValueError(f"conditions: {names}: give at least one, with different names.")
    matcher = matcher or AnswerMatcher()
    records: list[dict[str, Any]] = []
    pool = [(question.id, question.answers[0]) for question in asked[:_WRONG_ANSWERS]]
    for condition in conditions:
        inputs: list[dict[str, Any]] = []
        rows: list[Question] = []
        for question in asked:
            others = [answer for name, answer in pool if name != question.id] if condition.adversarial else []
            passages = condition.passages(question, others, seed)
            if passages is not None:
                rows.append(question)
                inputs.append({"question": question.question, "documents": [dict(passage) for passage in passages]})
        if not rows:
            raise ValueError(
                f"condition {condition.name!r}: no question has passages for it; give `documents` with `is_gold`, or leave it out."
            )
        answers = list(reader(inputs))
        if len(answers) != len(rows):
            raise ValueError(f"the reader gave {len(answers)} answers to {len(rows)} questions; return one for each.")
        for found in answers:
            if not isinstance(found, Mapping) or "answer" not in found:
                raise ValueError(
                    f"the reader gave {found!r}; give a mapping with answer, and rationale if there is one."
                )
        for question, given, found in zip(rows, inputs, answers, strict=True):
            records.append({"condition": condition.name, **_judged(question, given["documents"], found, matcher)})
    return RagReport(tuple(names), records, {"match": matcher.match, "seed": seed, "questions": len(asked)})


def _are_read(questions: Any) -> bool:
    return isinstance(questions, Sequence) and bool(questions) and isinstance(questions[0], Question)


def _judged(
    question: Question, passages: Sequence[Mapping[str, str]], found: Mapping[str, Any], matcher: AnswerMatcher
) -> dict[str, Any]:
    answer, rationale = str(found["answer"] or ""), str(found.get("rationale") or "")
    return {
        "id": question.id,
        "answer": answer,
        "rationale": rationale,
        "correct": float(matcher(answer, question.answers)),
        "exact_match": float(exact_match(answer, question.answers)),
        "f1": token_f1(answer, question.answers),
        "accuracy": float(contains_answer(answer, question.answers)),
        "refusal": float(is_refusal(answer)),
        "unanswered": float(not answer.strip()),
        "rationale_words": float(len(rationale.split())),
        "answer_in_passages": float(any(contains_answer(p["text"], question.answers) for p in passages)),
    }
