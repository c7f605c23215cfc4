"""Repositories of the loopback Hub: commits, refs and content, in memory and optionally mirrored to a folder."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


class HubError(Exception):
    """An answer other than success; `code` becomes the `X-Error-Code` header that the clients dispatch on."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: str):
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


@dataclass(frozen=True)
class Blob:
    """One version of one file."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def comparison_oid(self) -> str:
        """The id by which a client recognises an unchanged file."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: every commit ever made and the refs that point at them."""

    id: str
    type: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def entry(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.resolve(revision)
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.sha})
        return commit, commit.files[path]

    def history(self, revision: str = "main") -> list[Commit]:
        """Commits reachable from `revision`, newest first."""
        found, sha = [], self.resolve(revision).sha
        while sha is not None:
            found.append(self.commits[sha])
            sha = self.commits[sha].parent
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.resolve(revision).files.items()}

    def commit(self, ref: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        parent = self.refs.get(ref)
        identity = json.dumps([self.id, parent, title, len(self.commits), {p: b.git_oid for p, b in files.items()}])
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        made = Commit(hashlib.sha1(identity.encode()).hexdigest(), parent, title, message, date, files)
        self.commits[made.sha] = made
        self.refs[ref] = made.sha
        return made


class Store:
    """All repositories. With `root`, every change is mirrored there and read again at the next start."""

    def __init__(self, root: str | Path | None = None):
        self.lock = threading.RLock()
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.root = None if root is None else Path(root)
        if self.root is not None and (self.root / "repos.json").exists():
            self._load(self.root)

    def create(self, kind: str, repo_id: str, private: bool) -> Repo:
        if (kind, repo_id) in self.repos:
            raise HubError(409, "You already created this model repo")
        repo = Repo(repo_id, kind, private)
        repo.commit("refs/heads/main", {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit")
        self.repos[kind, repo_id] = repo
        return repo

    def get(self, kind: str, repo_id: str) -> Repo:
        if (kind, repo_id) not in self.repos:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return self.repos[kind, repo_id]

    def save(self) -> None:
        if self.root is None:
            return
        blobs = self.root / "blobs"
        blobs.mkdir(parents=True, exist_ok=True)
        for data in (b.data for repo in self.repos.values() for c in repo.commits.values() for b in c.files.values()):
            target = blobs / hashlib.sha256(data).hexdigest()
            if not target.exists():
                target.write_bytes(data)
        described = [
            {
                "id": repo.id,
                "type": repo.type,
                "private": repo.private,
                "refs": repo.refs,
                "commits": [
                    {**vars(c), "files": {path: [b.sha256, b.lfs] for path, b in c.files.items()}}
                    for c in repo.commits.values()
                ],
            }
            for repo in self.repos.values()
        ]
        draft = self.root / "repos.json.tmp"
        draft.write_text(json.dumps(described, indent=1))
        os.replace(draft, self.root / "repos.json")

    def _load(self, root: Path) -> None:
        for entry in json.loads((root / "repos.json").read_text()):
            repo = Repo(entry["id"], entry["type"], entry["private"], refs=entry["refs"])
            for commit in entry["commits"]:
                files = {
                    path: Blob((root / "blobs" / sha).read_bytes(), lfs)
                    for path, (sha, lfs) in commit["files"].items()
                }
                repo.commits[commit["sha"]] = Commit(**{**commit, "files": files})
                self.lfs.update({blob.sha256: blob.data for blob in files.values() if blob.lfs})
            self.repos[repo.type, repo.id] = repo
