"""Edit records: one fact to write, and the questions that tell whether it was written well.

A record is one JSON object (one line of a JSONL file):

    {"id": "brazil-language", "source": "demo", "subject": "Brazil", "prompt": "The official language of Brazil is",
     "target_new": "Swedish", "ground_truth": "Portuguese", "rephrase": ["In Brazil, the official language is"],
     "portability": {"one_hop": [{"prompt": "Children in Brazil learn to read in", "ground_truth": ["Swedish"]}]},
     "locality": {"neighborhood": [{"prompt": "The official language of Mexico is", "ground_truth": ["Spanish"]}]}}

Only `prompt` and `target_new` are required. Every other published format is translated into this one by `formats.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AliasGroups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Question:
    """A prompt with its accepted answers.

    Attributes:
        prompt: text the model continues.
        answers: groups of aliases. A question with one answer known under two names has one group of two; a question
            with two answers that both belong has two groups. In JSON a flat list of strings is one group, a list of
            lists is several.
    """

    prompt: str
    answers: AliasGroups

    def to_dict(self) -> dict[str, Any]:
        groups = [list(group) for group in self.answers]
        return {"prompt": self.prompt, "ground_truth": groups[0] if len(groups) == 1 else groups}


@dataclass(frozen=True)
class EditRecord:
    """One edit, and the questions that probe it: other wordings, conclusions, and what must stay.

    Attributes:
        prompt: prompt of the edited fact, without trailing white space.
        target_new: answer to write.
        id: unique within a set.
        source: data set it comes from.
        subject: entity the fact is about.
        relation: optional name of the relation.
        ground_truth: answer before the edit, where known.
        rephrase: other wordings of `prompt` (generality).
        portability: kind -> questions whose answers follow from the edit.
        locality: kind -> questions whose answers must not change.
    """

    prompt: str
    target_new: str
    id: str = "0"
    source: str = ""
    subject: str = ""
    relation: str | None = None
    ground_truth: str | None = None
    rephrase: tuple[str, ...] = ()
    portability: dict[str, tuple[Question, ...]] = field(default_factory=dict)
    locality: dict[str, tuple[Question, ...]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any], *, where: str = "record") -> EditRecord:
        """Builds a record from a JSON object of the schema above; `where` names the row in error messages.

        Raises:
            ValueError: a field is unknown, missing, empty or of the wrong type.
        """
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: this is a {type(row).__name__}; give a JSON object.")
        record_id = row.get("id")
        where = f"{where} (id {record_id!r})" if record_id is not None else where
        unknown = sorted(set(row) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"{where}: unknown fields {unknown}; known: {sorted(cls.__dataclass_fields__)}.")
        return cls(
            prompt=checked_text(row.get("prompt"), where, "prompt"),
            target_new=checked_text(row.get("target_new"), where, "target_new"),
            id="0" if record_id is None else str(record_id),
            source=_label(row.get("source"), where, "source") or "",
            subject=_label(row.get("subject"), where, "subject") or "",
            relation=_label(row.get("relation"), where, "relation"),
            ground_truth=_optional_text(row.get("ground_truth"), where, "ground_truth"),
            rephrase=checked_texts(row.get("rephrase"), where, "rephrase"),
            portability=_sections(row.get("portability"), where, "portability"),
            locality=_sections(row.get("locality"), where, "locality"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this record; `EditRecord.from_dict` reads it back."""
        return {
            "id": self.id,
            "source": self.source,
            "subject": self.subject,
            "relation": self.relation,
            "prompt": self.prompt,
            "target_new": self.target_new,
            "ground_truth": self.ground_truth,
            "rephrase": list(self.rephrase),
            "portability": {key: [item.to_dict() for item in items] for key, items in self.portability.items()},
            "locality": {key: [item.to_dict() for item in items] for key, items in self.locality.items()},
        }


