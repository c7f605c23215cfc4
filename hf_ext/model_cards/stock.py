"""What libraries write into cards by themselves, and what of it says nothing until somebody fills it in."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from huggingface_hub import ModelCard

from hf_ext.model_cards.rules.sections import leaves, without_comments

# A line that is a placeholder, alone or behind a label: "- **Developed by:** [More Information Needed]".
_PLACEHOLDER = re.compile(
    r"[-*]?\s*(?:\*\*[^*]{1,80}\*\*)?\s*(?:\[?more information needed\]?\.?|\[TODO: .*\])", re.IGNORECASE
)
_GENERATED = re.compile(
    r"- PEFT [\w.+-]+|This is the model card of a \S+ \w+ model that has been pushed on the Hub\. .*"
    r"|<!-- This model card has been generated automatically .*"
    r"|should probably proofread and complete it, then remove this comment\. -->"
)
_NAMELESS_TITLE = re.compile(r"# Model Card for (?:Model ID|None)\s*")
# Code that loads a model without a name, and none at all.
_NO_CODE = ('model="None"', "# TODO: add an example code snippet for running this diffusion pipeline")


def without_template(text: str) -> str:
    """`text` without placeholders, without sentences and hints of a template that stand around nothing else, and without headings that are left with nothing.

    What somebody has written into a template stays where it is; a text that comes from no template is returned as it is.
    """
    parts = leaves(text)
    bodies = [_said(body) for _, _, body in parts]
    if bodies == [body for _, _, body in parts]:
        return text
    kept = [False] * len(parts)
    for number in reversed(range(len(parts))):
        level, heading, body = parts[number]
        below = _below(parts, number)
        was_empty = level > 0 and not body.strip() and not below and heading.strip() not in _template()
        kept[number] = was_empty or bool(bodies[number].strip()) or any(kept[each] for each in below)
    return "".join(
        ("" if _NAMELESS_TITLE.fullmatch(heading) else heading) + (body or "\n")
        for (_, heading, _), body, keep in zip(parts, bodies, kept, strict=True)
        if keep
    )


def _said(body: str) -> str:
    """What of a section's body somebody, or something measured, has said."""
    if not body.strip():
        return body
    if any(code in body for code in _NO_CODE):
        return ""
    lines = body.splitlines(keepends=True)
    told = [line for line in lines if not _PLACEHOLDER.fullmatch(without_comments(line).strip())]
    if all(_is_template(line.strip()) for line in told):
        return ""
    return body if len(told) == len(lines) else "".join(told)


def _is_template(line: str) -> bool:
    return not line or line in _template() or bool(_GENERATED.fullmatch(line))


@functools.cache
def _template() -> frozenset[str]:
    """Lines of the Hub's template, headings and hints among them, that are there whatever is filled in."""
    text = Path(ModelCard.default_template_path).read_text(encoding="utf-8")
    return frozenset(line.strip() for line in text.splitlines() if "{{" not in line) | {
        "Users (both direct and downstream) should be made aware of the risks, biases and limitations of the model. "
        "More information needed for further recommendations."
    }


def _below(parts: list[tuple[int, str, str]], number: int) -> list[int]:
    """The parts under a heading."""
    level = parts[number][0]
    if level == 0:
        return []
    found = []
    for each in range(number + 1, len(parts)):
        if parts[each][0] <= level:
            break
        found.append(each)
    return found
