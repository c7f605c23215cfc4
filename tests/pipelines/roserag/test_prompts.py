"""Prompts hold what they should, responses are read, and the texts travel with a model."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.pipelines.roserag.prompts import RagPrompts, cited, for_template, render
from tests.pipelines.roserag.helpers import CHAT, NO_SYSTEM, SYSTEM_RAISES, word_tokenizer

DOCUMENTS = [{"title": "Paris", "text": "Paris is {large}."}, {"text": "Rome is old."}]


def test_the_hint_is_in_its_own_prompt_alone():
    prompts = RagPrompts()
    asked = json.dumps(prompts.inference("Where?", DOCUMENTS))
    hinted = json.dumps(prompts.explanation("Where?", DOCUMENTS, "xyzzy"))
    concluded = json.dumps(prompts.conclusion("Where?", DOCUMENTS, "Because."))
    assert "xyzzy" in hinted and "xyzzy" not in asked + concluded
    assert "[1] Paris: Paris is {large}." in asked and "[2] : Rome is old." in asked
    assert prompts.conclusion("Where?", DOCUMENTS, "Because.")[2] == {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize(
    ("response", "rationale", "answer", "numbers"),
    [
        ("It is in [2].\nAnswer: Rome", "It is in [2].", "Rome", (2,)),
        ("See [1, 3] and [1].\nAnswer: Rome.\nQuestion: next?\nAnswer: Oslo", "See [1, 3] and [1].", "Rome.", (1, 3)),
        ("The Answer: is hard. So Answer: Rome", "The Answer: is hard. So", "Rome", ()),
        ("No idea", "No idea", "", ()),
        ("Answer:", "", "", ()),
        ("See [1].\n**Answer:** Paris", "See [1].", "Paris", (1,)),
        ("See [1].\n**Answer: Paris**\n", "See [1].", "Paris", (1,)),
        ("See [1].\n__Answer__: Paris", "See [1].", "Paris", (1,)),
        ("See [1].\nanswer: Paris", "See [1].", "Paris", (1,)),
        ("", "", "", ()),
    ],
)
def test_reading(response, rationale, answer, numbers):
    found = RagPrompts().read(response)
    assert (found.rationale, found.answer, found.cited) == (rationale, answer, numbers)


@pytest.mark.parametrize(
    ("response", "complete"),
    [
        ("It is.\nAnswer: Rome\n", True),
        ("It is.\nAnswer: Rome", False),
        ("The Answer: is hard.\n", False),
        ("Answer:\n", False),
        ("**Answer:** Rome\nMore", True),
    ],
)
def test_when_a_response_has_ended(response, complete):
    assert RagPrompts().is_complete(response) == complete


def test_the_marker_is_asked_for():
    prompts = RagPrompts(marker="Antwort:")
    turns = prompts.conclusion("Where?", DOCUMENTS, "Because.")
    assert "'Antwort:'" in turns[1]["content"] and "'Antwort:'" in turns[3]["content"]
    # A model without turns is to answer now, and not to reason again.
    assert render(word_tokenizer(None), turns, prompts).endswith("\nAntwort:")


text = st.text(st.characters(exclude_characters="*_\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029:"), min_size=1).filter(
    str.strip
)


@given(text, text)
def test_what_is_written_is_read(rationale, answer):
    prompts = RagPrompts()
    found = prompts.read(prompts.response(rationale, answer))
    assert (found.rationale, found.answer) == (rationale.strip(), answer.strip())


def test_citations():
    assert cited("[2], [1,2] and [ 3]") == (2, 1)


def test_files(tmp_path):
    prompts = RagPrompts(marker="Antwort:", system="Du antwortest.")
    prompts.save_pretrained(tmp_path)
    assert RagPrompts.from_file(tmp_path / "rag_config.json") == prompts
    (tmp_path / "rag_config.json").write_text('{"colour": "red"}')
    with pytest.raises(ValueError, match="colour"):
        RagPrompts.from_file(tmp_path / "rag_config.json")
    (tmp_path / "rag_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is no object"):
        RagPrompts.from_file(tmp_path / "rag_config.json")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"question": "{question}"}, "lacks {passages}"),
        ({"hinted": "{passages} {question}"}, "lacks {answer}"),
        ({"passage": "{number}"}, "lacks {text}"),
        ({"plain": ""}, "lacks {prompt}"),
        ({"marker": " "}, "marker=' '"),
    ],
)
def test_texts_without_their_fields(change, named):
    with pytest.raises(ValueError, match=named):
        RagPrompts(**change)


@pytest.mark.parametrize("template", [CHAT, NO_SYSTEM, SYSTEM_RAISES])
def test_a_system_text_reaches_every_model(template):
    tokenizer, prompts = word_tokenizer(template), RagPrompts()
    messages = prompts.inference("Where?", DOCUMENTS)
    rendered = render(tokenizer, messages, prompts)
    assert prompts.system in rendered and "Where?" in rendered
    assert (for_template(tokenizer, messages)[0]["role"] == "system") == (template is CHAT)


def test_without_a_template_the_turns_are_a_text():
    prompts = RagPrompts()
    rendered = render(word_tokenizer(None), prompts.inference("Where?", DOCUMENTS), prompts)
    assert rendered.startswith(prompts.system) and rendered.endswith("\n\nReasoning:")
