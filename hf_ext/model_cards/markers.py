"""Our part of a README lies between two markers; what people write outside of them stays theirs."""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

BEGIN = "<!-- hf_ext:begin card -->"
END = "<!-- hf_ext:end card -->"
PLACEHOLDER = "[More Information Needed]"
# A stock template repeats its placeholder some forty times; a person who left one or two has written the rest.
_STOCK_TEMPLATE = 10


def is_ours(text: str) -> bool:
    return BEGIN in text


def merge(ours: ModelCard, theirs: ModelCard) -> ModelCard:
    """Our card inside an existing one: their text around our part, and the union of both metadata.

    Where both have a key, lists are united and otherwise ours is taken.

    Raises:
        ValueError: the markers in the existing card are damaged, so that our part cannot be told from theirs.
    """
    text = _merge_text(_our_part(ours.text), theirs.text)
    data = {**ours.data.to_dict()}
    for key, value in _kept(theirs.data.to_dict()).items():
        data[key] = _united(data[key], value) if key in data else value
    merged = ModelCard(str(ours))
    merged.data, merged.text = ModelCardData(**data, ignore_metadata_errors=True), text
    return merged


def _kept(data: dict[str, Any]) -> dict[str, Any]:
    """Without what libraries leave and no person wants: a base model that is a path on somebody's machine, and a misspelt `licence`."""
    kept = {key: value for key, value in data.items() if key != "licence"}
    if not _are_ids(data.get("base_model")):
        kept.pop("base_model", None)
    if isinstance(data.get("tags"), list):
        kept["tags"] = [
            tag
            for tag in data["tags"]
            if not str(tag).startswith("base_model:") or _are_ids(str(tag).rpartition(":")[2])
        ]
    return kept


def _are_ids(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in names)


def _united(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, list) or not isinstance(theirs, list) or any(isinstance(item, dict) for item in ours):
        return ours
    return ours + [item for item in theirs if item not in ours]


def _our_part(text: str) -> str:
    start, stop = _span(text)
    return text[start:stop]


def _span(text: str) -> tuple[int, int]:
    start, stop = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or stop < start:
        raise ValueError(
            f"README.md should contain {BEGIN!r} and {END!r} once each and in this order; restore the markers, or "
            "remove both so that the generated part is appended anew."
        )
    return start, stop + len(END)


def _merge_text(part: str, theirs: str) -> str:
    if BEGIN in theirs or END in theirs:
        start, stop = _span(theirs)
        return theirs[:start] + part + theirs[stop:]
    if not theirs.strip() or theirs.count(PLACEHOLDER) >= _STOCK_TEMPLATE:
        return f"\n{part}\n"
    return f"{theirs.rstrip()}\n\n{part}\n"
