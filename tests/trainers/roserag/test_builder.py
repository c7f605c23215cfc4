"""The builder: what becomes a pair, and that nothing is lost or done twice."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset, load_from_disk

from hf_ext.metrics.rag import AnswerMatcher, Condition
from hf_ext.trainers.roserag import RoseRAGDatasetBuilder
from hf_ext.trainers.roserag.selection import select
from hf_ext.trainers.roserag.store import StageStore, locked
from tests.trainers.roserag.helpers import ScriptedBackend, question_rows


def built(rows=None, backend=None, **options):
    builder = RoseRAGDatasetBuilder(backend or ScriptedBackend(), **options)
    return builder, builder.build(question_rows() if rows is None else rows)


def test_pairs_are_right_against_wrong_and_the_hardest():
    builder, data = built()
    assert len(data) == 4 == builder.report.outcomes["pair"]
    for row in data:
        texts = [candidate["text"] for candidate in row["candidates"]]
        correct = [candidate["correct"] for candidate in row["candidates"]]
        scores = [candidate["sum"] / candidate["tokens"] for candidate in row["candidates"]]
        pair = select(scores, correct)
        assert row["chosen"] == [{"role": "assistant", "content": texts[pair.chosen]}]
        assert row["rejected"] == [{"role": "assistant", "content": texts[pair.rejected]}]
        assert row["margin"] == pytest.approx(row["chosen_score"] - row["rejected_score"])
        assert (row["n_correct"], row["n_incorrect"]) == (sum(correct), len(correct) - sum(correct))
        assert len(set(texts)) == len(texts)
        gold = {"q0": "Paris", "q1": "Rome", "q2": "Oslo", "q3": "Lima"}[row["question_id"]]
        for text, right in zip(texts, correct, strict=True):
            assert text.endswith(f"Answer: {gold}") == right and "\nmore" not in text


def test_the_hint_is_never_trained_on():
    _, data = built()
    for row in data:
        assert "is known to be" not in json.dumps(row["prompt"])
        assert [turn["role"] for turn in row["prompt"]] == ["system", "user"]
        # A rationale that led elsewhere is thrown away, and is no wrong answer of the model's own.
        assert not any("Lyon" in candidate["text"] for candidate in row["candidates"])


def test_acceptance_is_counted():
    builder, _ = built()
    hinted, unhinted = builder.report.candidates["hinted"], builder.report.candidates["unhinted"]
    assert hinted["written"] == unhinted["written"] == 32
    assert 0 < builder.report.acceptance("hinted") < 1
    table = builder.report.table()
    assert "| made a pair | 4 |" in table and f"| hinted | 32 | {hinted['accepted']} (" in table


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_size_of_a_batch_changes_nothing(batch_size):
    assert built(batch_size=batch_size)[1].to_list() == built()[1].to_list()


def test_settings_change_what_they_name():
    base = built()[1].to_list()
    assert built(seed=1)[1].to_list() != base
    easiest = built(selection="easiest")[1]
    assert all(e["margin"] >= b["margin"] for e, b in zip(easiest, base, strict=True))
    drawn = built(selection="random")[1]
    assert drawn.to_list() == built(selection="random")[1].to_list()
    own = built(use_unhinted_correct=False)[1]
    assert all(c["source"] == "hinted" for row in own for c in row["candidates"] if c["correct"])
    unhinted = built(n_hinted=0)[1]
    assert all(c["source"] == "unhinted" for row in unhinted for c in row["candidates"])
    summed = built(selection_score="sum")[1]
    assert {row["chosen_score"] for row in summed} <= {c["sum"] for row in summed for c in row["candidates"]}


def test_conditions_without_passages_are_counted():
    builder, data = built(noise=[Condition(), Condition(distractors=9)])
    assert len(data) == 4 == builder.report.outcomes["no_condition"]
    with pytest.raises(ValueError, match="give questions with more passages"):
        built(noise=[Condition(distractors=9)])


def test_responses_without_an_answer_or_reasoning_are_no_candidates():
    class Bare(ScriptedBackend):
        def write(self, conversations, seeds, sampling, prompts):
            found = super().write(conversations, seeds, sampling, prompts)
            return [
                [
                    text.replace("Answer: Bern", "and so") if seed % 4 else text
                    for text, seed in zip(texts, own, strict=True)
                ]
                for texts, own in zip(found, seeds, strict=True)
            ]

    builder, data = built(backend=Bare())
    assert builder.report.candidates["unhinted"]["unanswered"] > 0
    assert all(c["answer"] and c["text"].partition("\n")[0] for row in data for c in row["candidates"])


def test_one_build_at_a_time(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="another build is at work there"):
        built(cache_dir=tmp_path)
    assert len(built(cache_dir=tmp_path)[1]) == 4


def test_other_weights_are_another_writer(tmp_path):
    backend = ScriptedBackend()
    builder = RoseRAGDatasetBuilder(backend, cache_dir=tmp_path)
    builder.build(question_rows())
    backend.identity = "scripted@2"
    builder.build(question_rows())
    assert backend.written == 2 * 4 * 24 and builder.report.settings["writer"] == "scripted@2"


def test_noise_makes_a_row_per_condition():
    _, data = built(noise=[Condition(distractors=0), Condition(distractors=1)])
    assert len(data) == 8
    by_id = {row["question_id"]: row["prompt"][1]["content"] for row in data}
    assert "The sea" not in by_id["q0 (gold + 0)"] and "The sea" in by_id["q0 (gold + 1)"]


class Shelf:
    """A retriever that knows four capitals."""

    def search(self, queries, k):
        rows = {row["question"]: row["documents"] for row in question_rows()}
        return [[{**document, "score": 1.0} for document in rows.get(query, [])[:k]] for query in queries]


def test_passages_are_retrieved():
    rows = [{name: row[name] for name in ("id", "question", "answers")} for row in question_rows()]
    assert built(rows, retriever=Shelf())[1].to_list() == built()[1].to_list()
    rows.append({"id": "other", "question": "What is the capital of France? Really", "answers": ["Paris"]})
    builder, data = built(rows, retriever=Shelf())
    assert len(data) == 4 and builder.report.outcomes["no_passages"] == 1


def test_finished_work_is_not_done_again(tmp_path):
    first, second = ScriptedBackend(), ScriptedBackend()
    one = built(backend=first, cache_dir=tmp_path)[1].to_list()
    builder, two = built(backend=second, cache_dir=tmp_path)
    assert one == two.to_list() and first.written == 4 * 24
    assert (second.written, second.scored, builder.report.reused) == (0, 0, 8)
    # Another selection needs no new responses, and other questions none of the old.
    assert len(built(backend=second, cache_dir=tmp_path, selection="easiest")[1]) == 4 and second.written == 0
    built(question_rows(5), backend=second, cache_dir=tmp_path)
    assert second.written == 24


def test_failed_rows_are_marked_and_tried_again(tmp_path):
    builder, data = built(backend=ScriptedBackend(fails=["Italy"]), cache_dir=tmp_path)
    assert [row["question_id"] for row in data] == ["q0", "q2", "q3"]
    assert builder.report.outcomes["failed"] == 1 and builder.report.failures == {"q1": "scripted to fail"}
    again = ScriptedBackend()
    assert built(backend=again, cache_dir=tmp_path)[1].to_list() == built()[1].to_list()
    assert again.written == 24


def test_a_server_that_is_down_stops_the_build(tmp_path):
    rows = question_rows(40)
    with pytest.raises(ConnectionError, match=r"16 questions in a row got no response.*the same call goes on"):
        built(rows, ScriptedBackend(fails=["Italy", "France", "Norway", "Peru"]), cache_dir=tmp_path)


def test_folders_are_whole_or_not_there(tmp_path):
    builder = RoseRAGDatasetBuilder(ScriptedBackend())
    data = builder.build(question_rows(), tmp_path / "pairs")
    assert load_from_disk(tmp_path / "pairs").to_list() == data.to_list() == built()[1].to_list()
    told = json.loads((tmp_path / "pairs" / "roserag_build.json").read_text())
    assert told["outcomes"] == {"no_passages": 0, "pair": 4} and told["settings"]["writer"] == "scripted@1"
    assert "scripted@1" in data.info.description
    with pytest.raises(ValueError, match="exists: give another"):
        builder.build(question_rows(), tmp_path / "pairs")
    with pytest.raises(ConnectionError):
        RoseRAGDatasetBuilder(ScriptedBackend(fails=["capital"])).build(question_rows(40), tmp_path / "none")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


SLOW_BUILD = """
import sys, time
from hf_ext.trainers.roserag import RoseRAGDatasetBuilder
from tests.trainers.roserag.helpers import ScriptedBackend, question_rows

