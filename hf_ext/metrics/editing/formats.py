"""Published edit formats, one small function each: a row of the format in, rows of our schema out.

The functions only rename and regroup; `EditRecord.from_dict` validates. Each takes `(row, where, position)`, where `where`
names the row in error messages and `position` supplies an id if the format has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]


def native(row: Row, where: str, position: int) -> Rows:
    """Our own schema."""
    return [{**row, "id": position if row.get("id") is None else row["id"]}]


def easyedit(row: Row, where: str, position: int) -> Rows:
    """EasyEdit's request: `prompt, target_new, rephrase_prompt, locality{key: {prompt, ground_truth}}, portability{...}`.

    Prompts and answers of a key may be single items or parallel lists. The flat variant of its data files
    (`locality_prompt, locality_ground_truth, portability_prompt, portability_ground_truth`) is read as well.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name in ("portability", "locality"):
        keyed = dict(row.get(name) or {})
        if row.get(f"{name}_prompt"):
            keyed[name] = {"prompt": row[f"{name}_prompt"], "ground_truth": row.get(f"{name}_ground_truth")}
        sections[name] = {key: _parallel(item, f"{where}: {name}.{key}") for key, item in keyed.items() if item}
    return [_record(row, position, "easyedit", rephrase=_listed(row.get("rephrase_prompt")), **sections)]


def knowedit(row: Row, where: str, position: int) -> Rows:
    """KnowEdit (https://huggingface.co/papers/2401.01286); its WikiBio part calls the fields text, labels and concept."""
    renamed = {
        "subject": row.get("subject", row.get("concept")),
        "prompt": row.get("prompt", row.get("text")),
        "target_new": row.get("target_new", row.get("labels")),
        "ground_truth": row.get("ground_truth"),
        "id": row.get("id", row.get("case_id")),
    }
    return [
        _record(
            renamed,
            position,
            "knowedit",
            rephrase=_listed(row.get("rephrase", row.get("rephrase_prompt"))),
            portability=row.get("portability"),
            locality=row.get("locality"),
        )
    ]


def zsre(row: Row, where: str, position: int) -> Rows:
    """zsRE editing split: `src, alt, answers, rephrase, loc, loc_ans`; `alt` is the answer to write."""
    renamed = {"subject": row.get("subject"), "prompt": row["src"], "target_new": row["alt"], "id": row.get("case_id")}
    renamed["ground_truth"] = row.get("answers")
    locality = {"nq": _parallel({"prompt": row["loc"], "ground_truth": row["loc_ans"]}, f"{where}: loc")}
    return [_record(renamed, position, "zsre", rephrase=_listed(row.get("rephrase")), locality=locality)]


def counterfact(row: Row, where: str, position: int) -> Rows:
    """CounterFact (https://huggingface.co/papers/2202.05262): `requested_rewrite`, paraphrase and neighbourhood prompts."""
    rewrite = row["requested_rewrite"]
    true_answer = rewrite["target_true"]["str"]
    neighbours = [{"prompt": prompt, "ground_truth": [true_answer]} for prompt in row.get("neighborhood_prompts", [])]
    renamed = {
        "id": row.get("case_id"),
        "subject": rewrite["subject"],
        "prompt": rewrite["prompt"].format(rewrite["subject"]),
        "target_new": rewrite["target_new"]["str"],
        "ground_truth": true_answer,
        "relation": rewrite.get("relation_id"),
    }
    locality = {"neighborhood": neighbours}
    return [_record(renamed, position, "counterfact", rephrase=row.get("paraphrase_prompts"), locality=locality)]


def qaedit(row: Row, where: str, position: int) -> Rows:
    """QAEdit (https://huggingface.co/papers/2502.11177): `prompt, target, rephrase, locality[{loc, loc_ans}]`."""
    unrelated = [{"prompt": item["loc"], "ground_truth": item["loc_ans"]} for item in row.get("locality") or []]
    renamed = {
        "id": row.get("id"),
        "subject": row.get("subject"),
        "prompt": row["prompt"],
        "target_new": row["target"],
    }
    locality = {"unrelated": unrelated}
    return [_record(renamed, position, "qaedit", rephrase=_listed(row.get("rephrase")), locality=locality)]


def rippleedits(row: Row, where: str, position: int) -> Rows:
    """RippleEdits (https://huggingface.co/papers/2307.12976): the edit is a sentence, the criteria hold test queries.

    Every test query becomes one question; the data's `condition_queries` (does the model know the premise?) and the
    OR/AND over the queries of one test are not applied.
    """
    prompt, target = _split_statement(row["edit"]["prompt"], where)
    original = row["edit"].get("original_fact")
    renamed = {
        "id": row.get("id"),
        "subject": row["edit"].get("subject_label"),
        "prompt": prompt,
        "target_new": target,
        "ground_truth": None if original is None else _split_statement(original["prompt"], where)[1],
        "relation": row["edit"].get("relation"),
    }
    spread = ("Logical_Generalization", "Subject_Aliasing", "Compositionality_I", "Compositionality_II")
    # The published files spell the first key without its second "ic".
    stay = {
        "Relation_Specificity": [*row.get("Relation_Specificity", []), *row.get("Relation_Specifity", [])],
        "Forgetfulness": row.get("Forgetfulness", []),
    }
    return [
        _record(
            renamed,
            position,
            "rippleedits",
            portability={key: _ripple_questions(row.get(key, [])) for key in spread},
            locality={key: _ripple_questions(tests) for key, tests in stay.items()},
        )
    ]


