"""Secrets and local paths are found, and ordinary text is left alone."""

from __future__ import annotations

import pytest

from hf_ext.model_cards.leaks import EMAIL, LOCAL_PATH, TOKEN, without_paths


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("trained from /home/user/models/llama-7b today", "trained from llama-7b today"),
        ("`/mnt/data/x`", "`x`"),
        ("(/srv/cache/hub/m)", "(m)"),
        ("~/models/llama", "llama"),
        ("file:///tmp/run/model", "model"),
        ("C:\\Users\\user\\model", "model"),
    ],
)
def test_paths(text, clean):
    assert without_paths(text) == clean


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/papers/2406.10777",
        "user/model and/or org/other",
        "[id](https://huggingface.co/user/model)",
        "a/b/c",
        "1/2",
        "<!-- hf_ext:end card -->",
        "km/h",
        "refs/pr/1",
    ],
)
def test_no_false_alarm(text):
    assert not LOCAL_PATH.search(text)


def test_tokens():
    assert TOKEN.search("use hf_" + "aB3" * 11)
    for harmless in ("hf_ext", "hf_hub_download", "hf_test"):
        assert not TOKEN.search(harmless)


def test_addresses():
    assert EMAIL.search("write to someone@example.org")
    assert not EMAIL.search("@inproceedings{x") and not EMAIL.search("user/name@abc123")