class Slow(ScriptedBackend):
    def write(self, *args):
        time.sleep(0.05)
        return super().write(*args)

RoseRAGDatasetBuilder(Slow(), batch_size=2, cache_dir=sys.argv[1]).build(question_rows(24), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 9])
def test_killed_and_started_again_it_makes_the_same(tmp_path, lines):
    command = [sys.executable, "-c", SLOW_BUILD, str(tmp_path / "cache"), str(tmp_path / "pairs")]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": "."})
    deadline = time.monotonic() + 120
    while sum(len(path.read_bytes().splitlines()) for path in tmp_path.glob("cache/unhinted-*.jsonl")) < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "pairs").exists()
    backend = ScriptedBackend()
    builder = RoseRAGDatasetBuilder(backend, batch_size=2, cache_dir=tmp_path / "cache")
    data = builder.build(question_rows(24), tmp_path / "pairs")
    assert data.to_list() == built(question_rows(24))[1].to_list()
    assert builder.report.reused >= 2 * lines - 1 and backend.written < 24 * 24


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    store = StageStore(tmp_path, "stage", {"a": 1})
    store.add([("one", [1]), ("two", "ü\n")])
    (path,) = tmp_path.glob("stage-*.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key":"three","resu')
    again = StageStore(tmp_path, "stage", {"a": 1})
    assert (len(again), again.get("two"), again.get("three")) == (2, "ü\n", None)
    again.add([("three", 3)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"broken\n" + b"".join(lines[1:]))
    assert StageStore(tmp_path, "stage", {"a": 1}).get("two") == "ü\n"
    assert StageStore(tmp_path, "stage", {"a": 1}).get("three") == 3
    assert StageStore(tmp_path, "stage", {"a": 2}).get("one") is None


def test_refusals_are_wrong_only_where_the_passages_tell():
    class Refuses(ScriptedBackend):
        def write(self, conversations, seeds, sampling, prompts):
            found = super().write(conversations, seeds, sampling, prompts)
            return [[text.replace("Bern", "I do not know") for text in texts] for texts in found]

    builder, data = built(backend=Refuses())
    assert len(data) == 4 and builder.report.candidates["unhinted"]["refusals"] == 0
    silent = [{**row, "documents": row["documents"][1:]} for row in question_rows()]
    builder = RoseRAGDatasetBuilder(Refuses())
    with pytest.raises(ValueError, match=r"no question made a pair \(\{'no_incorrect': 4\}\): raise n_unhinted"):
        builder.build(silent)
    assert builder.report.candidates["unhinted"]["refusals"] > 0


def test_another_scorer_is_told(caplog):
    class Other(ScriptedBackend):
        identity = "other@1"

    with caplog.at_level(logging.WARNING):
        RoseRAGDatasetBuilder(ScriptedBackend(), Other())
    assert "written by scripted@1 and scored by other@1" in caplog.text


class WriterAlone:
    identity = "endpoint"
    write = ScriptedBackend.write


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n_hinted": -1}, "n_hinted=-1"),
        ({"n_hinted": 1, "n_unhinted": 0}, "at least two responses"),
        ({"n_docs": 0}, "n_docs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"selection": "best"}, "selection='best'"),
        ({"noise": []}, "at least one condition"),
        ({"noise": [Condition(), Condition()]}, "each once"),
        ({"noise": [Condition()], "retriever": Shelf()}, "a retriever would not be asked"),
        ({"selection_score": "max"}, "selection_score='max'"),
        ({"writer": WriterAlone()}, "WriterAlone cannot score"),
    ],
)
def test_bad_settings(options, named):
    with pytest.raises(ValueError, match=named):
        RoseRAGDatasetBuilder(**{"writer": ScriptedBackend(), **options})


def test_bad_questions():
    with pytest.raises(ValueError, match="question 'q0' has no documents"):
        built([{**question_rows()[0], "documents": []}])
    with pytest.raises(ValueError, match="row 0 is 'train'"):
        built({"train": Dataset.from_list(question_rows())})
    with pytest.raises(ValueError, match="has no gold answer"):
        built([{**question_rows()[0], "answers": []}])
    with pytest.raises(ValueError, match="noise= needs documents with is_gold"):
        built([{**question_rows()[0], "documents": [{"text": "x"}]}], noise=[Condition()])
    with pytest.raises(ValueError, match=r"no_correct.*raise n_hinted"):
        built([{**row, "answers": ["xyz"]} for row in question_rows()], matcher=AnswerMatcher(), n_hinted=0)


def test_a_dataset_is_read_without_being_loaded_whole():
    assert built(Dataset.from_list(question_rows()))[1].to_list() == built()[1].to_list()
    assert built(iter(question_rows()))[1].to_list() == built()[1].to_list()
