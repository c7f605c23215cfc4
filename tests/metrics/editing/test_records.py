"""Reading edits: our schema, the published formats, and every way a row can be wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.metrics.editing import EditRecord, Question, load_edits

GOOD = {"id": "a", "prompt": "Ada lives in", "target_new": "Lomak"}
name = st.text(alphabet="abcxyz é", min_size=1, max_size=8).filter(str.strip).map(str.strip)
answers = st.one_of(
    st.lists(name, min_size=1, max_size=2), st.lists(st.lists(name, min_size=1, max_size=2), min_size=2, max_size=3)
)
sections = st.dictionaries(
    name,
    st.lists(st.fixed_dictionaries({"prompt": name, "ground_truth": answers}), min_size=1, max_size=2),
    max_size=2,
)


@given(
    st.fixed_dictionaries(
        {
            "prompt": name,
            "target_new": name,
            "subject": name,
            "ground_truth": st.none() | name,
            "rephrase": st.lists(name),
        },
        optional={"portability": sections, "locality": sections},
    )
)
def test_round_trip(row):
    record = EditRecord.from_dict(row)
    assert EditRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_paths_and_iterables(tmp_path):
    rows = [GOOD, {**GOOD, "id": "b"}]
    lines = tmp_path / "edits.jsonl"
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    array = tmp_path / "edits.json"
    array.write_text(json.dumps(rows), encoding="utf-8")
    assert load_edits(lines) == load_edits(str(array)) == load_edits(rows) == load_edits(iter(load_edits(rows)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**GOOD, "target_new": " "}, r"row 0 \(id 'a'\): target_new=' ' is empty"),
        ({**GOOD, "target_new": None}, "target_new=None: give a string"),
        ({**GOOD, "ground_truth": ""}, "ground_truth='' is empty"),
        ({**GOOD, "rephrase": "text"}, "rephrase='text': give a list"),
        ({**GOOD, "rephrase": ["x", ""]}, r"rephrase\[1\]='' is empty"),
        ({**GOOD, "source": "s", "targets": []}, r"unknown fields \['targets'\]"),
        ({**GOOD, "locality": {"k": [{"prompt": "x"}]}}, r"locality.k\[0\]"),
        ({**GOOD, "locality": {"k": [{"prompt": "x", "ground_truth": []}]}}, "at least one accepted answer"),
        ({**GOOD, "locality": {"k": [{"prompt": "x", "ground_truth": [[]]}]}}, "empty list of aliases"),
        ({**GOOD, "locality": {"k": [{"prompt": "x", "ground_truth": ["a", ["b"]]}]}}, "mixes answers"),
        ({**GOOD, "locality": {"k": "x"}}, "locality.k='x': give a list"),
        ({**GOOD, "subject": 3}, "subject=3: give a string"),
        ({"prompt": "x", "target_new": "y", "localty": {}}, r"unknown fields \['localty'\]"),
        (EditRecord(prompt="x", target_new=""), "target_new='' is empty"),
        ({"a": 1}, "no known format has the keys"),
        ("text", "give an object"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        load_edits([row])


def test_bad_files_are_named_with_the_line(tmp_path):
    path = tmp_path / "edits.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"edits.jsonl line 2: not valid JSON"):
        load_edits(path)
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(GOOD), encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 3: id 'a' already occurs in edits\.jsonl line 1"):
        load_edits(path)
    array = tmp_path / "edits.json"
    array.write_text("[{]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"edits\.json line 1"):
        load_edits(array)
    array.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="give a list of records"):
        load_edits(array)
    with pytest.raises(ValueError, match="source is empty"):
        load_edits([])
    with pytest.raises(ValueError, match="format='csv' is unknown"):
        load_edits([GOOD], format="csv")
    with pytest.raises(ValueError, match="the format 'zsre' needs the field 'src'"):
        load_edits([GOOD], format="zsre")


def one(row, **options) -> EditRecord:
    (record,) = load_edits([row], **options)
    return record


def test_easyedit_single_items_and_parallel_lists():
    record = one(
        {
            "prompt": "Ada lives in",
            "target_new": "Lomak",
            "subject": "Ada",
            "ground_truth": "<|endoftext|>",
            "rephrase_prompt": "the home of Ada is",
            "locality": {
                "one": {"prompt": "Bo lives in", "ground_truth": "Rome"},
                "many": {"prompt": ["Cy lives in", "Di lives in"], "ground_truth": ["Oslo", ["Bonn", "Bonna"]]},
            },
            "portability": {"hop": {"prompt": "Ada's river is", "ground_truth": "Lom"}},
        }
    )
    assert record.source == "easyedit" and record.ground_truth is None
    assert record.rephrase == ("the home of Ada is",)
    assert record.locality["one"] == (Question("Bo lives in", (("Rome",),)),)
    assert record.locality["many"][1] == Question("Di lives in", (("Bonn", "Bonna"),))
    with pytest.raises(ValueError, match=r"locality.k: give prompt and ground_truth"):
        one({**GOOD, "locality": {"k": {"prompt": ["x"], "ground_truth": ["a", "b"]}}})


def test_flat_easyedit_files():
    flat = {**GOOD, "rephrase_prompt": "r", "locality_prompt": "l", "locality_ground_truth": "x", "case_id": 7}
    del flat["id"]
    record = one(flat)
    assert record.id == "7" and record.locality["locality"][0].prompt == "l"


def test_knowedit():
    record = one(
        {
            "subject": "Ada",
            "prompt": "Ada lives in",
            "target_new": "Lomak",
            "ground_truth": [["Rome"]],
            "portability": {
                "Reasoning": [{"prompt": "Ada's river is", "ground_truth": [["Lom", "River Lom"], ["Tes"]]}]
            },
            "locality": {"Relation_Specificity": [{"prompt": "Ada likes", "ground_truth": [["tea"]]}]},
        }
    )
    assert record.source == "knowedit" and record.ground_truth == "Rome"
    assert record.portability["Reasoning"][0].answers == (("Lom", "River Lom"), ("Tes",))
    wikibio = one({"concept": "ada", "text": "About Ada.", "labels": "She lives in Lomak.", "locality": {}})
    assert (wikibio.subject, wikibio.target_new) == ("ada", "She lives in Lomak.")


def test_zsre():
    row = {
        "subject": "Ada",
        "src": "Where does Ada live?",
        "alt": "Lomak",
        "answers": ["Rome"],
        "rephrase": "Ada's home?",
    }
    record = one({**row, "loc": "nq question: who sang", "loc_ans": "Bo", "pred": "x", "cond": "y"})
    assert (record.prompt, record.target_new, record.ground_truth) == ("Where does Ada live?", "Lomak", "Rome")
    assert record.locality["nq"] == (Question("nq question: who sang", (("Bo",),)),)


def test_counterfact():
    record = one(
        {
            "case_id": 3,
            "requested_rewrite": {
                "prompt": "{} lives in",
                "relation_id": "P1",
                "subject": "Ada",
                "target_new": {"str": "Lomak"},
                "target_true": {"str": "Rome"},
            },
            "paraphrase_prompts": ["The home of Ada is"],
            "neighborhood_prompts": ["Bo lives in", "Cy lives in"],
            "attribute_prompts": [],
        }
    )
    assert (record.id, record.prompt, record.relation) == ("3", "Ada lives in", "P1")
    assert [question.answers for question in record.locality["neighborhood"]] == [(("Rome",),)] * 2


def test_qaedit():
    row = {"prompt": "Where does Ada live?", "target": "Lomak", "rephrase": ["Ada's home?"], "subject": "Ada"}
    record = one({**row, "locality": [{"loc": "who sang", "loc_ans": "Bo"}]})
    assert record.target_new == "Lomak" and record.locality["unrelated"][0].answers == (("Bo",),)


def test_rippleedits():
    def tests(prompt, *values):
        queries = [{"prompt": prompt, "answers": [{"value": v, "aliases": [v.upper()]} for v in values]}]
        return [{"test_queries": queries, "test_condition": "OR", "condition_queries": []}]

    record = one(
        {
            "example_type": "popular",
            "edit": {
                "prompt": "The name of the city of birth of Ada is New Lomak.",
                "relation": "CITY",
                "original_fact": {"prompt": "The name of the city of birth of Ada is New Rome."},
            },
            "Logical_Generalization": tests("Lomak's daughter is", "Ada", "Di"),
            "Compositionality_I": tests("unanswerable", ""),
            "Relation_Specifity": tests("The pet of Ada is", "Rex"),
            "Forgetfulness": [],
        }
    )
    assert record.prompt == "The name of the city of birth of Ada is"
    assert (record.target_new, record.ground_truth) == ("New Lomak", "New Rome")
    assert record.portability == {
        "Logical_Generalization": (Question("Lomak's daughter is", (("Ada", "ADA"), ("Di", "DI"))),)
    }
    assert set(record.locality) == {"Relation_Specificity"}
    with pytest.raises(ValueError, match="is not of the form"):
        one({"edit": {"prompt": "nonsense"}})


def test_mquake_cases_of_several_rewrites():
    rewrite = {
        "prompt": "{} lives in",
        "relation_id": "P1",
        "target_new": {"str": "Lomak"},
        "target_true": {"str": "Rome"},
        "subject": "Ada",
        "question": "Where does Ada live?",
    }
    case = {
        "case_id": 9,
        "requested_rewrite": [rewrite, {**rewrite, "subject": "Bo"}],
        "questions": ["Which country?", "What country?"],
        "answer": "Italy",
        "new_answer": "Foduk",
        "new_answer_alias": ["Republic of Foduk"],
    }
    first, second = load_edits([case])
    assert (first.id, second.id) == ("9-0", "9-1") and first.portability == {}
    assert second.portability["multi_hop"][0].answers == (("Foduk", "Republic of Foduk"),)
    assert second.rephrase == ("Where does Ada live?",)
