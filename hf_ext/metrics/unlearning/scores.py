"""Reads prompt-answer rows and scores all their answers in one teacher-forced pass."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_ext.metrics.editing.checks import context_length
from hf_ext.metrics.editing.encoding import PromptEncoder
from hf_ext.metrics.editing.inference import ModelRunner, ScoredSequence
from hf_ext.metrics.unlearning.measures import Floats

# Scored tokens per forward pass of one answer; a longer answer is scored in pieces, each after all that precedes it.
_PIECE = 256
# Logits that are turned into float32 log-probabilities at a time: 4 MB, which stay in the processor's cache.
_ELEMENTS = 2**20

Message = Mapping[str, str]


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes tokens; models are comparable only under the same format.

    Attributes:
        separator: text between a plain prompt and its answer.
        chat_template: wrap plain prompts as a user turn with the tokenizer's chat template. A prompt that is a list of
            messages always goes through the template.
        append_eos: score the end token after each answer too. It counts in the probability of an answer, and not in
            memorisation and membership, where it would be a token that every model gets right.
    """

    separator: str = " "
    chat_template: bool = False
    append_eos: bool = True


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
        return " ".join(re.findall(r"\w+", f"{self.prompt_text}\n{self.answer}".casefold()))

    def asked(self, prompt: str, suffix: str) -> Row:
        """The same row with another question, which takes the place of the last turn of a conversation."""
        new = prompt if isinstance(self.prompt, str) else (*self.prompt[:-1], {**self.prompt[-1], "content": prompt})
        return replace(self, id=f"{self.id}/{suffix}", prompt=new)

    @property
    def question(self) -> str:
        """The prompt, or what the user says last."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


@dataclass(frozen=True)
class TokenScores:
    """One answer, token by token.

    Attributes:
        log_probs: log p(y_t | prompt, y_<t), float64 [T].
        hits: whether y_t is the most likely token, bool [T].
        ended: whether the last token is an appended end token.
        mean, variance: of log p over the vocabulary under p, float64 [T]; None unless asked for.
    """

    log_probs: Floats
    hits: NDArray[np.bool_]
    ended: bool = False
    mean: Floats | None = None
    variance: Floats | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, the end token included."""
        return -float(self.log_probs.mean())

    @property
    def content(self) -> TokenScores:
        """The same without the end token."""
        if not self.ended:
            return self
        keep = slice(0, -1)
        moments = [None if moment is None else moment[keep] for moment in (self.mean, self.variance)]
        return TokenScores(self.log_probs[keep], self.hits[keep], False, *moments)


@dataclass(frozen=True)
class AnswerScores:
    """All answers of one row."""

    answer: TokenScores
    paraphrase: TokenScores | None = None
    perturbed: tuple[TokenScores, ...] = ()

    @property
    def correct_nll(self) -> float:
        """NLL of the right answer in the truth ratio: of the paraphrase where there is one."""
        return (self.paraphrase or self.answer).nll


