"""The code of a card is run before publishing: in a process of its own, in the folder, offline."""

from __future__ import annotations

import os
import time

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_ext.model_cards import SnippetError, save
from hf_ext.model_cards.running import SnippetRun, code_of, run_snippet
from tests.conftest import make_tiny_llama
from tests.model_cards.tiny import WORDS, lora_model, tiny_tokenizer


def test_what_it_prints(tmp_path):
    (tmp_path / "here.txt").write_text("found")
    run = run_snippet('print(open("user/name").read())', tmp_path, {"user/name": "here.txt"})
    assert run.output == "found" and len(run.digest) == 64
    assert "It printed:\n\n```text\nfound\n```" in run.note


@pytest.mark.parametrize("path", ["", ".", "here"])
def test_a_folder_shadows_no_library(tmp_path, monkeypatch, path):
    """Neither from an entry of the path that means where one is, nor from one that names it."""
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) if path == "here" else path)
    monkeypatch.chdir(tmp_path)
    assert run_snippet("import json; print(json.dumps(1))", tmp_path).output == "1"


def test_tokens_and_paths_are_not_told(tmp_path):
    secret = "hf_" + "a" * 34
    run = run_snippet(f"import os; print('{secret}', os.environ.get('HF_TOKEN'), '/home/me/model')", tmp_path)
    assert run.output == "(removed) None model"


def test_of_the_environment_it_gets_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", "beside")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    run = run_snippet("import os; print(*map('='.join, os.environ.items()), sep='\\n')", tmp_path / "folder")
    assert "secret" not in run.output and "CUDA_VISIBLE_DEVICES=\n" in run.output and "PATH=" in run.output
    assert "HF_HUB_OFFLINE=1" in run.output
    printed = run_snippet("import sys; print(*sys.path)", tmp_path / "folder")
    assert "beside" in printed.output.split()


def test_lines_that_end_as_on_windows():
    assert code_of("text\r\n```python\r\na = 1\r\nb\r\n```\r\n") == "a = 1\nb\n"
    assert code_of("```text\nno code\n```") is None


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0", "(?s)the code of the card fails.*ZeroDivisionError.*run_snippet=False"),
        ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", "(?s)needs the network"),
        ("import socket as s; s.socket(s.AF_INET, s.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 9))", "socket.sendto"),
        ("import socket as s; s.socket().bind(('127.0.0.1', 0))", "socket.bind"),
        ("import socket; socket.gethostbyname('localhost')", "socket.gethostbyname"),
        ("import socket; socket.create_connection(('localhost', 9))", "(?s)needs the network"),
    ],
)
def test_what_fails(tmp_path, code, message):
    with pytest.raises(SnippetError, match=message):
        run_snippet(code, tmp_path)


def test_what_hangs_is_stopped(tmp_path):
    with pytest.raises(SnippetError, match="stopped after 1 s"):
        run_snippet("import time; time.sleep(60)", tmp_path, timeout=1)


def test_what_it_writes_beside_the_model_is_dropped(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "here.txt").write_text("found")
    code = (
        "import os; open('sub/new.txt', 'w').write(open('sub/here.txt').read()); print(os.path.basename(os.getcwd()))"
    )
    assert run_snippet(code, tmp_path).output == "model"
    assert [path.name for path in tmp_path.rglob("*")] == ["sub", "here.txt"]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import os; open('a.txt', 'w').write('other'); os.utime('a.txt', (1, 1))", "a.txt"),
        ("import os; open(os.path.dirname(os.path.realpath('a.txt')) + '/b.txt', 'w')", "b.txt"),
        ("import os; os.remove(os.path.realpath('a.txt'))", "a.txt"),
    ],
)
def test_it_must_not_change_what_is_published(tmp_path, code, name):
    (tmp_path / "a.txt").write_text("words")
    os.utime(tmp_path / "a.txt", (1, 1))
    with pytest.raises(SnippetError, match=f"writes to what is published: {name}. Correct"):
        run_snippet(code, tmp_path)


def test_its_children_end_with_it(tmp_path):
    """One that keeps the outputs open is not waited for, and does not outlive the code."""
    late = f"import time; time.sleep(1.5); open({str(tmp_path / 'late.txt')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {late!r}]); print(time.monotonic())"
    (tmp_path / "folder").mkdir()
    started = float(run_snippet(code, tmp_path / "folder").output)
    assert time.monotonic() - started < 1.5
    time.sleep(2)
    assert not (tmp_path / "late.txt").exists()


def test_an_endless_output_is_stopped(tmp_path):
    with pytest.raises(SnippetError, match="more than 1,048,576 bytes"):
        run_snippet("while True: print('x' * 999)", tmp_path, timeout=30)


def test_output_that_is_no_text(tmp_path):
    assert (
        run_snippet("import sys; sys.stdout.buffer.write(b'a\\xff\\r\\n\\xc3\\xa9')", tmp_path).output == "a\ufffd\né"
    )


def test_a_long_output_and_none():
    note = SnippetRun("", "x" * 1000 + "```", "0").note
    assert note.endswith(" …\n```") and note.count("```") == 2
    assert SnippetRun("", "", "0").note.endswith("It printed nothing.")


def test_it_is_told_in_the_card(tmp_path):
    """An adapter of a base from a folder, whose path is in no file; the base has a tokenizer, so the model writes."""
    for part in (make_tiny_llama(), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "secret-base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "secret-base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    folder = save(model, tmp_path / "adapter", base_model="user/base", license="mit", run_snippet=True, **WORDS)
    text = (folder / "README.md").read_text()
    assert "model.generate" in str(code_of(text)) and 'AutoTokenizer.from_pretrained("user/base")' in text
    assert (
        "This code was run before publishing, in a process of its own that was told to work offline, with torch"
        in text
    )
    assert not [file for file in folder.iterdir() if b"secret-base" in file.read_bytes()]


def test_failing_code_leaves_no_folder(tmp_path):
    with pytest.raises(SnippetError, match="run_snippet=False"):
        save(lora_model(), tmp_path / "adapter", base_model="user/nowhere", run_snippet=True)
    assert list(tmp_path.iterdir()) == []
