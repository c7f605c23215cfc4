"""Rewrite what is generated: the list of methods from `hf_ext/registry.py`, tables from `benchmarks/results/`, and `docs/API.md` from the sources.

Run `make docs`; a test fails when a page is out of date.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from docs import api
from hf_ext.registry import METHODS

ROOT = Path(__file__).resolve().parent.parent


def method_table(prefix: str) -> str:
    """Markdown table of all methods; `prefix` leads from the page to the repository root."""
    rows = ["| method | kind | what it does | start with | paper |", "| --- | --- | --- | --- | --- |"]
    rows += [
        f"| [{m.name}]({prefix}{m.docs_page}) | {m.kind} | {m.summary} | `{next(iter(m.entry_points))}` | "
        f"[{m.arxiv}]({m.paper_url}) |"
        for m in METHODS
    ]
    return "\n".join(rows)


def results_table(name: str) -> str:
    """The markdown table that benchmark `name` left in its results file."""
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["table"]


def fill(text: str, marker: str, content: str) -> str:
    """Replace what stands between `<!-- marker:begin -->` and `<!-- marker:end -->`."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.S)
    if not pattern.search(text):
        raise ValueError(f"the markers {begin} and {end} are missing")
    return pattern.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def pages() -> dict[Path, str]:
    """Every page with generated parts, as it should read."""
    readme, index = ROOT / "README.md", ROOT / "docs/methods/README.md"
    rendered = {
        readme: fill(readme.read_text(), "methods", method_table("")),
        index: fill(index.read_text(), "methods", method_table("../../")),
    }
    for page in [readme, *sorted((ROOT / "docs").glob("**/*.md"))]:
        text = rendered.get(page, page.read_text())
        for name in re.findall(r"<!-- results:(\w+):begin -->", text):
            text = fill(text, f"results:{name}", results_table(name))
        rendered[page] = text
    rendered[ROOT / "docs/API.md"] = api.page()
    return rendered


def main() -> None:
    for page, text in pages().items():
        page.write_text(text)


if __name__ == "__main__":
    main()