def token_scores(logits: Tensor, labels: Tensor, *, moments: bool = False) -> TokenScores:
    """Scores of labels [T] under the logits [T, V] that predict them, a few rows at a time in float32."""
    parts: list[list[Tensor]] = []
    step = max(1, _ELEMENTS // logits.shape[-1])
    for rows, targets in zip(logits.split(step), labels.split(step), strict=True):
        log_probs = rows.float().log_softmax(-1)
        part = [log_probs.gather(-1, targets[:, None])[:, 0].double(), rows.argmax(-1) == targets]
        if moments:
            probs = log_probs.exp()
            # A token of probability 0 adds nothing, while 0 · −∞ would be NaN.
            log_probs.masked_fill_(probs == 0, 0)
            mean = torch.linalg.vecdot(probs, log_probs)
            variance = torch.linalg.vecdot(probs, log_probs.sub_(mean[:, None]).square_())
            part += [mean.double(), variance.double()]
        parts.append(part)
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return TokenScores(columns[0], columns[1], False, *columns[2:])


class RowEncoder:
    """Token ids of prompts and of prompt-answer pairs, with an exact boundary between them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: PromptFormat, sample: str = "a") -> None:
        self.tokenizer = tokenizer
        self.format = format
        self._plain = PromptEncoder(tokenizer, separator=format.separator, sample=sample)
        # A rendered conversation brings its own special tokens and its own white space before the answer.
        self._rendered = PromptEncoder(tokenizer, separator="", add_special_tokens=False)

    def prompt(self, row: Row) -> list[int]:
        """Ids the model sees before it answers."""
        turns = self._turns(row)
        return self._plain.prompt(str(row.prompt)) if turns is None else self._rendered.prompt(self._render(turns))

    def pair(self, row: Row, answer: str) -> tuple[list[int], list[int], bool]:
        """Ids of the prompt, ids of the answer, and whether an end token was appended to the latter."""
        turns = self._turns(row)
        if turns is None:
            text = str(row.prompt)
            # Two blanks before the answer make any answer improbable, as if it were forgotten.
            if text != text.rstrip() and self.format.separator[:1].isspace():
                raise ValueError(
                    f"the prompt {text[-20:]!r} ends in white space and the separator adds more; strip the prompt, or "
                    "pass format=PromptFormat(separator='')"
                )
            prompt_ids, answer_ids = self._plain.pair(text, answer)
            end = self.tokenizer.eos_token_id
        else:
            prompt_ids, answer_ids = self._rendered.pair(self._render(turns), answer)
            end = self._end_of_turn(turns, answer)
        if not prompt_ids:
            raise ValueError("the prompt has no token; write a prompt, or use a tokenizer that puts BOS in front")
        appended = self.format.append_eos and end is not None
        return prompt_ids, [*answer_ids, end] if appended else answer_ids, appended

    def _turns(self, row: Row) -> list[dict[str, str]] | None:
        if isinstance(row.prompt, str):
            return [{"role": "user", "content": row.prompt}] if self.format.chat_template else None
        return [dict(turn) for turn in row.prompt]

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        options = {"add_generation_prompt": True, **options}
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

    def _end_of_turn(self, turns: list[dict[str, str]], answer: str) -> int | None:
        """The special token with which the template closes an assistant's turn; EOS if it has none."""
        closed = self._render([*turns, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        _, found, after = closed.rpartition(answer)
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
        specials = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return next((token for token in ids if token in specials), self.tokenizer.eos_token_id)


def answer_scores(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any] | Row],
    *,
    batch_size: int = 8,
    format: PromptFormat | None = None,
    moments: bool = False,
    split: str = "rows",
) -> list[AnswerScores]:
    """Scores the answer, the paraphrase and the perturbed answers of every row in one pass over the model.

    Rows are batched by length and the output head runs on answer positions only, at most a few hundred at a time; no
    [batch, length, vocabulary] tensor is made. Batch size and padding side change speed only.

    Args:
        model: causal language model, plain, quantised, or with adapters.
        tokenizer: its tokenizer.
        rows: dicts with `prompt` (a string or a list of messages) and `answer`, optionally `id`, `paraphrase` and
            `perturbed` (a list).
        batch_size: sequences per forward pass.
        format: how prompt and answer are joined.
        moments: also return mean and variance of log p over the vocabulary, which Min-K%++ needs.
        split: name of the rows in error messages.

    Returns:
        One `AnswerScores` per row, in their order.

    Raises:
        ValueError: a broken row, a sequence longer than the model's context, or a log-probability that is not finite.
    """
    checked = read_rows(rows, split)
    runner = ModelRunner(model, tokenizer, batch_size)
    encoder = RowEncoder(tokenizer, format or PromptFormat(), checked[0].answer)
    return score_rows(runner, encoder, {split: checked}, moments={split} if moments else set())[split]


def score_rows(
    runner: ModelRunner, encoder: RowEncoder, splits: Mapping[str, Sequence[Row]], *, moments: Iterable[str] = ()
) -> dict[str, list[AnswerScores]]:
    """`answer_scores` of several splits in one pass; `moments` names the splits whose answers need them."""
    with_moments = set(moments)
    context = context_length(runner.model, runner.tokenizer)
    encoded: dict[tuple[tuple[int, ...], tuple[int, ...]], bool] = {}
    plan: dict[str, list[list[tuple[tuple[int, ...], tuple[int, ...], bool]]]] = {}
    for split, rows in splits.items():
        plan[split] = []
        for row in rows:
            answers = []
            for index, answer in enumerate(_answers(row)):
                try:
                    prompt_ids, answer_ids, ended = encoder.pair(row, answer)
                except ValueError as error:
                    raise ValueError(f"split {split!r}, row {row.id!r}: {error}") from error
                if len(prompt_ids) + len(answer_ids) > context:
                    raise ValueError(
                        f"split {split!r}, row {row.id!r}: {len(prompt_ids)} prompt and {len(answer_ids)} answer "
                        f"tokens do not fit into the context of {context}; shorten the row"
                    )
                item = (tuple(prompt_ids), tuple(answer_ids), ended)
                encoded[item[:2]] = encoded.get(item[:2], False) or (index == 0 and split in with_moments)
                answers.append(item)
            plan[split].append(answers)
    found = _score_pairs(runner, encoded)
    result: dict[str, list[AnswerScores]] = {}
    for split, rows in splits.items():
        result[split] = []
        for row, answers in zip(rows, plan[split], strict=True):
            scores = [replace(found[prompt, answer], ended=ended) for prompt, answer, ended in answers]
            for text, score in zip(_answers(row), scores, strict=True):
                _check_finite(score, split, row, text)
            first, rest = scores[0], scores[1:]
            paraphrase = rest.pop(0) if row.paraphrase is not None else None
            result[split].append(AnswerScores(first, paraphrase, tuple(rest)))
    return result


def _score_pairs(
    runner: ModelRunner, pairs: Mapping[tuple[tuple[int, ...], tuple[int, ...]], bool]
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], TokenScores]:
    """Scores of each distinct (prompt, answer), with moments where the value is true."""
    pieces: list[tuple[tuple[tuple[int, ...], tuple[int, ...]], ScoredSequence]] = []
    for prompt, answer in pairs:
        ids = prompt + answer
        for start in range(len(prompt), len(ids), _PIECE):
            pieces.append(((prompt, answer), ScoredSequence(ids[: start + _PIECE], start, len(prompt))))
    parts: dict[int, TokenScores] = {}
    with runner.evaluating():
        for index, logits in runner.logits([piece for _, piece in pieces]):
            pair, piece = pieces[index]
            labels = torch.tensor(piece.ids[piece.scored_from :], device=logits.device)
            parts[index] = token_scores(logits, labels, moments=pairs[pair])
    joined: dict[tuple[tuple[int, ...], tuple[int, ...]], list[TokenScores]] = {}
    for index, (pair, _) in enumerate(pieces):
        joined.setdefault(pair, []).append(parts[index])
    return {pair: _concatenate(scores) for pair, scores in joined.items()}


