"""How a single answer is judged. One protocol, one column: their numbers are never mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hf_ext.metrics.editing import scoring
from hf_ext.metrics.editing.probes import Probe
from hf_ext.metrics.editing.records import AliasGroups

Judge = Callable[[str, str, str], float]
Tokens = tuple[int, ...]

TEACHER_FORCED = ("teacher_forced_token", "teacher_forced_exact")
GENERATED = ("generate_exact", "generate_contains", "generate_judge")
PROTOCOLS = TEACHER_FORCED + GENERATED


def score_tokens(protocol: str, predicted: Tokens, reference: Tokens) -> float:
    """Score of teacher-forced predictions against the answer's tokens or, for locality, against those of before."""
    compare = scoring.token_accuracy if protocol == "teacher_forced_token" else scoring.token_exact
    return compare(predicted, reference)


def score_answer(
    protocol: str, probe: Probe, raw: str, stops: Sequence[str], policy: str, judge: Judge | None
) -> float:
    """Score of a generated text against the accepted answers of a probe, under an answer policy."""

    def score(answer: str) -> float:
        prediction = answer_text(raw, answer, stops)
        if protocol == "generate_exact":
            return scoring.answers_exactly(prediction, answer)
        if protocol == "generate_contains":
            return scoring.answer_contained(prediction, answer)
        return _judged(judge, probe.prompt, answer, prediction)

    groups = considered_answers(probe.answers, policy)
    return scoring.reduce_answers([[score(answer) for answer in group] for group in groups], policy)


def considered_answers(answers: AliasGroups, policy: str) -> AliasGroups:
    """The answers a policy looks at: under `"first"` the first alias of the first group alone."""
    return ((answers[0][0],),) if policy == "first" else answers


def score_unchanged(
    protocol: str, probe: Probe, before: str, after: str, stops: Sequence[str], judge: Judge | None
) -> float:
    """Locality of a generated text: is it what the model wrote before? The truth of either does not matter.

    `generate_exact` asks for equal texts, `generate_contains` whether the text of before is part of the text of now, and a
    judge compares the two.
    """
    old, new = scoring.cut_at_stop(before, stops), scoring.cut_at_stop(after, stops)
    if protocol == "generate_judge":
        return _judged(judge, probe.prompt, old, new)
    # An empty text is part of every text; equality is then all that can be asked for.
    return float(old in new if protocol == "generate_contains" and old else old == new)


def answer_text(raw: str, answer: str, stops: Sequence[str]) -> str:
    """The part of a generated text that is compared with `answer`: up to the first stop string.

    A stop string that is part of the answer itself counts only from the answer's last character on, so that "J. K. Rowling"
    can be answered at all where "." stops.
    """
    inside = [stop for stop in stops if stop in answer]
    text = scoring.cut_at_stop(raw, [stop for stop in stops if stop not in inside])
    return scoring.cut_at_stop(text, inside, start=len(answer) - 1)


def open_stops(probe: Probe, stops: Sequence[str]) -> tuple[str, ...]:
    """Stop strings that may end the decoding of a probe: those inside no accepted answer."""
    if probe.section == "locality":
        return tuple(stops)
    return tuple(stop for stop in stops if not any(stop in answer for group in probe.answers for answer in group))


def _judged(judge: Judge | None, prompt: str, answer: str, prediction: str) -> float:
    assert judge is not None  # the evaluator refuses `generate_judge` without one
    score = float(judge(prompt, answer, prediction))
    if not 0 <= score <= 1:
        raise ValueError(
            f"judge returned {score} for the prompt {prompt!r}; return a truth value or a score in [0, 1]."
        )
    return score
