"""Benchmarks as a whole: the summary leaves nobody out, and every figure on a page names a command that exists."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest

from benchmarks import baft_cost, run_all, summary
from benchmarks.cost import Line

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(page, name, id=f"{page.relative_to(ROOT)}-{name}")
    for page in PAGES
    for name in re.findall(r"<!-- results:(\w+):begin -->", page.read_text())
]


def scripts(pattern):
    """Modules below `benchmarks`, without its name."""
    found = (ROOT / "benchmarks").rglob(pattern)
    return {".".join(path.relative_to(ROOT / "benchmarks").with_suffix("").parts) for path in found}


def test_every_cost_benchmark_takes_part():
    costs = scripts("*cost.py") - {"cost"}
    assert costs <= summary.SCRIPTS.keys(), "add it to `SCRIPTS` of benchmarks/summary.py"
    assert summary.SCRIPTS.keys() <= set(run_all.SCRIPTS)


@pytest.mark.parametrize("script", summary.SCRIPTS)
def test_what_is_stored_renders_as_it_did_and_fits_into_the_summary(script):
    module = importlib.import_module(f"benchmarks.{script}")
    stored = json.loads((RESULTS / f"{module.NAME}.json").read_text())
    rows = stored["rows" if "rows" in stored else "results"]
    assert stored["table"].startswith(module.table(rows))
    assert type(module.SMALL) is type(module.FULL) and module.SMALL != module.FULL
    if script != "kv_cache.decode":  # whose stored rows have medians alone
        assert all(isinstance(line, Line) for line in module.lines(rows, module.FULL))


def test_the_summary_of_a_tiny_layer():
    """What `python -m benchmarks.summary` does, with one block and no model."""
    size = baft_cost.Size(widths=(64,), steps=(), repeats=2)
    found = baft_cost.lines(baft_cost.measure(size), size)
    stored = json.loads(json.dumps(summary.report({"baft_cost": found})))
    assert stored["command"] == "python -m benchmarks.summary"
    assert [Line(**line) for line in stored["results"]["baft_cost"]] == found
    (line,) = found
    assert 0 < line.low <= line.ratio <= line.high and line.bar == 1 and line.unit == "CPU ms"
    head, rule, row = stored["table"].split("\n\n")[0].splitlines()
    assert head == "| what is measured | ours | peer | ratio | spread | bar |"
    assert row.startswith("| BaFT: block of width 64") and row.count("|") == head.count("|") == rule.count("|")


def test_the_stored_summary_has_every_script_and_renders_as_it_did():
    stored = json.loads((RESULTS / "summary.json").read_text())
    found = {script: [Line(**line) for line in lines] for script, lines in stored["results"].items()}
    assert list(found) == list(summary.SCRIPTS) and all(found.values())
    assert stored["table"] == summary.report(found)["table"]


@pytest.mark.parametrize(("page", "name"), BLOCKS)
def test_a_table_of_results_names_its_command(page, name):
    command = json.loads((RESULTS / f"{name}.json").read_text())["command"]
    assert command in page.read_text(), f"{page.name} shows {name}.json and does not say `{command}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_tells_to_run_exists(page):
    text = page.read_text()
    for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, f"{page.name}: {module}"
    for path in re.findall(r"\b(?:benchmarks|examples)/[\w/]+\.(?:py|json|png)\b", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_has_a_command_that_exists(path):
    stored = json.loads(path.read_text())
    module = stored["command"].removeprefix("python -m ").split()[0]
    assert importlib.util.find_spec(module) is not None, stored["command"]
    assert module.removeprefix("benchmarks.") in run_all.SCRIPTS
    assert stored["table"] and stored["machine"]["processor"]