def _concatenate(scores: Sequence[TokenScores]) -> TokenScores:
    log_probs = np.concatenate([score.log_probs for score in scores])
    hits = np.concatenate([score.hits for score in scores])
    moments = ([s.mean for s in scores if s.mean is not None], [s.variance for s in scores if s.variance is not None])
    return TokenScores(log_probs, hits, False, *(np.concatenate(parts) if parts else None for parts in moments))


def _answers(row: Row) -> list[str]:
    return [row.answer, *([] if row.paraphrase is None else [row.paraphrase]), *row.perturbed]


def _check_finite(score: TokenScores, split: str, row: Row, text: str) -> None:
    if np.isfinite(score.log_probs).all():
        return
    value = score.log_probs[~np.isfinite(score.log_probs)][0]
    remedy = (
        "load the model in float32 and check its weights for NaN"
        if math.isnan(value)
        else "a logit is masked with −∞; evaluate the model without the mask"
    )
    raise ValueError(
        f"split {split!r}, row {row.id!r}: a log-probability of the answer {text[:60]!r} is {value}; {remedy}"
    )


# -- Rows -------------------------------------------------------------------------------------------------------------


def read_rows(rows: Iterable[Mapping[str, Any] | Row], split: str) -> list[Row]:
    """Reads and checks the rows of a split.

    Raises:
        ValueError: no row, a missing or empty field, a wrong type, an id that occurs twice, unequal numbers of
            perturbed answers, or a perturbed answer that equals the right one. The message names split, row and
            remedy.
    """
    found = [row if isinstance(row, Row) else _row(row, split, index) for index, row in enumerate(rows)]
    if not found:
        raise ValueError(f"split {split!r} has no rows; leave it out, or fill it")
    places: dict[str, int] = {}
    for index, row in enumerate(found):
        where = f"split {split!r}, row {index} (id {row.id!r})"
        if row.id in places:
            raise ValueError(
                f"{where}: the id already belongs to row {places[row.id]}; give every row its own, or none"
            )
        places[row.id] = index
        if len(row.perturbed) != len(found[0].perturbed):
            raise ValueError(
                f"{where}: {len(row.perturbed)} perturbed answers, but row 0 has {len(found[0].perturbed)}; give "
                "every row the same number"
            )
        right = {row.answer, row.paraphrase}
        same = [text for text in row.perturbed if text in right]
        if same:
            raise ValueError(f"{where}: the perturbed answer {same[0]!r} is the right answer; replace it")
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
                "out of one of them, or the result says nothing"
            )


