"""Turns rows into tokens and scores all their answers in one teacher-forced pass."""

from __future__ import annotations

import math
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
from hf_ext.metrics.unlearning.rows import Row, read_rows

# Scored tokens per forward pass of one answer; a longer answer is scored in pieces, each after all that precedes it.
_PIECE = 256
# Logits that are turned into float32 log-probabilities at a time: 4 MB, which stay in the processor's cache.
_ELEMENTS = 2**20
# Stands for an answer while a template is rendered, to see what the template writes around it.
_MARK = "\ue000"

# Token ids of a prompt and of what is scored after it.
Pair = tuple[tuple[int, ...], tuple[int, ...]]


class NotFiniteError(ValueError):
    """A log-probability is NaN or −∞."""


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes tokens; models are comparable only under the same format.

    Attributes:
        separator: text between a plain prompt and its answer.
        chat_template: wrap plain prompts as a user turn with the tokenizer's chat template. A prompt that is a list of
            messages always goes through the template.
        append_eos: score what ends an answer too: the end token, or all that the template writes up to it. It counts
            in the probability of an answer and in the membership attacks made of its loss (`loss`, `zlib`), as in
            OpenUnlearning; in memorisation, Min-K% and the gradient norm it does not, where it would be a token that
            every model gets right.
    """

    separator: str = " "
    chat_template: bool = False
    append_eos: bool = True


@dataclass(frozen=True)
class TokenScores:
    """One answer, token by token: its log-probabilities in nats, and whether greedy decoding would give each.

    Attributes:
        log_probs: log p(y_t | prompt, y_<t), float64 [T].
        hits: whether y_t is the most likely token, bool [T].
        closing: how many of the last tokens end the text and are not part of the answer.
        mean, variance: of log p over the vocabulary under p, float64 [T]; None unless asked for.
    """

    log_probs: Floats
    hits: NDArray[np.bool_]
    closing: int = 0
    mean: Floats | None = None
    variance: Floats | None = None

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per token, the closing ones included."""
        return -float(self.log_probs.mean())

    @property
    def content(self) -> TokenScores:
        """The same without the closing tokens."""
        if not self.closing:
            return self
        keep = slice(0, -self.closing)
        moments = [None if moment is None else moment[keep] for moment in (self.mean, self.variance)]
        return TokenScores(self.log_probs[keep], self.hits[keep], 0, *moments)


@dataclass(frozen=True)
class AnswerScores:
    """Scores of a row's answer, of its paraphrase, and of the perturbed answers, as far as the row has them."""

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
    return TokenScores(columns[0], columns[1], 0, *columns[2:])


