"""Secrets and local paths are found, and ordinary text is left alone."""

from __future__ import annotations

import pytest

from hf_ext.model_cards.rules.leaks import EMAIL, LOCAL_PATH, TOKEN, login_name, names_user, without_paths


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("trained from /home/user/models/llama-7b today", "trained from llama-7b today"),
        ("`/mnt/data/x`", "`x`"),
        ("(/srv/cache/hub/m)", "(m)"),
        ("~/models/llama", "llama"),
        ("file:///tmp/run/model", "model"),
        ("C:\\Users\\user\\model", "model"),
        ("C:\\Users\\Jane Doe\\model", "model"),
        ('"C:\\\\Users\\\\jane\\\\model"', '"model"'),
        ("C:/Users/jane/model", "model"),
        ("/home/jane doe/model", "model"),
        ("/content/drive/My Drive/model", "model"),
        ("~jane/x", "x"),
        ("\\\\server\\share", "share"),
        ("base_model:adapter:/home/jane/models/x", "base_model:adapter:x"),
        ("/home/jane", "~"),
        ("C:\\Users\\jane", "~"),
    ],
)
def test_paths(text, clean):
    assert without_paths(text) == clean and not LOCAL_PATH.search(clean.replace("~", ""))


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
        "POST to /v1/chat/completions or /chat/completions/stream",
        "GET /models/list",
        "on 01/02/2026, and/or **a**/b/c, user(s)/group(s)/all, {dir}/a/b",
        "[data](/datasets/user/x)",
        '<img src="/front/assets/logo.svg">',
        "#!/usr/bin/env python",
        "vllm serve /path/to/model",
        # The same in every container: the mount that cards show for serving with Docker.
        "-v ~/.cache/huggingface:/" + "root/.cache/huggingface",
        "https://site.edu/~jane/x",
        "~5/10 of them",
    ],
)
def test_no_false_alarm(text):
    assert not LOCAL_PATH.search(text)


def test_tokens():
    assert TOKEN.search("use hf_" + "aB3" * 11)
    for other in (
        "sk-" + "aB3" * 8,
        "sk-proj-" + "a_B-3" * 8,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "1A_b" * 8,
        "AKIA" + "A1B2" * 4,
    ):
        assert TOKEN.search(f"key={other}")
    for harmless in ("hf_ext", "hf_hub_download", "hf_test", "sk-toggleable__label-arrow-fitted", "AKIAM", "ghp_x"):
        assert not TOKEN.search(harmless)


def test_addresses():
    assert EMAIL.search("write to someone@example.org")
    assert not EMAIL.search("git clone git@github.com:user/repo") and not EMAIL.search("user/data@main.v")
    assert not EMAIL.search("@inproceedings{x") and not EMAIL.search("user/name@abc123")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("trained by janedoe on a cluster", True),
        ("job_owner: janedoe", True),
        ("janedoe/model", False),
        ("https://huggingface.co/janedoe", False),
        ("janedoes", False),
        ("/home/janedoe/model", False),
    ],
)
def test_name_of_the_user(monkeypatch, text, named):
    """A repository's owner is public, and a path is found as a path."""
    monkeypatch.setenv("LOGNAME", "janedoe")
    login = login_name()
    assert login == "janedoe" and names_user(text, login) is named


@pytest.mark.parametrize("login", ["root", "ubuntu", "bob"])
def test_common_names_are_nobody(monkeypatch, login):
    monkeypatch.setenv("LOGNAME", login)
    assert login_name() is None