def digest(rows: Sequence[Row]) -> str:
    """Identifies the questions and answers of a split."""
    content = [[row.id, row.prompt_text, *_answers(row), *row.prompt_paraphrases, row.context] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _row(row: Mapping[str, Any], split: str, index: int) -> Row:
    if not isinstance(row, Mapping):
        raise ValueError(f"split {split!r}, row {index}: expected a dict, got {type(row).__name__}")
    given = row.get("id")
    where = f"split {split!r}, row {index}" + (f" (id {given!r})" if given is not None else "")
    for name in ("prompt", "answer"):
        if row.get(name) is None:
            raise ValueError(f"{where}: no {name!r} among the columns {sorted(row)}; rename the one that holds it")
    return Row(
        id=str(index if given is None else given),
        prompt=_prompt(row["prompt"], where),
        answer=_text(row["answer"], where, "answer"),
        paraphrase=None if row.get("paraphrase") is None else _text(row["paraphrase"], where, "paraphrase"),
        perturbed=_texts(row.get("perturbed"), where, "perturbed"),
        prompt_paraphrases=_texts(row.get("prompt_paraphrases"), where, "prompt_paraphrases"),
        context=None if row.get("context") is None else _text(row["context"], where, "context"),
    )


def _prompt(value: Any, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{where}: prompt={value!r} must be a string or a list of messages")
    for turn in value:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: the message {turn!r} of the prompt must have the strings 'role' and 'content'")
    if value[-1]["role"] != "user":
        raise ValueError(f"{where}: the prompt ends with the role {value[-1]['role']!r}; it must end with the user")
    return tuple(dict(turn) for turn in value)


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}={value!r} must be a string")
    if not value.strip():
        raise ValueError(f"{where}: {name}={value!r} is empty; write it, or drop the row")
    return value.strip()


def _texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: {name}={value!r} must be a list of strings")
    return tuple(_text(item, where, f"{name}[{index}]") for index, item in enumerate(value))
