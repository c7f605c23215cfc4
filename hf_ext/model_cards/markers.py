"""Our part of a README lies between two markers; what people write outside of them stays theirs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

BEGIN = "<!-- hf_ext:begin card -->"
END = "<!-- hf_ext:end card -->"
_RUN_BEGIN = "<!-- hf_ext:begin run -->"
_RUN_END = "<!-- hf_ext:end run -->"
# Facts of a run, which nobody writes by hand.
_MEASURED = ("model-index", "model_name", "co2_eq_emissions")
PLACEHOLDER = "[More Information Needed]"
# A stock template repeats its placeholder some forty times; a person who left one or two has written the rest.
_STOCK_TEMPLATE = 10


def is_ours(text: str) -> bool:
    return BEGIN in text


def load_card(file: Path) -> ModelCard:
    """The card in a file, of whatever origin: a byte order mark and Windows' line ends are no part of it."""
    text = file.read_text(encoding="utf-8-sig").replace("\r\n", "\n")
    return ModelCard(text, ignore_metadata_errors=True)


def our_part(text: str) -> str:
    """What lies between the markers; all of it in a card without them."""
    if BEGIN not in text or END not in text:
        return text
    start, stop = _span(text)
    return text[start:stop]


def run_note(note: str) -> str:
    """What is said of a run of the code, so that it can be found and replaced."""
    return f"{_RUN_BEGIN}\n{note}\n{_RUN_END}"


def with_run_note(text: str, note: str) -> str:
    """`text` with `note` in the place of what it said of a run; unchanged if it has no such place."""
    start, stop = text.find(_RUN_BEGIN), text.find(_RUN_END)
    if start < 0 or stop < start:
        return text
    return text[:start] + run_note(note) + text[stop + len(_RUN_END) :]


def merge(ours: ModelCard, theirs: ModelCard, before: Mapping[str, Any] | None = None) -> ModelCard:
    """Our card inside an existing one: their text around our part, and the union of both metadata.

    Where both have a key, lists are united and otherwise ours is taken. What we wrote the last time and do not say any more is gone.

    Args:
        before: metadata that we wrote into `theirs`, if that is known. Otherwise the results and emissions in a card of ours count as ours.

    Raises:
        ValueError: the markers in the existing card are damaged, so that our part cannot be told from theirs.
    """
    text = _merge_text(our_part(ours.text), theirs.text)
    if before is None and is_ours(theirs.text):
        before = {key: value for key, value in theirs.data.to_dict().items() if key in _MEASURED}
    data = {**ours.data.to_dict()}
    for key, value in _kept(theirs.data.to_dict(), before or {}).items():
        data[key] = _united(data[key], value) if key in data else value
    merged = ModelCard(str(ours))
    merged.data, merged.text = ModelCardData(**data, ignore_metadata_errors=True), text
    return merged


def _kept(data: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What people wrote: without what we had written, a base model that is a path on somebody's machine, and a misspelt `licence`."""
    kept = {}
    for key, value in data.items():
        written = before.get(key)
        if key == "licence" or value == written or (key == "base_model" and not _are_ids(value)):
            continue
        if isinstance(value, list) and key != "model-index":
            value = [item for item in value if not (isinstance(written, list) and item in written)]
        if key == "tags" and isinstance(value, list):
            # The base model of a tag is the one of this card, which has its own.
            value = [tag for tag in value if not str(tag).startswith("base_model:")]
        if value != []:
            kept[key] = value
    return kept


def _are_ids(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in names)


def _united(ours: Any, theirs: Any) -> Any:
    if not isinstance(ours, list) or not isinstance(theirs, list) or any(isinstance(item, dict) for item in ours):
        return ours
    return ours + [item for item in theirs if item not in ours]


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
