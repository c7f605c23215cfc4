"""What the Hub would reject or misread (errors), and what a reader would miss (warnings). Needs no network for a folder or a card."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_ext.model_cards.facts.base_model import REPO_ID
from hf_ext.model_cards.markers import BEGIN, END
from hf_ext.model_cards.rules.folder import file_errors, file_warnings, is_read
from hf_ext.model_cards.rules.leaks import TOKEN
from hf_ext.model_cards.rules.metadata import metadata_errors, metadata_warnings
from hf_ext.model_cards.rules.text import text_warnings
from hf_ext.model_cards.rules.yaml_text import load


@dataclass(frozen=True)
class Finding:
    """One broken rule. `str(finding)` is what a person reads."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


@dataclass
class Report:
    """What `validate` found. `errors` would be rejected or misread by the Hub, or leak a secret."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"error   {finding}" for finding in self.errors] + [f"warning {finding}" for finding in self.warnings]
        return "\n".join(lines) or "no findings"


def validate(card: ModelCard | str | Path, *, repo_id: str | None = None) -> Report:
    """Check a card, a folder with its card and files, or a repository on the Hub.

    Args:
        card: a `ModelCard`, the text of a README.md, a folder, or a Hub id. A `str` without a line break is a folder if there is
            one of that name, and otherwise a Hub id, of which the card, other small text, the adapter's weights up to 64 MiB, and
            the names of all files are read.
        repo_id: where it is published or will be, so that code which loads something else is noticed.

    Raises:
        ValueError: neither a folder nor a Hub id.
    """
    if isinstance(card, Path) or (isinstance(card, str) and not {"\n", "\r"} & set(card)):
        folder = Path(card)
        if folder.is_dir():
            return _of_folder(folder, repo_id)
        if isinstance(card, Path) or not REPO_ID.fullmatch(card):
            raise ValueError(
                f"card={str(card)!r} is no folder; give a folder, a Hub id, the text of a card or a ModelCard."
            )
        return _of_repo(card)
    report = Report()
    _check(report, str(card), None, [], repo_id)
    return report


def _of_folder(folder: Path, repo_id: str | None) -> Report:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return _of_files(folder, files, folder.resolve().name, repo_id)


def _of_repo(repo_id: str) -> Report:
    info = HfApi().model_info(repo_id, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    read = [glob.escape(name) for name, size in sizes.items() if name == "README.md" or is_read(name, size)]
    folder = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=read))
    return _of_files(folder, sorted(sizes), repo_id, repo_id)


def _of_files(folder: Path, files: list[str], name: str, repo_id: str | None) -> Report:
    """Of a repository, `folder` holds those of the files that are read."""
    report = Report()
    report.errors += _findings(file_errors(folder, files))
    if "README.md" in files:
        _check_file(report, folder / "README.md", folder, files, repo_id)
    else:
        report.errors.append(Finding("card-missing", f"{name} has no README.md; write one with `build_card`"))
        report.warnings += _findings(file_warnings(folder, files, {}, ""))
    return report


def _check_file(report: Report, readme: Path, folder: Path, files: list[str], repo_id: str | None) -> None:
    try:
        content = readme.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        report.errors.append(Finding("encoding", f"README.md is not UTF-8 ({error}); save it as UTF-8"))
        return
    _check(report, content, folder, files, repo_id)


def _check(report: Report, content: str, folder: Path | None, files: list[str], repo_id: str | None) -> None:
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    tokens = sorted({f"{found[:6]}…" for found in TOKEN.findall(content)})
    if tokens:
        report.errors.append(
            Finding("token", f"the card contains the access token {', '.join(tokens[:8])}; revoke it")
        )
    data, problem = _metadata(content)
    if problem is not None:
        report.errors.append(problem)
        return
    block = REGEX_YAML_BLOCK.search(content)
    text = content[block.end() :] if block else content
    report.errors += _findings(metadata_errors(data))
    report.warnings += _findings(metadata_warnings(data, files))
    report.warnings += _findings(_markers(text))
    report.warnings += _findings(file_warnings(folder, files, data, text))
    report.warnings += _findings(text_warnings(text, data, repo_id))


def _markers(text: str) -> Iterator[tuple[str, str]]:
    if (text.count(BEGIN), text.count(END)) not in ((0, 0), (1, 1)) or text.find(END) < text.find(BEGIN):
        yield (
            "markers",
            f"{BEGIN} and {END} are not there once each and in this order, so nothing can be published over it; restore or remove both",
        )


def _findings(found: Iterable[tuple[str, str]]) -> list[Finding]:
    return [Finding(rule, message) for rule, message in found]


def _metadata(content: str) -> tuple[dict[str, Any], Finding | None]:
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return {}, Finding("metadata-missing", "the card does not begin with a YAML block between two lines '---'")
    try:
        data = load(block[2]) or {}
    except ValueError as error:
        return {}, Finding("metadata-yaml", f"the metadata is not YAML: {error}")
    if not isinstance(data, dict):
        return {}, Finding("metadata-mapping", f"the metadata is a {type(data).__name__}; it must be key: value lines")
    return data, None