def mquake(row: Row, where: str, position: int) -> Rows:
    """MQuAKE (https://huggingface.co/papers/2305.14795): one case rewrites one or more facts and asks a multi-hop question.

    Each rewrite becomes a record; the multi-hop questions belong to the last one, since they need all rewrites of the
    case. Cases of several rewrites are therefore meant for the batch and sequential settings.
    """
    case = str(row.get("case_id", position))
    rewrites = row["requested_rewrite"]
    answers = [row["new_answer"], *row.get("new_answer_alias", [])]
    questions = [{"prompt": prompt, "ground_truth": answers} for prompt in row["questions"]]
    records = []
    for index, rewrite in enumerate(rewrites):
        renamed = {
            "id": case if len(rewrites) == 1 else f"{case}-{index}",
            "subject": rewrite["subject"],
            "prompt": rewrite["prompt"].format(rewrite["subject"]),
            "target_new": rewrite["target_new"]["str"],
            "ground_truth": rewrite["target_true"]["str"],
            "relation": rewrite.get("relation_id"),
        }
        portability = {"multi_hop": questions} if index == len(rewrites) - 1 else {}
        rephrase = _listed(rewrite.get("question"))
        records.append(_record(renamed, position, "mquake", rephrase=rephrase, portability=portability))
    return records


FORMATS: dict[str, Callable[[Row, str, int], Rows]] = {
    function.__name__: function
    for function in (native, easyedit, knowedit, zsre, counterfact, qaedit, rippleedits, mquake)
}


_KNOWEDIT_KINDS = {
    "Reasoning",
    "Subject_Aliasing",
    "Logical_Generalization",
    "Relation_Specificity",
    "Forgetfulness",
}


def detect_format(row: Any, where: str) -> str:
    """Names the format of a row by its keys; raises ValueError listing the keys if none fits."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: this is a {type(row).__name__}; give an object.")
    keys = set(row)
    if "requested_rewrite" in keys:
        return "mquake" if isinstance(row["requested_rewrite"], list) else "counterfact"
    if {"src", "alt"} <= keys:
        return "zsre"
    if isinstance(row.get("edit"), Mapping):
        return "rippleedits"
    if {"text", "labels", "concept"} <= keys:
        return "knowedit"
    if {"prompt", "target"} <= keys:
        return "qaedit"
    if {"prompt", "target_new"} <= keys:
        return _detect_prompt_format(row)
    raise ValueError(
        f"{where}: no known format has the keys {sorted(keys)}; name the format, or convert to our schema."
    )


def _detect_prompt_format(row: Row) -> str:
    """Tells the three formats with `prompt` and `target_new` apart."""
    flat = any(row.get(f"{name}_prompt") for name in ("rephrase", "locality", "portability"))
    values = [v for name in ("portability", "locality") for v in (row.get(name) or {}).values() if v is not None]
    if flat or any(isinstance(value, Mapping) for value in values):
        return "easyedit"
    kinds = {*(row.get("portability") or {}), *(row.get("locality") or {})}
    return "knowedit" if "id" not in row and kinds & _KNOWEDIT_KINDS else "native"


def _record(row: Row, position: int, source: str, **sections: Any) -> dict[str, Any]:
    """A row of our schema from renamed scalar fields and sections; KnowEdit-style lists of old answers give the first."""
    identifier = next((row[key] for key in ("id", "case_id") if row.get(key) is not None), f"{source}-{position}")
    old = row.get("ground_truth")
    while isinstance(old, (list, tuple)):
        old = old[0] if old else None
    return {
        "id": str(identifier),
        "source": source,
        "subject": row.get("subject"),
        "prompt": row.get("prompt"),
        "target_new": row.get("target_new"),
        # EasyEdit writes the placeholder "<|endoftext|>" where the old answer is unknown.
        "ground_truth": None if old in ("", "<|endoftext|>") else old,
        "relation": row.get("relation"),
        **sections,
    }


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _parallel(item: Any, where: str) -> list[dict[str, Any]]:
    """Questions from `{prompt, ground_truth}` with single items or parallel lists, or from a list of such objects."""
    if not isinstance(item, Mapping):
        return list(item)
    prompts, answers = item.get("prompt"), item.get("ground_truth")
    if isinstance(prompts, str):
        return [{"prompt": prompts, "ground_truth": answers}]
    if (
        not isinstance(prompts, (list, tuple))
        or not isinstance(answers, (list, tuple))
        or len(prompts) != len(answers)
    ):
        raise ValueError(f"{where}: give prompt and ground_truth as two strings or two lists of the same length.")
    return [{"prompt": prompt, "ground_truth": answer} for prompt, answer in zip(prompts, answers, strict=True)]


def _split_statement(statement: str, where: str) -> tuple[str, str]:
    """Splits "The mother of X is Y." into ("The mother of X is", "Y") at the last verb of the data's templates."""
    match = re.fullmatch(r"(.* (?:is followed by|is|are)) (.+?)\.?\s*", statement)
    if match is None:
        raise ValueError(
            f"{where}: edit.prompt={statement!r} is not of the form '<prompt> is <answer>'; rewrite it, or drop the row."
        )
    return match.group(1), match.group(2)


def _ripple_questions(tests: list[Row]) -> list[dict[str, Any]]:
    questions = []
    for test in tests:
        for query in test["test_queries"]:
            groups = [[answer["value"], *answer.get("aliases", [])] for answer in query["answers"] if answer["value"]]
            if groups:
                questions.append({"prompt": query["prompt"], "ground_truth": groups})
    return questions
