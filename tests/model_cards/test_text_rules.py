"""Rules for the text of a card: sections, code, numbers, words, and the time that they take."""

from __future__ import annotations

import re
import time

import pytest

from hf_ext.model_cards import score, validate
from hf_ext.model_cards.rules.sections import SECTIONS, UNSTATED
from hf_ext.model_cards.running import code_of
from tests.model_cards.written import CODE, GOOD_DATA, GOOD_TEXT, SECTION_RULES, card, index, rules, text


@pytest.mark.parametrize("name", SECTION_RULES.values())
def test_a_placeholder_or_a_comment_fills_no_section(name):
    """The Hub's template has these; each is named for the section, and once more as a placeholder where it is one."""
    for body in ("[More Information Needed]", "<!-- Tell it. -->", "- **Who:**"):
        (rule,) = [rule for rule, known in SECTION_RULES.items() if known == name]
        found = rules(validate(card(body=text(**{name: body}))).warnings)
        assert [entry for entry in found if entry != "placeholder"] == [rule]


def test_what_nobody_stated_is_missing():
    body = text(Factors=UNSTATED["factors"])
    assert rules(validate(card(body=body)).warnings) == ["section-factors"]
    assert score(card(body=body)) == {section.name: True for section in SECTIONS}
    assert not any(score(card(body="# T\n")).values())


def test_headings_in_code_are_no_sections():
    body = text(Factors=None, How_to_get_started=f"```python\n## Factors\n# x\n{CODE}```")
    assert rules(validate(card(body=body)).warnings) == ["section-factors"]


def test_code_that_loads_something_else():
    for code in ("X.from_pretrained('user/other')", 'name = "user/other"\nX.from_pretrained(name)'):
        body = card(body=text(How_to_get_started=f"```python\n{code}\n```"))
        assert rules(validate(body, repo_id="user/mine").warnings) == ["snippet-repo"]
        assert validate(body, repo_id="user/other").warnings == validate(body).warnings == []


@pytest.mark.parametrize(("told", "fits"), [("0.5", True), ("50.0", True), ("0.50 [0.4, 0.6]", True), ("0.46", False)])
def test_numbers_in_the_text_and_in_the_metadata(told, fits):
    report = validate(card(GOOD_DATA + index(), text(Results=f"| a | {told} |")))
    assert rules(report.warnings) == ([] if fits else ["metric-text"])


@pytest.mark.parametrize(
    ("table", "fits"),
    [
        ("| metric | value |\n| --- | --- |\n| a | 0.6 |", False),
        ("| metric | base | ours |\n| --- | --- | --- |\n| a | 0.5 | 0.6 |", False),
        ("| metric | base | this |\n| --- | --- | --- |\n| a | 0.4 | **0.5** |", True),
        ("| metric | n | value |\n| --- | --- | --- |\n| a | 300 | 0.5 [0.4, 0.6] |", True),
        ("| group | n |\n| --- | --- |\n| a | 300 |", True),
        ("| setting | value |\n| --- | --- |\n| `a` | 3 |", True),
        ("| metric | what |\n| --- | --- |\n| a | top-1 of 1,000 classes |", True),
        ("| a | 0.46 [0.4, 0.5] |", False),
        ("| a | 1e-3 |", False),
        ("| a | 1e999 |", False),
    ],
)
def test_only_a_column_of_values_is_compared(table, fits):
    report = validate(card(GOOD_DATA + index(), text(Results=table)))
    assert rules(report.warnings) == ([] if fits else ["metric-text"])


@pytest.mark.parametrize(("told", "fits"), [("1,234.5", True), ("1234.5", True), ("1,334.5", False)])
def test_thousands(told, fits):
    data = GOOD_DATA + index("[{type: m, name: a, value: 1234.5, args: {n: 3}}]")
    assert rules(validate(card(data, text(Results=f"| a | {told} |"))).warnings) == ([] if fits else ["metric-text"])


@pytest.mark.parametrize(
    "code",
    [
        "AutoTokenizer.from_pretrained('org/other')\nX.from_pretrained('user/base')",
        "X.from_pretrained('user/mine', vae=Y.from_pretrained('org/vae'))",
        "pipeline('text-generation', model='user/mine')",
    ],
)
def test_code_that_loads_more_besides(code):
    for fence in ("python", "py"):
        body = text(How_to_get_started=f"```python\nprompt = 'a'\n```\n\n```{fence}\n{code}\n```")
        assert str(validate(card(body=body), repo_id="user/mine")) == "no findings"


@pytest.mark.parametrize(
    "fence", ["```python", "```Python", "```python title=a", "``` py", "~~~python3", "````python"]
)
def test_fences(fence):
    marks = re.match("[`~]+", fence)[0]
    code = f"```text\n~~~\n```\n\n{fence}\n{CODE}{marks}"
    assert code_of(code) == CODE
    assert str(validate(card(body=text(How_to_get_started=code)))) == "no findings"


@pytest.mark.parametrize("code", ["```json\nX\n```", "```python x``` a\nX", "````text\n```python\nX\n```\n````"])
def test_what_is_no_block_of_python(code):
    code = code.replace("X\n", CODE)
    assert code_of(code) is None
    assert "no-snippet" in rules(validate(card(body=text(How_to_get_started=code))).warnings)


def test_a_spanish_word_is_no_placeholder():
    assert str(validate(card(body=GOOD_TEXT + "Todo o nada, todo el modelo."))) == "no findings"


LENGTH = 200_000
LONG = {
    "heading": "# a" + " " * LENGTH + "b",
    "blank lines": "\n" * LENGTH,
    "comments": "<!--" * (LENGTH // 4),
    "letters": "a" * LENGTH,
    "item": "-" + " " * LENGTH + "b",
    "items": "- a:\n" * (LENGTH // 5),
    "headings": "# factors\n" * (LENGTH // 10),
    "path": "/a" * (LENGTH // 2),
    "home": " /home/" + "a " * (LENGTH // 2),
    "drives": "C:\\a b " * (LENGTH // 7),
    "shares": "\\\\ab" * (LENGTH // 4),
    "addresses": "a@a.a." * (LENGTH // 6),
    "tokens": "hf_" * (LENGTH // 3),
    "loading": "```python\n" + "from_pretrained(' " * (LENGTH // 18) + "\n```",
    "blocks": "```python\n" * (LENGTH // 10),
    "numbers": "| a | " + "1" * LENGTH + " |\n",
    "rows": "| a | 0.5 |\n" * (LENGTH // 12),
}


@pytest.mark.parametrize("shape", LONG)
def test_time_grows_with_the_length_only(shape):
    """Patterns that take quadratic time need minutes for these; a quarter of a second is usual."""
    start = time.process_time()
    validate(card(GOOD_DATA + index(), GOOD_TEXT + LONG[shape]))
    assert time.process_time() - start < 2.5
