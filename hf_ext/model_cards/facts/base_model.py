"""Which base model a checkpoint was made from, told without giving away where it lies on this machine."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from hf_ext.model_cards.rules.yaml_text import load

REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SNAPSHOT = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})")
# Bytes of weights that are read to tell a local checkpoint from others, so that a card is written within a second.
_HASHED = 2**28
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class BaseModel:
    """Identity of a base model.

    Attributes:
        id: Hub id, if there is one.
        commit: commit hash of the files that were loaded, if known.
        digest: sha256 over the safetensors files of a local checkpoint; not of one above 256 MiB.
        license: the licence keys of its model card, if that lies in the local cache or folder.
        vocab_size: from its saved config, if that lies in the local cache or folder.
        folder: where its files lie on this machine, if they do; never told to anybody.
    """

    id: str | None = None
    commit: str | None = None
    digest: str | None = None
    license: dict[str, str] = field(default_factory=dict)
    vocab_size: int | None = None
    folder: Path | None = None

    @property
    def has_tokenizer(self) -> bool:
        return self.folder is not None and (self.folder / "tokenizer_config.json").is_file()


def identify(name: str | None, revision: str | None = None, explicit: str | None = None) -> BaseModel:
    """Identify the base model.

    Args:
        name: what the model was loaded from: a Hub id, a folder, or nothing.
        revision: the revision asked for when it was loaded from the Hub.
        explicit: the id the user gives, which wins over what is found.

    Raises:
        ValueError: `explicit` is not a Hub id.
    """
    if explicit is not None and not REPO_ID.fullmatch(explicit):
        raise ValueError(f"base_model={explicit!r} is not a Hub id; give it as 'namespace/name'.")
    folder = Path(name) if name else None
    if folder is None or not folder.is_dir():
        named = name if name and _is_hub_id(name) else None
        repo_id = explicit or named
        commit = _loaded_commit(repo_id, revision) if repo_id is not None and repo_id == named else None
        found = _cached_folder(repo_id, commit) if repo_id else None
        return BaseModel(repo_id, commit, None, _license(found), _vocab_size(found), found)
    snapshot = _SNAPSHOT.search(str(folder.absolute()))
    repo_id, commit = (f"{snapshot[1]}/{snapshot[2]}", snapshot[3]) if snapshot else (_named_in_config(folder), None)
    if explicit is not None and explicit != repo_id:
        repo_id, commit = explicit, None
    digest = None if commit or _size(folder) > _HASHED else _digest(folder)
    return BaseModel(repo_id, commit, digest, _license(folder), _vocab_size(folder), folder)


def _is_hub_id(name: str) -> bool:
    # Ids without a namespace exist ("gpt2"), and so do relative folders of the same form: only the cache can tell.
    return bool(REPO_ID.fullmatch(name)) or isinstance(_in_cache(name, None), Path)


def _in_cache(repo_id: str, revision: str | None) -> Path | None:
    if repo_id.count("/") > 1 or not re.fullmatch(r"[\w./-]+", repo_id) or not repo_id[0].isalnum():
        return None
    found = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    return Path(found) if isinstance(found, str) else None


def _loaded_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit that was loaded; `None` where several lie in the cache and nothing tells which it was."""
    found = _in_cache(repo_id, revision)
    if found is None or (revision is None and len(list(found.parent.parent.iterdir())) > 1):
        return None
    return found.parent.name


def _cached_folder(repo_id: str, commit: str | None) -> Path | None:
    found = _in_cache(repo_id, commit)
    return found.parent if found else None


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def config_of(folder: Path | None) -> dict[str, Any]:
    """What `config.json` of a base model says; nothing where it is absent or damaged, since a card can do without it."""
    if folder is None:
        return {}
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _vocab_size(folder: Path | None) -> int | None:
    size = config_of(folder).get("vocab_size")
    return size if isinstance(size, int) else None


def _named_in_config(folder: Path) -> str | None:
    name = config_of(folder).get("_name_or_path")
    return name if isinstance(name, str) and REPO_ID.fullmatch(name) and not Path(name).exists() else None


def _license(folder: Path | None) -> dict[str, str]:
    """What the base model's card says of its licence; nothing where it cannot be read."""
    if folder is None:
        return {}
    try:
        block = REGEX_YAML_BLOCK.search((folder / "README.md").read_text(encoding="utf-8-sig"))
        data = load(block[2]) if block else None
    except (OSError, ValueError):
        return {}
    stated = data if isinstance(data, dict) else {}
    return {key: stated[key] for key in LICENSE_KEYS if isinstance(stated.get(key), str)}


def _digest(folder: Path) -> str | None:
    """One file: its sha256, as `sha256sum` prints it. Several: sha256 over their names and digests."""
    digests = {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))}
    if len(digests) <= 1:
        return next(iter(digests.values()), None)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """sha256, as `sha256sum` prints it. A file is read once in a process unless it changes: a trainer asks at every save."""
    status = file.stat()
    return _digest_of(file, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=256)
def _digest_of(file: Path, mtime: int, size: int) -> str:
    running = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            running.update(block)
    return running.hexdigest()
