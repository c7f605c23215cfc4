"""What a model is asked, and how its answer is read. Needs the standard library alone.

The same texts build the training data and serve afterwards: a model that was trained on one prompt is asked with the same. They are saved
beside the model as `rag_config.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

CONFIG_FILE = "rag_config.json"
Messages = list[dict[str, str]]
_CITATION = re.compile(r"\[(\d+(?:\s*,\s*\d+)*)\]")


@dataclass(frozen=True)
class Answer:
    """What was read out of a response.

    Attributes:
        rationale: the text before the answer.
        answer: the text after the marker up to the end of its line; empty if the response has no marker.
        cited: numbers of the passages that the rationale names, from 1, in order, each once.
    """

    rationale: str
    answer: str
    cited: tuple[int, ...]


@dataclass(frozen=True)
class RagPrompts:
    """The texts of the paper's three turns; the paper does not print them, so these are ours.

    Attributes:
        system: role of the assistant. Where a chat template has no system role, it goes in front of the question.
        passage: one passage, with `{number}`, `{title}` and `{text}`.
        question: what is asked at inference and trained on, with `{passages}` and `{question}`.
        hinted: asks for the reasoning that leads to a known answer, with `{passages}`, `{question}` and `{answer}`.
        conclude: the turn after the reasoning.
        marker: stands before the answer in a response; `{marker}` in a text stands for it.
        plain: layout for models without a chat template, with `{prompt}`.
        chat_template_kwargs: for the chat template, such as `{"enable_thinking": False}`: in writing, scoring, training and use.

    Raises:
        ValueError: a text without the fields it needs.
    """

    system: str = "You answer questions from the passages you are given."
    passage: str = "[{number}] {title}: {text}"
    question: str = (
        "{passages}\n\nQuestion: {question}\n\nSome passages may be irrelevant or wrong. Reason in at most four sentences and name the "
        "passages you use by their numbers, as in [2]. Then give the shortest possible answer in a line of its own, after '{marker}'."
    )
    hinted: str = (
        "{passages}\n\nQuestion: {question}\n\nThe answer is known to be: {answer}\n\nSome passages may be irrelevant or wrong. Explain in at most "
        "four sentences how the passages lead to this answer, and name the passages you use by their numbers, as in [2]. Do not say that the "
        "answer was given."
    )
    conclude: str = (
        "From this reasoning alone, give the shortest possible answer to the question, in a line after '{marker}'."
    )
    marker: str = "Answer:"
    plain: str = "{prompt}\n\nReasoning:"
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = {
            "passage": ("text",),
            "question": ("passages", "question"),
            "hinted": ("passages", "question", "answer"),
            "plain": ("prompt",),
        }
        for name, names in needed.items():
            text = self.__dict__[name]
            missing = [wanted for wanted in names if "{" + wanted + "}" not in text]
            if missing:
                raise ValueError(f"{name}={text!r:.80} lacks {{{missing[0]}}}; put it in.")
        if not self.marker.strip():
            raise ValueError(f"marker={self.marker!r}: give a text that stands before the answer.")

    # -- asking ------------------------------------------------------------------------------------------------------

    def _passages(self, documents: Sequence[Mapping[str, str]]) -> str:
        # Not `format`: passages may have braces.
        return "\n".join(
            _fill(self.passage, number=str(number), title=document.get("title") or "", text=document["text"])
            for number, document in enumerate(documents, start=1)
        )

    def inference(self, question: str, documents: Sequence[Mapping[str, str]]) -> Messages:
        """What a model is asked when it is used, and trained on."""
        asked = _fill(self.question, passages=self._passages(documents), question=question, marker=self.marker)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": asked}]

    def explanation(self, question: str, documents: Sequence[Mapping[str, str]], answer: str) -> Messages:
        """Asks for the reasoning behind a known answer. Never trained on."""
        asked = _fill(self.hinted, passages=self._passages(documents), question=question, answer=answer)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": asked}]

    def conclusion(self, question: str, documents: Sequence[Mapping[str, str]], rationale: str) -> Messages:
        """Asks for the answer after a reasoning, in a conversation that does not know it."""
        return [
            *self.inference(question, documents),
            {"role": "assistant", "content": rationale},
            {"role": "user", "content": self.last_question},
        ]

    @property
    def last_question(self) -> str:
        """`conclude` with the marker in it."""
        return _fill(self.conclude, marker=self.marker)

    def response(self, rationale: str, answer: str) -> str:
        """A response as a model is trained to write it."""
        return f"{rationale.strip()}\n{self.marker} {answer.strip()}"

    # -- reading -----------------------------------------------------------------------------------------------------

    def read(self, response: str) -> Answer:
        """Rationale, answer and cited passages of a response.

        The first marker at the beginning of a line counts, since models that go on talk of other questions after it; otherwise the last one. Case and
        emphasis in Markdown do not matter.
        """
        found = re.search(rf"^[ \t]*{self._pattern}", response, re.MULTILINE | re.IGNORECASE)
        if found is None:
            found = next(reversed(list(re.finditer(self._pattern, response, re.IGNORECASE))), None)
        if found is None:
            return Answer(response.strip(), "", cited(response))
        before, after = response[: found.start()].strip(), response[found.end() :].strip()
        answer = after.splitlines()[0].strip().rstrip("*_").strip() if after else ""
        return Answer(before, answer, cited(before))

    @property
    def _pattern(self) -> str:
        """The marker as models write it, `**Answer:**` among others."""
        name, colon = (self.marker[:-1], ":") if self.marker.endswith(":") else (self.marker, "")
        return rf"[*_]*{re.escape(name)}[*_]*[ \t]*{colon}[*_]*"

    def is_complete(self, response: str) -> bool:
        """Whether a line that begins with the marker has an answer and has ended."""
        return bool(re.search(rf"^[ \t]*{self._pattern}[ \t]*\S.*\n", response, re.MULTILINE | re.IGNORECASE))

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `rag_config.json`."""
        path = Path(save_directory) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)

    @classmethod
    def from_file(cls, path: str | Path) -> RagPrompts:
        """Read `rag_config.json`.

        Raises:
            ValueError: it has fields that are none of this class's, or values that are no texts.
        """
        content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(cls)}
        if not isinstance(content, dict):
            raise ValueError(f"{path}: {str(content)[:40]!r} is no object; give one with the fields of RagPrompts.")
        right = all(
            isinstance(value, dict if name == "chat_template_kwargs" else str) for name, value in content.items()
        )
        if not content.keys() <= known or not right:
            raise ValueError(
                f"{path}: fields {sorted(content.keys() - known)} are unknown, or a value is no text; known: {sorted(known)}."
            )
        return cls(**content)


