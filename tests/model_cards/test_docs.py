"""The snippets of docs/PUBLISHING.md run, and its example."""

from __future__ import annotations

import re
import runpy
import sys

import pytest

from tests.hub.fixtures import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PUBLISHING.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(code.splitlines()) <= 12
    exec(compile(code, "PUBLISHING.md", "exec"), {})


def test_example_writes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["publish_an_adapter.py"])
    runpy.run_path(str(ROOT / "examples" / "publish_an_adapter.py"), run_name="__main__")
    assert "RoseLoRA adapter for user/tiny-llama" in capsys.readouterr().out
