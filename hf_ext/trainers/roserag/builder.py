"""`RoseRAGDatasetBuilder`: from questions and passages to preference pairs that a small model wrote itself.

The stages of https://huggingface.co/papers/2502.10993: rationales for the known answer, and the answer each leads to; rejection of those that lead
elsewhere; responses without the hint, whose wrong ones are what the model would really say; selection of the hardest pair.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from hf_ext.metrics.rag.conditions import Condition, Question, iter_questions
from hf_ext.metrics.rag.matching import AnswerMatcher, contains_answer, is_refusal
from hf_ext.pipelines.roserag.prompts import RagPrompts
from hf_ext.pipelines.roserag.retrievers import Retriever
from hf_ext.trainers.roserag.backends import BackendError, Scorer, TooLong, Writer
from hf_ext.trainers.roserag.dataset import in_memory, on_disk
from hf_ext.trainers.roserag.report import BuildReport
from hf_ext.trainers.roserag.sampling import Sampling, seed_of
from hf_ext.trainers.roserag.selection import NORMALIZATIONS, RULES, Dropped, score, select
from hf_ext.trainers.roserag.store import StageStore, digest_of, locked

logger = logging.getLogger(__name__)
_GREEDY, _ANSWER_TOKENS = 0.0, 64
# Answers of other questions that counterfactual passages choose from.
_WRONG_ANSWERS = 1000
# From this many questions without a response on, a server is taken to be down.
_OUTAGE = 16


@dataclass(frozen=True)
class _Row:
    """A question with the passages it is asked with."""

    id: str
    question: Question
    passages: list[dict[str, str]]


def _name(identity: str) -> str:
    return identity.partition("@")[0]


def _check_numbers(n_hinted: int, n_unhinted: int, n_docs: int, batch_size: int) -> None:
    for name, value, least in (
        ("n_hinted", n_hinted, 0),
        ("n_unhinted", n_unhinted, 0),
        ("n_docs", n_docs, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value!r}: give at least {least}.")
    if n_hinted + n_unhinted < 2:
        raise ValueError(f"n_hinted={n_hinted}, n_unhinted={n_unhinted}: a pair needs at least two responses.")


class RoseRAGDatasetBuilder:
    """Builds preference data for `RoseRAGTrainer` from questions and passages: pairs of responses that the model wrote itself.

    Args:
        writer: writes responses: the model that will be trained, in memory or behind a server.
        scorer: scores them as the trainer will: the model that will be trained; by default `writer`.
        retriever: finds passages of questions that bring none.
        prompts: what is asked; save it with the model (`prompts.save_pretrained`), which is to be asked the same.
        matcher: which answers are right.
        n_hinted: rationales per question that know the answer, >= 0.
        n_unhinted: responses per question that do not, >= 0.
        n_docs: passages to retrieve, >= 1.
        noise: conditions under which a question with `is_gold` passages is asked, a row for each; None: with the passages it has, or those retrieved.
        use_unhinted_correct: right answers to the plain prompt may be chosen too.
        selection: "hardest" (the paper's), "easiest" or "random".
        selection_score: log-probability of a response: "mean" over its tokens, or "sum".
        sampling: of the responses.
        seed: of responses, noise and random selection.
        batch_size: questions at once, between two writes to the disk.
        cache_dir: where finished work is kept; None keeps nothing, so that an interrupted build starts again.

    Raises:
        ValueError: a setting that cannot work.
    """

    def __init__(
        self,
        writer: Writer,
        scorer: Scorer | None = None,
        retriever: Retriever | None = None,
        prompts: RagPrompts | None = None,
        matcher: AnswerMatcher | None = None,
        *,
        n_hinted: int = 8,
        n_unhinted: int = 8,
        n_docs: int = 5,
        noise: Sequence[Condition] | None = None,
        use_unhinted_correct: bool = True,
        selection: str = "hardest",
        selection_score: str = "mean",
        sampling: Sampling | None = None,
        seed: int = 0,
        batch_size: int = 8,
        cache_dir: str | Path | None = None,
    ) -> None:
        _check_numbers(n_hinted=n_hinted, n_unhinted=n_unhinted, n_docs=n_docs, batch_size=batch_size)
        names = [condition.name for condition in noise or ()]
        if noise is not None and len(set(names)) < max(len(names), 1):
            raise ValueError(f"noise: {names}: give at least one condition, each once.")
        if noise is not None and retriever is not None:
            raise ValueError(
                "noise: its conditions take the passages of the questions, and a retriever would not be asked; leave one out."
            )
        if selection not in (*RULES, "random"):
            raise ValueError(f"selection={selection!r}: choose among {(*RULES, 'random')}.")
        if selection_score not in NORMALIZATIONS:
            raise ValueError(f"selection_score={selection_score!r}: choose among {NORMALIZATIONS}.")
        if scorer is None:
            if not isinstance(writer, Scorer):
                raise ValueError(
                    f"{type(writer).__name__} cannot score: give scorer=TransformersBackend(model, tokenizer) with the model that will be trained."
                )
            scorer = writer
        self.writer, self.scorer, self.retriever = writer, scorer, retriever
        self._identities = self._identify()
        if _name(self._identities["scorer"]) != _name(self._identities["writer"]):
            logger.warning(
                "responses are written by %(writer)s and scored by %(scorer)s: score with the model that will be trained.",
                self._identities,
            )
        self.prompts, self.matcher = prompts or RagPrompts(), matcher or AnswerMatcher()
        self.n_hinted, self.n_unhinted, self.n_docs, self.noise = n_hinted, n_unhinted, n_docs, noise
        self.use_unhinted_correct, self.selection, self.selection_score = (
            use_unhinted_correct,
            selection,
            selection_score,
        )
        self.sampling, self.seed, self.batch_size = sampling or Sampling(), seed, batch_size
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.report = BuildReport()
        self._wrong_answers: list[tuple[str, str]] = []

    # -- settings ----------------------------------------------------------------------------------------------------

    def _identify(self) -> dict[str, str]:
        writer = self.writer.identity
        return {"writer": writer, "scorer": writer if self.scorer is self.writer else self.scorer.identity}

    def _written_settings(self) -> dict[str, Any]:
        return {
            "writer": self._identities["writer"],
            "prompts": asdict(self.prompts),
            "sampling": asdict(self.sampling),
            "seed": self.seed,
        }

    def settings(self) -> dict[str, Any]:
        """All that the dataset depends on but the questions and the retriever."""
        return {
            **self._written_settings(),
            "scorer": self._identities["scorer"],
            "n_hinted": self.n_hinted,
            "n_unhinted": self.n_unhinted,
            "n_docs": self.n_docs,
            "noise": None if self.noise is None else [asdict(condition) for condition in self.noise],
            "use_unhinted_correct": self.use_unhinted_correct,
            "selection": self.selection,
            "selection_score": self.selection_score,
            "match": self.matcher.match,
        }

    # -- building ----------------------------------------------------------------------------------------------------

    def build(self, questions: Iterable[Mapping[str, Any]], output_dir: str | Path | None = None) -> Dataset:
        """Make the pairs.

        Args:
            questions: rows with `question`, `answers`, and optional `id` and `documents` (`title`, `text`, `is_gold`), such as a `datasets.Dataset`.
            output_dir: a folder for the dataset, which `datasets.load_from_disk` reads, with the settings and the report beside it. It must not exist.
                Without one the dataset is made in memory.

        Returns:
            Columns `prompt`, `chosen` and `rejected` for `RoseRAGTrainer`; `margin`, `chosen_score`, `rejected_score`; `question_id`, `n_correct`, `n_incorrect`
            and `candidates`, from which other pairs can be selected.

        Raises:
            ValueError: questions that cannot be used, a folder that exists, or not one pair.
            ConnectionError: many questions in a row got no response; what is finished is kept in `cache_dir`.
        """
        target = None if output_dir is None else Path(output_dir)
        if target is not None and target.exists():
            raise ValueError(f"output_dir={str(target)!r} exists: give another, or remove it.")
        rows: Any = questions if isinstance(questions, (Dataset, Sequence)) else list(questions)
        count = self._check(rows)
        # The weights may have changed since the last build.
        self._identities = self._identify()
        self.report = BuildReport(settings=self.settings())
        pairs = self._pairs(tqdm(self._rows(rows), total=count, desc="Building pairs", unit="question"))
        with locked(self.cache_dir):
            options = self.prompts.chat_template_kwargs
            if target is None:
                return in_memory(pairs, options, self.report)
            return on_disk(pairs, options, self.report, target)

    def _check(self, rows: Any) -> int:
        """Read all questions once, and return how many rows they make."""
        count, self._wrong_answers = 0, []
        for question in iter_questions(rows):
            count += 1 if self.noise is None else len(self.noise)
            if len(self._wrong_answers) < _WRONG_ANSWERS:
                self._wrong_answers.append((question.id, question.answers[0]))
            if self.retriever is None and not question.documents:
                raise ValueError(f"question {question.id!r} has no documents: give them, or a retriever.")
            if self.noise is not None and not question.gold:
                raise ValueError(f"question {question.id!r}: noise= needs documents with is_gold, and it has none.")
        return count

    def _rows(self, rows: Any) -> Iterator[_Row]:
        for question in iter_questions(rows):
            if self.noise is None:
                yield _Row(question.id, question, [dict(passage) for passage in question.documents])
                continue
            others = [answer for name, answer in self._wrong_answers if name != question.id]
            for condition in self.noise:
                passages = condition.passages(question, others, self.seed)
                if passages is None:
                    self.report.outcomes["no_condition"] += 1
                else:
                    yield _Row(f"{question.id} ({condition.name})", question, [dict(passage) for passage in passages])

    # -- stages ------------------------------------------------------------------------------------------------------

    def _pairs(self, rows: Iterable[_Row]) -> Iterator[dict[str, Any]]:
        written = self._written_settings()
        stores = {
            "hinted": StageStore(self.cache_dir, "hinted", written),
            "unhinted": StageStore(self.cache_dir, "unhinted", written),
            "scores": StageStore(self.cache_dir, "scores", {"scorer": self._identities["scorer"]}),
        }
        self._failed_in_turn = 0
        stream = iter(rows)
        while batch := list(islice(stream, self.batch_size)):
            yield from self._batch(self._with_passages(batch), stores)

    def _with_passages(self, batch: list[_Row]) -> list[_Row]:
        """Retrieve for those that have none, and leave out those that still have none."""
        without = [row for row in batch if not row.passages]
        if without and self.retriever is not None and self.noise is None:
            found = self.retriever.search([row.question.question for row in without], self.n_docs)
            if len(found) != len(without):
                raise ValueError(f"the retriever gave {len(found)} lists of passages for {len(without)} questions.")
            for row, passages in zip(without, found, strict=True):
                row.passages.extend(
                    {"title": passage.get("title") or "", "text": passage["text"]} for passage in passages
                )
        if self.noise is not None:
            return batch
        self.report.outcomes["no_passages"] += sum(not row.passages for row in batch)
        return [row for row in batch if row.passages]

    def _batch(self, batch: list[_Row], stores: Mapping[str, StageStore]) -> Iterator[dict[str, Any]]:
        hinted = self._stage(stores["hinted"], batch, self.n_hinted, self._write_hinted)
        unhinted = self._stage(stores["unhinted"], batch, self.n_unhinted, self._write_unhinted)
        for row in batch:
            responses = hinted[row.id], unhinted[row.id]
            failure = next((found for found in responses if isinstance(found, BackendError)), None)
            if failure is None:
                pair = self._pair(row, self._candidates(row, *responses), stores["scores"])  # type: ignore[arg-type]
                if not isinstance(pair, BackendError):
                    self._failed_in_turn = 0
                    if pair is not None:
                        yield pair
                    continue
                failure = pair
            self._fail(row, failure)

    def _fail(self, row: _Row, failure: BackendError) -> None:
        if isinstance(failure, TooLong):
            self.report.outcomes["too_long"] += 1
            self.report.failures[row.id] = str(failure)
            return
        self.report.outcomes["failed"] += 1
        self.report.failures[row.id] = str(failure)
        self._failed_in_turn += 1
        if self._failed_in_turn >= _OUTAGE:
            kept = (
                f"what is finished is in {self.cache_dir}, and the same call goes on"
                if self.cache_dir
                else "give a cache_dir to keep what is finished"
            )
            raise ConnectionError(f"{self._failed_in_turn} questions in a row got no response ({failure}): {kept}.")

    def _stage(
        self, store: StageStore, batch: list[_Row], count: int, write: Callable[[list[_Row], int], list[Any]]
    ) -> dict[str, list[dict[str, str]] | BackendError]:
        """Responses of every row, written or found in the store."""
        if not count:
            return {row.id: [] for row in batch}
        keys = {
            row.id: digest_of([row.id, row.question.question, row.question.answers[0], row.passages, count])
            for row in batch
        }
        found: dict[str, Any] = {row.id: store.get(keys[row.id]) for row in batch}
        missing = [row for row in batch if found[row.id] is None]
        self.report.reused += len(batch) - len(missing)
        if missing:
            results = dict(zip((row.id for row in missing), write(missing, count), strict=True))
            store.add((keys[name], kept) for name, kept in results.items() if not isinstance(kept, BackendError))
            found |= results
        return found

    def _seeds(self, row: _Row, stage: str, count: int) -> list[int]:
        return [seed_of(self.seed, row.id, stage, number) for number in range(count)]

    def _write_unhinted(self, rows: list[_Row], count: int) -> list[list[dict[str, str]] | BackendError]:
        asked = [self.prompts.inference(row.question.question, row.passages) for row in rows]
        seeds = [self._seeds(row, "unhinted", count) for row in rows]
        written = self.writer.write(asked, seeds, self.sampling, self.prompts)
        return [
            found if isinstance(found, BackendError) else [self._read(text) for text in found] for found in written
        ]

    def _read(self, text: str) -> dict[str, str]:
        # Half of a character that a server cut cannot be stored.
        found = self.prompts.read(text := text.encode("utf-8", "replace").decode())
        whole = self.prompts.response(found.rationale, found.answer) if found.answer else text.strip()
        return {"text": whole, "answer": found.answer}

    def _write_hinted(self, rows: list[_Row], count: int) -> list[list[dict[str, str]] | BackendError]:
        asked = [
            self.prompts.explanation(row.question.question, row.passages, row.question.answers[0]) for row in rows
        ]
        seeds = [self._seeds(row, "hinted", count) for row in rows]
        written = self.writer.write(asked, seeds, self.sampling, self.prompts)
        rationales = [
            found
            if isinstance(found, BackendError)
            else [self.prompts.read(text.encode("utf-8", "replace").decode()).rationale for text in found]
            for found in written
        ]
        turns = [
            (number, rationale)
            for number, found in enumerate(rationales)
            if not isinstance(found, BackendError)
            for rationale in found
        ]
        greedy = Sampling(_GREEDY, max_new_tokens=min(_ANSWER_TOKENS, self.sampling.max_new_tokens))
        asked = [self.prompts.conclusion(rows[n].question.question, rows[n].passages, text) for n, text in turns]
        answers = self.writer.write(asked, [[0]] * len(asked), greedy, self.prompts) if asked else []
        results: list[list[dict[str, str]] | BackendError] = [
            found if isinstance(found, BackendError) else [] for found in rationales
        ]
        for (number, rationale), answered in zip(turns, answers, strict=True):
            kept = results[number]
            if isinstance(answered, BackendError):
                results[number] = answered
            elif isinstance(kept, list):
                answer = self.prompts.read(answered[0]).answer or answered[0].strip().partition("\n")[0]
                kept.append({"text": self.prompts.response(rationale, answer), "answer": answer})
        return results

    def _candidates(
        self, row: _Row, hinted: list[dict[str, str]], unhinted: list[dict[str, str]]
    ) -> list[dict[str, Any]]:
        """What may be chosen or rejected, each text once."""
        gold = {passage["text"] for passage in row.question.gold}
        if gold:
            knows = any(passage["text"] in gold for passage in row.passages)
        else:
            knows = any(contains_answer(passage["text"], row.question.answers) for passage in row.passages)
        found: dict[str, dict[str, Any]] = {}
        for source, responses in (("hinted", hinted), ("unhinted", unhinted)):
            counts = self.report.candidates[source]
            for response in responses:
                right = self.matcher(response["answer"], row.question.answers)
                counts["written"] += 1
                counts["accepted"] += right
                if not response["answer"] or (
                    source == "hinted" and not self.prompts.read(response["text"]).rationale
                ):
                    # Cut off, or without a word of reasoning: neither to be imitated nor what was meant by a wrong answer.
                    counts["unanswered"] += 1
                    continue
                if source == "hinted" and not right:
                    continue
                if source == "unhinted" and right and not self.use_unhinted_correct:
                    continue
                if not right and is_refusal(response["answer"]) and not knows:
                    # Where the passages do not tell, not knowing is no mistake.
                    counts["refusals"] += 1
                    continue
                found.setdefault(response["text"], {**response, "source": source, "correct": right})
        return list(found.values())

    def _pair(
        self, row: _Row, candidates: list[dict[str, Any]], store: StageStore
    ) -> dict[str, Any] | BackendError | None:
        """The row of the dataset; None if there is no pair."""
        correct = [candidate["correct"] for candidate in candidates]
        if len(set(correct)) < 2:
            self.report.outcomes["no_incorrect" if any(correct) else "no_correct"] += 1
            return None
        prompt = self.scorer.prompt(self.prompts.inference(row.question.question, row.passages), self.prompts)
        # After a prompt that is a text, a response is a continuation.
        before = " " if isinstance(prompt, str) else ""
        texts = [before + candidate["text"] for candidate in candidates]
        options = self.prompts.chat_template_kwargs
        key = digest_of([prompt, texts, options])
        scores = store.get(key)
        if scores is None:
            logps = self.scorer.score(prompt, texts, self.prompts)
            if isinstance(logps, BackendError):
                return logps
            scores = [[score(values, "sum"), len(values)] for values in logps]
            store.add([(key, scores)])
        values = [total / max(tokens, 1) if self.selection_score == "mean" else total for total, tokens in scores]
        pair = select(values, correct, self.selection, seed_of(self.seed, row.id, "selection"))
        assert not isinstance(pair, Dropped)
        self.report.outcomes["pair"] += 1

        def side(number: int) -> Any:
            text = texts[number]
            return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

        return {
            # Of which TRL knows.
            **({"chat_template_kwargs": options} if options else {}),
            "prompt": prompt,
            "chosen": side(pair.chosen),
            "rejected": side(pair.rejected),
            "margin": pair.margin,
            "chosen_score": values[pair.chosen],
            "rejected_score": values[pair.rejected],
            "question_id": row.id,
            "n_correct": sum(correct),
            "n_incorrect": len(correct) - sum(correct),
            "candidates": [
                {**candidate, "sum": total, "tokens": tokens}
                for candidate, (total, tokens) in zip(candidates, scores, strict=True)
            ],
        }
