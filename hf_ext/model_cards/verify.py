"""Is what was published what its card says? Every claim that can be tried again is tried again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn

from hf_ext.model_cards import running
from hf_ext.model_cards.check import CONFIG, check_adapter
from hf_ext.model_cards.facts.base_model import REPO_ID, file_digest
from hf_ext.model_cards.facts.tensors import headers
from hf_ext.model_cards.loading import load, outline
from hf_ext.model_cards.manifest import FILE, files_of, read_manifest
from hf_ext.model_cards.markers import load_card, our_part
from hf_ext.model_cards.probe import Probe, repeat
from hf_ext.model_cards.rules.folder import LIBRARY_FILES, PICKLES
from hf_ext.model_cards.running import code_of


@dataclass(frozen=True)
class Check:
    """One claim: what was checked, whether it holds (`None`: the card makes no such claim, or it was not tried), and what was found."""

    name: str
    holds: bool | None
    found: str

    def __str__(self) -> str:
        return f"{ {True: 'holds', False: 'FAILS', None: 'not checked'}[self.holds] }: {self.name}: {self.found}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found, check by check; its text is a line for each."""

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """No check failed."""
        return all(check.holds is not False for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def verify(
    folder_or_repo: str | os.PathLike[str],
    *,
    base_model: str | nn.Module | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    run_snippet: bool = False,
) -> Verification:
    """Compare a folder or a repository with what `publish` or `save` recorded beside its card.

    1. Every file has the sha256 that was recorded, and none was added that could run: Python or a pickle. Others are told.
    2. The model is loaded as the card says and asked the recorded questions: same answers, up to rounding.
    3. With `run_snippet`, the code of the card prints what it printed then.

    Where nothing was recorded, because the model was saved by other means, files and answers are not checked. Instead every safetensors
    file must be whole, an adapter must pass `check_adapter`, with its base model if that is at hand, and the code, if asked for, must run.

    Args:
        folder_or_repo: a folder, or a Hub id.
        base_model: of an adapter: an id, a folder or a loaded model; what the card names if absent.
        run_snippet: runs code from the card in a process of its own, told to work offline and refused connections from itself, but with the
            rights of its user: only for cards that you trust.

    Raises:
        ValueError: the manifest is damaged, there is neither a manifest nor a model in safetensors files, or what is given is neither a folder nor a Hub id.
    """
    folder, repo_id = _located(folder_or_repo, revision, token)
    manifest = read_manifest(folder) if (folder / FILE).is_file() else None
    if manifest is not None:
        checks = [_files(folder, manifest), _answers(folder, manifest, base_model)]
    else:
        checks = [_weights(folder), *_unrecorded("files", "answers")]
        if (folder / CONFIG).is_file():
            checks.insert(1, _adapter(folder, base_model))
    checks.append(
        _code(folder, manifest, repo_id, base_model) if run_snippet else Check("code", None, "not asked for")
    )
    return Verification(tuple(checks))


def _located(
    folder_or_repo: str | os.PathLike[str], revision: str | None, token: str | bool | None
) -> tuple[Path, str | None]:
    folder = Path(folder_or_repo)
    if folder.is_dir():
        return folder, None
    repo_id = str(folder_or_repo)
    if not REPO_ID.fullmatch(repo_id):
        raise ValueError(f"folder_or_repo={repo_id!r} is neither a folder nor a Hub id of the form 'namespace/name'.")
    return Path(snapshot_download(repo_id, revision=revision, token=token)), repo_id


def _unrecorded(*names: str) -> list[Check]:
    return [Check(name, None, f"there is no {FILE}, so nothing was recorded to compare them with") for name in names]


def _weights(folder: Path) -> Check:
    """Whether every file of tensors is whole."""
    names = [name for name in files_of(folder) if name.endswith(".safetensors")]
    if not names or not any((folder / name).is_file() for name in (*LIBRARY_FILES, "config.json")):
        raise ValueError(
            f"folder_or_repo={str(folder)!r} has no {FILE}, and no model in safetensors files either; give the folder that a model was saved to."
        )
    try:
        for name in names:
            headers(folder, name)
    except ValueError as error:
        return Check("weights", False, str(error))
    return Check("weights", True, f"{len(names)} safetensors files open, and are as long as their headers say")


def _adapter(folder: Path, base_model: str | nn.Module | None) -> Check:
    try:
        check_adapter(folder)
        try:
            base = base_model if isinstance(base_model, nn.Module) else outline(folder, base_model)
        except Exception as error:  # whatever the libraries say of a model that is not there, or not theirs
            return Check("adapter", True, f"sound by itself; not compared with its base model: {_short(error)}")
        check_adapter(folder, base)
    except ValueError as error:
        return Check("adapter", False, str(error))
    return Check("adapter", True, "fits its base model")


def _files(folder: Path, manifest: dict[str, Any]) -> Check:
    recorded: dict[str, str] = manifest["files"]
    missing = sorted(name for name in recorded if not _inside(folder, name))
    changed = sorted(
        name for name, digest in recorded.items() if name not in missing and file_digest(folder / name) != digest
    )
    added = [name for name in files_of(folder) if name not in recorded and not name.startswith(".git/")]
    runs = [name for name in added if Path(name).suffix.lower() in (".py", *PICKLES)]
    told = {"missing": missing, "changed": changed, "added, which can run code,": runs}
    holds = not any(told.values())
    told["added"] = [name for name in added if name not in runs]
    words = [f"{what} {', '.join(names)}" for what, names in told.items() if names]
    if holds:
        words[:0] = [f"{len(recorded)} files as recorded in {FILE}"]
    return Check("files", holds, "; ".join(words))


def _inside(folder: Path, name: str) -> bool:
    """A file of the folder, not one that a manifest points to elsewhere; a download keeps its files behind links."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and (folder / name).is_file()


def _answers(folder: Path, manifest: dict[str, Any], base_model: str | nn.Module | None) -> Check:
    if manifest["probe"] is None:
        return Check("answers", None, "none were recorded")
    recorded = Probe.from_dict(manifest["probe"])
    try:
        model = load(folder, manifest["model"], getattr(torch, recorded.dtype), base_model)
    except Exception as error:  # whatever the libraries make of files that are not what they were
        return Check("answers", False, f"the model cannot be loaded: {_short(error)}")
    try:
        answered = repeat(model, recorded)
    except Exception as error:  # as above
        return Check("answers", False, f"the model cannot be asked: {_short(error)}")
    if answered is None:
        return Check("answers", False, "the model gives no logits")
    different = recorded.differences(answered)
    quantization = manifest["model"].get("quantization")
    if different and quantization and "quantization_config" not in cast(Any, model).config.to_dict():
        found = f"recorded on weights quantised with {quantization}, which those of base_model are not: {'; '.join(different)}"
        return Check("answers", None, found)
    same = "bit by bit" if answered.digest == recorded.digest else f"{recorded.metric} {answered.value:.6g}"
    return Check("answers", not different, "; ".join(different) or f"{len(recorded.predictions)} as recorded, {same}")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _code(
    folder: Path, manifest: dict[str, Any] | None, repo_id: str | None, base_model: str | nn.Module | None
) -> Check:
    if not (folder / "README.md").is_file():
        return Check("code", False, "README.md is missing")
    card = load_card(folder / "README.md")
    names = {repo_id: "."} if repo_id else {}
    if isinstance(base_model, str):
        # An id stays one: the code finds it in the local cache.
        place = str(Path(base_model).absolute()) if Path(base_model).is_dir() else base_model
        names[str(card.data.get("base_model") or "base")] = place
    try:
        code = code_of(our_part(card.text))
        if code is None or (manifest and manifest["snippet"] is None):
            return Check("code", None, "it was not run before publishing" if code else "the card has none in Python")
        run = running.run_snippet(code, folder, names)
    except ValueError as error:
        return Check("code", False, str(error))
    if manifest is None:
        return Check("code", True, "runs; what it printed before was not recorded")
    same = run.digest == manifest["snippet"]["output_sha256"]
    return Check("code", same, "prints what it printed" if same else f"prints something else: {run.output[:200]}")
