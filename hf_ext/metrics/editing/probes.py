"""The questions of a set of records as one flat list."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hf_ext.metrics.editing.records import AliasGroups, EditRecord


@dataclass(frozen=True)
class Probe:
    """One question put to the model.

    Attributes:
        record_id: edit it belongs to.
        section: reliability, generality, portability or locality.
        key: kind within the section.
        index: position within the kind.
        prompt: text to continue.
        answers: accepted answers; for locality the text whose tokens are fed in when teacher forcing.
    """

    record_id: str
    section: str
    key: str
    index: int
    prompt: str
    answers: AliasGroups


def probes_of(records: Iterable[EditRecord]) -> list[Probe]:
    """All probes of the records, in their order."""
    probes = []
    for record in records:
        target: AliasGroups = ((record.target_new,),)
        probes.append(Probe(record.id, "reliability", "edit", 0, record.prompt, target))
        for index, prompt in enumerate(record.rephrase):
            probes.append(Probe(record.id, "generality", "rephrase", index, prompt, target))
        for section, kinds in (("portability", record.portability), ("locality", record.locality)):
            for key, questions in kinds.items():
                for index, question in enumerate(questions):
                    probes.append(Probe(record.id, section, key, index, question.prompt, question.answers))
    return probes
