"""Base models are identified without giving away local paths."""

from __future__ import annotations

import json

import pytest

from hf_ext.model_cards.facts.base_model import identify

SHA = "0123456789abcdef0123456789abcdef01234567"


def folder_with_config(folder, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_hub_id():
    assert identify("google/gemma-3-270m").id == "google/gemma-3-270m"


@pytest.mark.parametrize("name", [None, "", "/home/x/model", "./model", "model", "a/b/c", "C:\\models\\x"])
def test_what_is_no_hub_id(name):
    assert identify(name).id is None


def test_folder_that_looks_like_an_id(tmp_path, monkeypatch):
    folder_with_config(tmp_path / "runs" / "final")
    monkeypatch.chdir(tmp_path)
    assert identify("runs/final").id is None


def test_id_and_commit_of_a_cached_snapshot(tmp_path):
    folder = folder_with_config(tmp_path / "models--google--gemma-3-270m" / "snapshots" / SHA, vocab_size=7)
    found = identify(folder)
    assert (found.id, found.commit, found.vocab_size) == ("google/gemma-3-270m", SHA, 7)


def test_id_from_the_folders_config(tmp_path):
    assert (
        identify(folder_with_config(tmp_path / "m", _name_or_path="google/gemma-3-270m")).id == "google/gemma-3-270m"
    )
    assert identify(folder_with_config(tmp_path / "n", _name_or_path="/home/x/model")).id is None


def test_explicit_id_wins(tmp_path):
    assert identify(folder_with_config(tmp_path / "m", _name_or_path="a/b"), explicit="c/d").id == "c/d"


def test_digest_changes_with_any_shard(tmp_path):
    folder = folder_with_config(tmp_path / "m")
    (tmp_path / "m" / "1.safetensors").write_bytes(b"1")
    one = identify(folder).digest
    (tmp_path / "m" / "2.safetensors").write_bytes(b"2")
    two = identify(folder).digest
    (tmp_path / "m" / "2.safetensors").write_bytes(b"3")
    assert len({one, two, identify(folder).digest}) == 3


def test_a_large_checkpoint_is_not_read(tmp_path):
    folder = folder_with_config(tmp_path / "m")
    with (tmp_path / "m" / "model.safetensors").open("wb") as file:
        file.truncate(2**28 + 1)
    assert identify(folder).digest is None