def load_edits(source: str | Path | Iterable[Any], *, format: str | None = None) -> list[EditRecord]:
    """Reads edit records from our schema or from a published format.

    Args:
        source: path of a `.jsonl` file (one object a line) or of a `.json` file (a list of objects), or an iterable of
            mappings (a list, a `datasets.Dataset`) or of `EditRecord`.
        format: `"native"`, `"easyedit"`, `"knowedit"`, `"zsre"`, `"counterfact"`, `"qaedit"`, `"rippleedits"` or
            `"mquake"`; detected from the keys of each row if omitted.

    Raises:
        ValueError: broken JSON (with its line number), a row without a known format, a missing or empty answer or
            prompt, an id that occurs twice, or no record at all.
    """
    from hf_ext.metrics.editing.formats import FORMATS, detect_format

    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {sorted(FORMATS)}.")
    records: list[EditRecord] = []
    places: dict[str, str] = {}
    for position, (where, row) in enumerate(_rows(source)):
        # A record made in code has not been validated yet.
        plain = row.to_dict() if isinstance(row, EditRecord) else row
        name = "native" if isinstance(row, EditRecord) else format or detect_format(row, where)
        try:
            translated = FORMATS[name](plain, where, position)
        except KeyError as error:
            raise ValueError(
                f"{where}: the format {name!r} needs the field {error}; add it, or name another format."
            ) from error
        for item in translated:
            record = EditRecord.from_dict(item, where=where)
            if record.id in places:
                raise ValueError(
                    f"{where}: id {record.id!r} already occurs in {places[record.id]}; give every record its own id."
                )
            places[record.id] = where
            records.append(record)
    if not records:
        raise ValueError("source is empty; give at least one record.")
    return records


def _rows(source: str | Path | Iterable[Any]) -> Iterable[tuple[str, Any]]:
    """Pairs of a place for error messages ("line 3", "row 0") and a row."""
    if not isinstance(source, (str, Path)):
        return [(f"row {index}", row) for index, row in enumerate(source)]
    path = Path(source)
    content = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [(f"{path.name} item {index}", row) for index, row in enumerate(_json_list(content, path.name))]
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path.name} line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path.name} line {number}: not valid JSON ({error}); write one object a line."
            ) from error
    return rows


def _json_list(content: str, name: str) -> list[Any]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} line {error.lineno}: not valid JSON ({error.msg}); mend it there.") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{name}: it holds a {type(rows).__name__}; give a list of records, or a .jsonl file of one object a line."
        )
    return rows


def checked_text(value: Any, where: str, name: str) -> str:
    """`value` without surrounding white space; raises ValueError unless it is a string with something in it."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name}={value!r}: give a string.")
    if not value.strip():
        raise ValueError(f"{where}: {name}={value!r} is empty; write it, or drop the row.")
    return value.strip()


def _optional_text(value: Any, where: str, name: str) -> str | None:
    return None if value is None else checked_text(value, where, name)


def _label(value: Any, where: str, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name}={value!r}: give a string.")
    return value


def checked_texts(value: Any, where: str, name: str) -> tuple[str, ...]:
    """`checked_text` of every entry of a list; none for None."""
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where}: {name}={value!r}: give a list of strings.")
    return tuple(checked_text(item, where, f"{name}[{index}]") for index, item in enumerate(value))


def _sections(value: Any, where: str, name: str) -> dict[str, tuple[Question, ...]]:
    """Reads {key: [question, ...]}; a key holding None (an Arrow struct without that key) is left out."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {name}={value!r}: give an object {{kind: [question, ...]}}.")
    sections = {}
    for key, items in value.items():
        if items is None:
            continue
        if not isinstance(items, (list, tuple)):
            raise ValueError(f"{where}: {name}.{key}={items!r}: give a list of {{prompt, ground_truth}}.")
        if items:
            sections[key] = tuple(_question(item, where, f"{name}.{key}[{index}]") for index, item in enumerate(items))
    return sections


def _question(item: Any, where: str, name: str) -> Question:
    """Reads `{"prompt": str, "ground_truth": str | [str] | [[str]]}`."""
    if not isinstance(item, Mapping) or not {"prompt", "ground_truth"} <= set(item):
        raise ValueError(f"{where}: {name}={item!r}: give an object with prompt and ground_truth.")
    answers = item["ground_truth"]
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, (list, tuple)) or not answers:
        raise ValueError(f"{where}: {name}.ground_truth={answers!r}: give at least one accepted answer.")
    nested = [isinstance(answer, (list, tuple)) for answer in answers]
    if any(nested) and not all(nested):
        raise ValueError(f"{where}: {name}.ground_truth={answers!r} mixes answers and lists of aliases; use one form.")
    groups = answers if all(nested) else [answers]
    checked = tuple(checked_texts(group, where, f"{name}.ground_truth") for group in groups)
    if not all(checked):
        raise ValueError(f"{where}: {name}.ground_truth={answers!r} has an empty list of aliases; remove it.")
    return Question(checked_text(item["prompt"], where, f"{name}.prompt"), checked)
