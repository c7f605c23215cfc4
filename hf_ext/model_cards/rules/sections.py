"""The nine sections of a model card, where cards keep them, and what ours say where nobody has said anything.

Source: https://huggingface.co/papers/1810.03993, section 4. Headings are those of our template and of the Hub's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hf_ext.model_cards.rules.fences import with_code

# `todo` in lower case is a word of Spanish and Portuguese.
PLACEHOLDER = re.compile(r"(?i:\[?more information needed\]?)|\bTODO\b|\bTBD\b|\bFIXME\b")
# What the template says where the author said nothing: true, so no placeholder, but a gap that `validate` names.
UNSTATED = {
    "intended_use": "The authors have not stated what the model is for.",
    "out_of_scope": "The authors have not stated what the model is not for. What the base model's card rules out stays ruled out.",
    "factors": "The authors have not stated for which groups, instruments or environments results may differ, and results are not broken down.",
    "metrics": "No metric was measured.",
    "evaluation_data": "The evaluation data was not named.",
    "training_data": "The training data was not named.",
    "results": "No evaluation results were given for this model: treat its quality as unknown.",
    "ethics": "Ethical considerations were not assessed for this model. Biases and risks of the base model carry over.",
    "caveats": "The authors have not stated caveats of this model.",
}


@dataclass(frozen=True)
class Section:
    """One of the nine.

    Attributes:
        name: as in the paper.
        headings: in lower case, any of which may hold it.
        remedy: the argument of `build_card` that fills it.
    """

    name: str
    headings: tuple[str, ...]
    remedy: str

    @property
    def rule(self) -> str:
        return "section-" + self.name.replace(" ", "-")


SECTIONS = (
    Section("model details", ("model details", "model description"), "build_card fills it"),
    Section("intended use", ("intended use", "direct use", "intended uses & limitations"), "pass intended_use="),
    Section("factors", ("factors",), "pass factors=, or a report by group as metrics="),
    Section("metrics", ("metrics",), "pass metrics="),
    Section(
        "evaluation data", ("testing data", "evaluation data", "training and evaluation data"), "pass evaluated_on="
    ),
    Section("training data", ("training data", "training and evaluation data"), "pass datasets="),
    Section("quantitative analyses", ("results", "quantitative analyses"), "pass metrics="),
    Section("ethical considerations", ("ethical considerations", "bias, risks, and limitations"), "pass ethics="),
    Section("caveats and recommendations", ("caveats and recommendations", "recommendations"), "pass caveats="),
)
OUT_OF_SCOPE = Section("out of scope", ("out-of-scope use", "out of scope"), "pass out_of_scope=")


def bodies(text: str) -> dict[str, str]:
    """Heading of a section in lower case to what stands under all headings of that name, without comments and placeholders."""
    known = {heading for section in (*SECTIONS, OUT_OF_SCOPE) for heading in section.headings}
    found: dict[str, list[str]] = {}
    for heading, lines in _parts(text):
        if heading in known:
            found.setdefault(heading, []).append(_filled(lines))
    return {heading: "\n".join(parts).strip() for heading, parts in found.items()}


def content(found: Mapping[str, str], section: Section) -> str | None:
    """What `bodies` found under the section's headings; `None` if there is no such heading."""
    parts = [found[heading] for heading in section.headings if heading in found]
    return "\n".join(parts).strip() if parts else None


def is_stated(found: Mapping[str, str], section: Section) -> bool:
    """Whether somebody, or something measured, fills the section."""
    body = content(found, section)
    return bool(body) and not any(sentence in str(body) for sentence in UNSTATED.values())


class Score(dict[str, bool]):
    """Name of a section -> whether it is there.

    Attributes:
        stated: names of those in which somebody, or something measured, says something.
    """

    def __init__(self, present: Mapping[str, bool], stated: frozenset[str]) -> None:
        super().__init__(present)
        self.stated = stated

    def __str__(self) -> str:
        return f"{sum(self.values())} of {len(self)} sections are there, {len(self.stated)} stated"


def score(card: object) -> Score:
    """Which of the nine sections of a card (a `ModelCard` or its text) hold more than a placeholder, as a dict, and in `stated` which of them tell
    something. A section may also say that its author has not: that is honest, and no documentation.
    """
    found = bodies(str(card))
    present = {section.name: bool(content(found, section)) for section in SECTIONS}
    return Score(present, frozenset(section.name for section in SECTIONS if is_stated(found, section)))


def leaves(text: str) -> list[tuple[int, str, str]]:
    """(level, line of the heading, what stands between it and the next heading), which put together are `text`; level 0 is what stands before the first."""
    found: list[tuple[int, str, list[str]]] = [(0, "", [])]
    for line, is_code in with_code(text.splitlines(keepends=True)):
        heading = None if is_code else _heading(line)
        if heading is None:
            found[-1][2].append(line)
        else:
            found.append((heading[0], line, []))
    return [(level, heading, "".join(lines)) for level, heading, lines in found]


def without_comments(text: str) -> str:
    """`text` without HTML comments."""
    # Plain string methods: patterns with two repetitions side by side take quadratic time on a long line or comment.
    kept, start = [], 0
    while (begin := text.find("<!--", start)) >= 0 and (end := text.find("-->", begin + 4)) >= 0:
        kept.append(text[start:begin])
        start = end + 3
    return "".join([*kept, text[start:]])


def _parts(text: str) -> Iterator[tuple[str, list[str]]]:
    """(heading in lower case, lines down to the next heading of its level or above, without deeper headings)."""
    open_parts: list[tuple[int, str, list[str]]] = []
    for line, is_code in with_code(without_comments(text).splitlines()):
        heading = None if is_code else _heading(line)
        if heading is None:
            for _, _, lines in open_parts:
                lines.append(line)
            continue
        level, title = heading
        while open_parts and open_parts[-1][0] >= level:
            yield open_parts.pop()[1:]
        open_parts.append((level, title, []))
    while open_parts:
        yield open_parts.pop()[1:]


# Plain string methods here, too.
def _heading(line: str) -> tuple[int, str] | None:
    """Level and title in lower case of a heading with number signs."""
    title = line.lstrip("#")
    level = len(line) - len(title)
    if not 1 <= level <= 6 or not title[:1].isspace():
        return None
    return level, title.strip().rstrip("#").rstrip().lower()


def _filled(lines: list[str]) -> str:
    body = PLACEHOLDER.sub("", "\n".join(lines))
    return "\n".join(line for line in body.splitlines() if not _is_empty_item(line)).strip()


def _is_empty_item(line: str) -> bool:
    """Whether it is a list item with a label and nothing behind it, as templates have them."""
    item = line.strip()
    label = item[1:].removesuffix("**")
    return item[:1] in ("-", "*") and label[:1].isspace() and label.find(":") == len(label) - 1
