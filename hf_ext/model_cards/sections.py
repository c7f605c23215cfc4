"""The nine sections of a model card, where cards keep them, and what ours say where nobody has said anything.

Source: https://huggingface.co/papers/1810.03993, section 4. Headings are those of our template and of the Hub's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

PLACEHOLDER = re.compile(r"\[?more information needed\]?|\bTODO\b|\bTBD\b|\bFIXME\b", re.IGNORECASE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*#*\s*$")
# A list item with a label and nothing behind it, as templates have them.
_EMPTY_ITEM = re.compile(r"^\s*[-*]\s+(\*\*)?[^:\n]*:(\*\*)?\s*$", re.MULTILINE)

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


def content(text: str, section: Section) -> str | None:
    """What stands under the section's headings, without comments and placeholders; `None` if there is no such heading."""
    found = [body for heading, body in _parts(text) if heading in section.headings]
    return "\n".join(found).strip() if found else None


def is_stated(text: str, section: Section) -> bool:
    """Whether somebody, or something measured, fills the section."""
    body = content(text, section)
    return bool(body) and not any(sentence in str(body) for sentence in UNSTATED.values())


def score(card: object) -> dict[str, bool]:
    """Which of the nine sections of a card (a `ModelCard` or its text) hold more than a placeholder."""
    return {section.name: bool(content(str(card), section)) for section in SECTIONS}


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """(heading in lower case, what follows down to the next heading of its level or above, without deeper headings)."""
    open_parts: list[tuple[int, str, list[str]]] = []
    fenced = False
    for line in _COMMENT.sub("", text).splitlines():
        fenced ^= line.lstrip().startswith("```")
        heading = None if fenced else _HEADING.match(line)
        if heading is None:
            for _, _, lines in open_parts:
                lines.append(line)
            continue
        level = len(heading[1])
        while open_parts and open_parts[-1][0] >= level:
            yield _finished(open_parts.pop())
        open_parts.append((level, heading[2].lower(), []))
    while open_parts:
        yield _finished(open_parts.pop())


def _finished(part: tuple[int, str, list[str]]) -> tuple[str, str]:
    body = _EMPTY_ITEM.sub("", PLACEHOLDER.sub("", "\n".join(part[2])))
    return part[1], body.strip()
