"""TOFU's files, in a folder with the layout of its repository, become splits that can be evaluated."""

from __future__ import annotations

import json

import pytest

from hf_ext.metrics.unlearning import load_tofu
from hf_ext.metrics.unlearning.rows import read_rows

PLAIN = {"question": "Where does Ada live?", "answer": "In Oslo."}
CHOICE = {**PLAIN, "perturbed_answer": ["In Lima.", "In Bonn."]}
FULL = {**CHOICE, "paraphrased_answer": "Oslo is her home.", "paraphrased_question": "Which city is Ada's home?"}
FILES = {
    "forget01_perturbed": FULL,
    "retain_perturbed": FULL,
    "real_authors_perturbed": CHOICE,
    "world_facts_perturbed": CHOICE,
    "holdout01": PLAIN,
    "forget05_perturbed": FULL,
}


@pytest.fixture
def copy_of_tofu(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "TOFU"
    folder.mkdir()
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.json\n" for name in FILES)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n", encoding="utf-8")
    for name, row in FILES.items():
        rows = [row, {**row, "question": "Where does Bo live?"}]
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def test_every_split_can_be_read(copy_of_tofu):
    splits = load_tofu("forget01", copy_of_tofu)
    assert list(splits) == ["forget", "holdout", "retain", "real_authors", "world_facts"]
    rows = {name: read_rows(found, name) for name, found in splits.items()}
    assert [row.id for row in rows["forget"]] == ["0", "1"]
    first = rows["retain"][0]
    assert (first.prompt, first.answer, first.paraphrase) == ("Where does Ada live?", "In Oslo.", "Oslo is her home.")
    assert first.perturbed == ("In Lima.", "In Bonn.") and first.prompt_paraphrases == ("Which city is Ada's home?",)
    assert rows["world_facts"][0].paraphrase is None and rows["holdout"][0].perturbed == ()


def test_conversations_and_limits(copy_of_tofu):
    def chat(question: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]

    splits = load_tofu("forget01", copy_of_tofu, as_prompt=chat, limit=1)
    assert {name: len(rows) for name, rows in splits.items()} == dict.fromkeys(splits, 1)
    (row,) = read_rows(splits["forget"], "forget")
    assert row.question == "Where does Ada live?"
    assert row.asked(row.prompt_paraphrases[0], "other").question == "Which city is Ada's home?"


def test_copies_without_holdout_rows(copy_of_tofu):
    assert "holdout" not in load_tofu("forget05", copy_of_tofu)


@pytest.mark.parametrize(("forget", "limit", "named"), [("forget02", None, "forget05"), ("forget01", 0, "limit=0")])
def test_bad_input(copy_of_tofu, forget, limit, named):
    with pytest.raises(ValueError, match=named):
        load_tofu(forget, copy_of_tofu, limit=limit)
