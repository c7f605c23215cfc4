"""Every Python block in README and docs runs, in a fresh namespace and an empty folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(page, code, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.real_model
@pytest.mark.parametrize(("page", "code"), BLOCKS)
def test_snippet_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", *sorted((ROOT / "docs/methods").glob("*.md")), *sorted((ROOT / "docs/guides").glob("*.md"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_first_snippet_is_short(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert not blocks or len(blocks[0].strip().splitlines()) <= 12
