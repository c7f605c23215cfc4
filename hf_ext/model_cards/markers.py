"""Our part of a README lies between two markers; what people write outside of them stays theirs."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

BEGIN = "<!-- hf_ext:begin card -->"
END = "<!-- hf_ext:end card -->"
_RUN_BEGIN = "<!-- hf_ext:begin run -->"
_RUN_END = "<!-- hf_ext:end run -->"


def is_ours(text: str) -> bool:
    return BEGIN in text


def load_card(file: Path) -> ModelCard:
    """The card in a file, of whatever origin.

    Raises:
        ValueError: it is no text, or its metadata cannot be read; the message names the file.
    """
    try:
        return read_card(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; mend it, or move it away.") from None


def read_card(text: str) -> ModelCard:
    """A card in the text of a README; a byte order mark and Windows' line ends are no part of it.

    Raises:
        ValueError: its metadata cannot be read, so that writing it again would lose some.
    """
    try:
        return ModelCard(text.removeprefix("\ufeff").replace("\r\n", "\n"))
    except (ValueError, YAMLError, LookupError, TypeError, AttributeError, RecursionError) as error:
        told = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"the metadata cannot be read ({told or type(error).__name__})") from None


def marked(card: ModelCard) -> ModelCard:
    """`card`, whose text is all ours if it has no markers: it can then be replaced when it is written again."""
    if not is_ours(card.text):
        card.text = f"\n{BEGIN}\n{card.text}\n{END}\n"
    return card


def our_part(text: str) -> str:
    """What lies between the markers; all of it in a card without them."""
    if BEGIN not in text or END not in text:
        return text
    start, stop = span(text)
    return text[start:stop]


def run_note(note: str) -> str:
    """What is said of a run of the code, so that it can be found and replaced."""
    return f"{_RUN_BEGIN}\n{note}\n{_RUN_END}"


def run_note_of(text: str) -> str:
    """What `text` says of a run; nothing if it has no such place."""
    start, stop = text.find(_RUN_BEGIN), text.find(_RUN_END)
    return text[start + len(_RUN_BEGIN) : stop].strip() if 0 <= start < stop else ""


def with_run_note(text: str, note: str) -> str:
    """`text` with `note` in the place of what it said of a run; unchanged if it has no such place."""
    start, stop = text.find(_RUN_BEGIN), text.find(_RUN_END)
    if start < 0 or stop < start:
        return text
    return text[:start] + run_note(note) + text[stop + len(_RUN_END) :]


def span(text: str) -> tuple[int, int]:
    """Where our part of `text` begins and ends.

    Raises:
        ValueError: the markers are damaged, so that it cannot be told from what people wrote.
    """
    start, stop = text.find(BEGIN), text.find(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or stop < start:
        raise ValueError(
            f"README.md should contain {BEGIN!r} and {END!r} once each and in this order; restore the markers, or "
            "remove both so that the generated part is appended anew."
        )
    return start, stop + len(END)