class RowEncoder:
    """Token ids of prompts and of prompt-answer pairs, with an exact boundary between them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: PromptFormat, sample: str = "a") -> None:
        self.tokenizer = tokenizer
        self.format = format
        self._plain = PromptEncoder(tokenizer, separator=format.separator, sample=sample)

    def prompt(self, row: Row) -> list[int]:
        """Ids the model sees before it answers."""
        turns = self._turns(row)
        # A rendered conversation brings its own special tokens.
        return self._plain.prompt(str(row.prompt)) if turns is None else self._ids(self._render(turns))

    def pair(self, row: Row, answer: str) -> tuple[list[int], list[int], int]:
        """Ids of the prompt, ids of the answer and what closes it, and how many of the latter close it."""
        turns = self._turns(row)
        if turns is None:
            prompt_ids, answer_ids, closing = self._plain_pair(str(row.prompt), answer)
        else:
            prompt_ids, answer_ids, closing = self._rendered_pair(turns, answer)
        if not prompt_ids:
            raise ValueError("the prompt has no token; write a prompt, or use a tokenizer that puts BOS in front.")
        return prompt_ids, answer_ids + closing, len(closing)

    def _plain_pair(self, prompt: str, answer: str) -> tuple[list[int], list[int], list[int]]:
        # Two blanks before the answer make any answer improbable, as if it were forgotten.
        if prompt != prompt.rstrip() and self.format.separator[:1].isspace():
            raise ValueError(
                f"the prompt {prompt[-20:]!r} ends in white space and the separator adds more; strip the prompt, or "
                "pass format=PromptFormat(separator='')."
            )
        return *self._plain.pair(prompt, answer), self._eos()

    def _rendered_pair(self, turns: list[dict[str, str]], answer: str) -> tuple[list[int], list[int], list[int]]:
        """Cut out of the whole conversation, as trainers render and tokenise it.

        The prompt for generation with the answer behind it may be another text: templates put blanks or empty think
        blocks in front of what an assistant said, and blanks behind it. What comes before the answer is given, and a
        token that lies across either end of the answer's text is scored.
        """
        lead, _, tail = self._closed(turns, _MARK).rpartition(_MARK)
        if self._closed(turns, answer) != lead + answer + tail:
            raise ValueError(
                f"the chat template changes the answer {answer[:60]!r}, so that it cannot be found in the conversation; "
                "change the answer, or the template."
            )
        spoken = self._ids(lead + answer)
        start = min(_shared(self._ids(lead), spoken), len(spoken) - 1)
        closed = self._ids(lead + answer + tail)
        end = max(_shared(spoken, closed), start + 1)
        specials = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        last = next((index for index in range(end, len(closed)) if closed[index] in specials), None)
        if not self.format.append_eos or last is None:
            return spoken[:start], spoken[start:], self._eos()
        return closed[:start], closed[start:end], closed[end : last + 1]

    def _turns(self, row: Row) -> list[dict[str, str]] | None:
        if isinstance(row.prompt, str):
            return [{"role": "user", "content": row.prompt}] if self.format.chat_template else None
        return [dict(turn) for turn in row.prompt]

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        options = {"add_generation_prompt": True, **options}
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **options))

    def _closed(self, turns: list[dict[str, str]], answer: str) -> str:
        return self._render([*turns, {"role": "assistant", "content": answer}], add_generation_prompt=False)

    def _eos(self) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [end] if self.format.append_eos and end is not None else []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


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
    encoded: dict[Pair, bool] = {}
    plan: dict[str, list[list[tuple[Pair, int]]]] = {}
    for split, rows in splits.items():
        plan[split] = [encoded_answers(encoder, row, split, context) for row in rows]
        for answers in plan[split]:
            for index, (pair, _) in enumerate(answers):
                encoded[pair] = encoded.get(pair, False) or (index == 0 and split in with_moments)
    found = _score_pairs(runner, encoded)
    result: dict[str, list[AnswerScores]] = {}
    for split, rows in splits.items():
        result[split] = []
        for row, answers in zip(rows, plan[split], strict=True):
            scores = [replace(found[pair], closing=closing) for pair, closing in answers]
            for text, score in zip(row.answers, scores, strict=True):
                _check_finite(score, split, row, text)
            first, rest = scores[0], scores[1:]
            paraphrase = rest.pop(0) if row.paraphrase is not None else None
            result[split].append(AnswerScores(first, paraphrase, tuple(rest)))
    return result


def encoded_answers(encoder: RowEncoder, row: Row, split: str, context: int) -> list[tuple[Pair, int]]:
    """Every answer of a row as token ids, with the number of tokens that close it.

    Raises:
        ValueError: a prompt that cannot be joined with its answer, or more tokens than `context`; names split and row.
    """
    found = []
    for answer in row.answers:
        try:
            prompt_ids, answer_ids, closing = encoder.pair(row, answer)
        except ValueError as error:
            raise ValueError(f"split {split!r}, row {row.id!r}: {error}") from error
        if len(prompt_ids) + len(answer_ids) > context:
            raise ValueError(
                f"split {split!r}, row {row.id!r}: {len(prompt_ids)} prompt and {len(answer_ids)} answer tokens do "
                f"not fit into the context of {context}; shorten the row."
            )
        found.append(((tuple(prompt_ids), tuple(answer_ids)), closing))
    return found


def answer_pieces(pair: Pair) -> list[ScoredSequence]:
    """The tokens of an answer that one forward pass scores, one piece after the other."""
    prompt, answer = pair
    ids = prompt + answer
    starts = range(len(prompt), len(ids), _PIECE)
    return [ScoredSequence(ids[: start + _PIECE], start, len(prompt)) for start in starts]


def _score_pairs(runner: ModelRunner, pairs: Mapping[Pair, bool]) -> dict[Pair, TokenScores]:
    """Scores of each distinct (prompt, answer), with moments where the value is true."""
    pieces = [(pair, piece) for pair in pairs for piece in answer_pieces(pair)]
    parts: dict[int, TokenScores] = {}
    with runner.evaluating():
        for index, logits in runner.logits([piece for _, piece in pieces]):
            pair, piece = pieces[index]
            labels = torch.tensor(piece.ids[piece.scored_from :], device=logits.device)
            parts[index] = token_scores(logits, labels, moments=pairs[pair])
    joined: dict[Pair, list[TokenScores]] = {}
    for index, (pair, _) in enumerate(pieces):
        joined.setdefault(pair, []).append(parts[index])
    return {pair: _concatenate(scores) for pair, scores in joined.items()}


def _concatenate(scores: Sequence[TokenScores]) -> TokenScores:
    log_probs = np.concatenate([score.log_probs for score in scores])
    hits = np.concatenate([score.hits for score in scores])
    moments = ([s.mean for s in scores if s.mean is not None], [s.variance for s in scores if s.variance is not None])
    return TokenScores(log_probs, hits, 0, *(np.concatenate(parts) if parts else None for parts in moments))


def _check_finite(score: TokenScores, split: str, row: Row, text: str) -> None:
    if np.isfinite(score.log_probs).all():
        return
    value = score.log_probs[~np.isfinite(score.log_probs)][0]
    remedy = (
        "load the model in float32 and check its weights for NaN"
        if math.isnan(value)
        else "a logit is masked with −∞; evaluate the model without the mask"
    )
    raise NotFiniteError(
        f"split {split!r}, row {row.id!r}: a log-probability of the answer {text[:60]!r} is {value}; {remedy}"
    )
