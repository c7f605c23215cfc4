"""What the Hub would reject or misread (errors), and what a reader would miss (warnings). Needs no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_ext.model_cards.leaks import EMAIL, LOCAL_PATH, TOKEN
from hf_ext.model_cards.metadata_rules import metadata_errors
from hf_ext.registry import METHODS

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_PLACEHOLDER = re.compile(r"\[?more information needed\]?|\bTODO\b|\bTBD\b|\bFIXME\b", re.IGNORECASE)
_LIBRARY_FILES = {"adapter_config.json": "peft", "model_index.json": "diffusers"}


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


def validate(card: ModelCard | str | Path) -> Report:
    """Check a card, or a folder with its card and files.

    Args:
        card: a `ModelCard`, the text of a README.md, or a folder. A `str` that holds no line break is a folder's path.

    Raises:
        ValueError: the folder does not exist.
    """
    folder = None
    if isinstance(card, Path) or (isinstance(card, str) and "\n" not in card):
        folder = Path(card)
        if not folder.is_dir():
            raise ValueError(f"card={str(card)!r} is not a folder; give a folder, the text of a card or a ModelCard.")
    report = Report()
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) if folder else []
    report.warnings += _file_warnings(files)
    if folder and "README.md" not in files:
        report.errors.append(
            Finding("card-missing", f"{folder.resolve().name} has no README.md; write one with `build_card`")
        )
        return report
    content = (folder / "README.md").read_text(encoding="utf-8-sig") if folder else str(card)
    report.errors += [
        Finding("token", f"the text contains the access token {t[:6]}…; revoke it") for t in TOKEN.findall(content)
    ]
    data, problem = _metadata(content)
    if problem is not None:
        report.errors.append(problem)
        return report
    report.errors += [Finding(rule, message) for rule, message in metadata_errors(data)]
    block = REGEX_YAML_BLOCK.search(content)
    text = content[block.end() :] if block else content
    report.warnings += [*_metadata_warnings(data, files), *_text_warnings(text, data)]
    return report


def _metadata(content: str) -> tuple[dict[str, Any], Finding | None]:
    block = REGEX_YAML_BLOCK.search(content)
    if block is None:
        return {}, Finding("metadata-missing", "the card does not begin with a YAML block between two lines '---'")
    try:
        data = yaml.safe_load(block[2]) or {}
    except yaml.YAMLError as error:
        return {}, Finding("metadata-yaml", f"the metadata is not YAML: {' '.join(str(error).split())}")
    if not isinstance(data, dict):
        return {}, Finding("metadata-mapping", f"the metadata is a {type(data).__name__}; it must be key: value lines")
    return data, None


def _file_warnings(files: list[str]) -> Iterator[Finding]:
    for name in files:
        if name.endswith(PICKLES):
            yield Finding("pickle", f"{name} can run code when it is loaded; save weights as safetensors")


def _metadata_warnings(data: dict[str, Any], files: list[str]) -> Iterator[Finding]:
    if not data.get("license"):
        yield Finding("no-license", "without `license` nobody may rely on using the model; pass license=")
    if data.get("library_name") == "peft" and not data.get("base_model"):
        yield Finding("no-base-model", "an adapter without `base_model` cannot be found or loaded; pass base_model=")
    if data.get("library_name") == "peft" and "unlearning" in (data.get("tags") or []):
        yield Finding(
            "unlearned-adapter",
            "whoever switches the adapter off has what was forgotten; publish the merged weights with merged=True",
        )
    for name, library in _LIBRARY_FILES.items():
        if name in files and data.get("library_name") != library:
            found = data.get("library_name")
            yield Finding("library-name", f"{name} is present, so library_name should be {library!r}, not {found!r}")


def _text_warnings(text: str, data: dict[str, Any]) -> Iterator[Finding]:
    prose = re.sub(r"```bibtex.*?```", "", text, flags=re.DOTALL)
    for rule, pattern, advice in (
        ("placeholder", _PLACEHOLDER, "write the fact, or say that it was not measured"),
        ("local-path", LOCAL_PATH, "it exists on one machine only"),
        ("email", EMAIL, "published addresses are harvested"),
    ):
        found = sorted({match[0] for match in pattern.finditer(prose)})
        if found:
            yield Finding(rule, f"the text contains {', '.join(map(repr, found))}: {advice}")
    if "```python" not in text or "from_pretrained" not in text:
        yield Finding("no-snippet", "no Python snippet shows how to load the model")
    for method in METHODS:
        if method.slug in (data.get("tags") or []) and method.arxiv not in text:
            yield Finding(
                "no-citation", f"the tag {method.slug!r} is set, but the paper {method.paper_url} is not cited"
            )
    if not re.search(r"^#+ .*(limitation|risk)", text, re.IGNORECASE | re.MULTILINE):
        yield Finding("no-limitations", "no section tells the limits and risks")
