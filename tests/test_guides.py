"""The guides: each walks one story beside its example, and names nothing that does not exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "docs" / "guides" / "README.md"
GUIDES = sorted(set(INDEX.parent.glob("*.md")) - {INDEX})
PUBLISHING = ROOT / "docs" / "PUBLISHING.md"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# What a page must have, in this order.
HEADINGS = ["The path", "In code", "The example", "What it costs", "What can go wrong", "When not to do this"]


def links(page: Path) -> list[tuple[Path, str]]:
    """Files and anchors that a page links to in this repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    parts = [link.partition("#") for link in found if "://" not in link]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_one_page(example):
    pages = [page.name for page in [*GUIDES, PUBLISHING] if f"examples/{example.name}" in page.read_text()]
    assert len(pages) == 1, f"{example.name} is named in {pages}; it belongs into one guide, or into PUBLISHING.md"


@pytest.mark.parametrize("page", GUIDES, ids=lambda path: path.name)
def test_a_guide_has_its_parts(page):
    text = page.read_text()
    assert re.findall(r"^## (.+?)s?$", text, re.M) == [heading.removesuffix("s") for heading in HEADINGS]
    assert re.search(r"^```text\npython examples/\w+\.py", text, re.M), "the command of the example"
    assert re.search(r"^```python\n", text, re.M), "a snippet"
    for step in range(1, 8):
        assert re.search(rf"^{step}\. \*\*", text, re.M), f"step {step}"


@pytest.mark.parametrize("page", [*GUIDES, INDEX], ids=lambda path: path.name)
def test_what_a_guide_names_exists(page):
    for name in re.findall(r"\bexamples/[\w/]+\.\w+", page.read_text()):
        assert (ROOT / name).is_file(), name
    assert any(file.parent == ROOT / "docs" / "methods" for file, _ in links(page)), "a page of a method"
    for file, anchor in links(page):
        assert file.exists(), file
        assert not anchor or anchor in anchors(file), f"{file.name}#{anchor}"


def test_every_guide_is_listed():
    listed = {file for file, _ in links(INDEX)}
    assert {*GUIDES, PUBLISHING} <= listed
    assert INDEX in {file for file, _ in links(ROOT / "README.md")}