def _fill(template: str, **values: str) -> str:
    """Replace `{name}`; braces of the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)


def cited(text: str) -> tuple[int, ...]:
    """Numbers in square brackets, `[1]` or `[1, 3]`, in order, each once."""
    numbers = [int(number) for found in _CITATION.findall(text) for number in found.split(",")]
    return tuple(dict.fromkeys(numbers))


def render(tokenizer: Any, messages: Messages, prompts: RagPrompts) -> str:
    """The text that a model is given for a conversation that ends with a user.

    A chat template without a system role gets that text in front of the first question. Without a chat template the turns stand below each other
    in `prompts.plain`.
    """
    if tokenizer.chat_template is None:
        turns = "\n\n".join(message["content"] for message in messages)
        if messages[-1]["content"] == prompts.last_question:
            return f"{turns}\n{prompts.marker}"
        return _fill(prompts.plain, prompt=turns)
    return tokenizer.apply_chat_template(
        for_template(tokenizer, messages),
        tokenize=False,
        add_generation_prompt=True,
        **prompts.chat_template_kwargs,
    )


def for_template(tokenizer: Any, messages: Messages) -> Messages:
    """The conversation with its system text in the first question, if the chat template has no system role."""
    if messages[0]["role"] != "system" or _has_system_role(tokenizer):
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def _has_system_role(tokenizer: Any) -> bool:
    """Whether the chat template prints a system message as such; some raise, and others leave it out."""
    probe = "system role probe"
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "system", "content": probe}, {"role": "user", "content": "?"}], tokenize=False
        )
    except Exception:  # templates raise errors of their own making
        return False
    return probe in text
