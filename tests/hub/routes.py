"""The requests that huggingface_hub makes, answered from a `Store`."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.hub import card_rules
from tests.hub.store import Blob, Commit, HubError, Repo, Store

KIND = r"(?P<kind>models|datasets|spaces|kernels)"
ID = r"(?P<id>[^/]+/[^/]+)"
PREFIX = r"(?P<prefix>(?:datasets|spaces|kernels)/)?"
REV = r"(?P<rev>[^/]+)"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".parquet", ".arrow", ".gz", ".zip")
REGULAR_LIMIT = 10 * 2**20


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    endpoint: str
    user: str | None
    groups: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


ROUTES: list[tuple[str, re.Pattern[str], Callable[[Store, Request], Answer], bool]] = []


def route(method: str, pattern: str, *, write: bool = False):
    """Register a handler; `write` routes need a token that may write to the repository's namespace."""

    def register(handler):
        ROUTES.append((method, re.compile(f"^{pattern}$"), handler, write))
        return handler

    return register


def find(method: str, path: str):
    """Handler, groups and write flag for a request, or `None`."""
    for wanted, pattern, handler, write in ROUTES:
        found = pattern.match(path) if wanted == method else None
        if found:
            return handler, {k: unquote(v or "") for k, v in found.groupdict().items()}, write
    return None


def repo_of(store: Store, request: Request) -> Repo:
    groups = request.groups
    kind = groups["kind"] if "kind" in groups else (groups.get("prefix", "").rstrip("/") or "models")
    repo = store.get(kind, groups["id"])
    if repo.private and request.user is None:
        raise HubError(401, "Repository not found", "RepoNotFound")
    return repo


def listing(path: str, blob: Blob) -> dict:
    item = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
    if blob.lfs:
        item["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return item


@route("GET", "/api/whoami-v2")
def whoami(store: Store, request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": "write"}
    return as_json({"type": "user", "name": request.user, "orgs": [], "auth": {"accessToken": token}})


@route("POST", "/api/repos/create", write=True)
def create(store: Store, request: Request) -> Answer:
    payload = request.json()
    kind = payload.get("type", "model") + "s"
    repo_id = f"{payload.get('organization') or request.user}/{payload['name']}"
    url = f"{request.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
    private = payload.get("visibility") == "private" or bool(payload.get("private"))
    try:
        store.create(kind, repo_id, private)
    except HubError as error:
        return as_json({"error": error.message, "url": url}, error.status)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete", write=True)
def delete(store: Store, request: Request) -> Answer:
    payload = request.json()
    kind, repo_id = (
        payload.get("type", "model") + "s",
        f"{payload.get('organization') or request.user}/{payload['name']}",
    )
    store.get(kind, repo_id)
    del store.repos[kind, repo_id]
    return as_json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(store: Store, request: Request) -> Answer:
    errors, warnings = card_rules.problems(request.json()["content"])
    found = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return as_json(found, 400 if errors else 200)


@route("POST", f"/api/{KIND}/{ID}/preupload/{REV}", write=True)
def preupload(store: Store, request: Request) -> Answer:
    repo = repo_of(store, request)
    existing = repo.resolve(request.groups["rev"]).files
    answers = []
    for file in request.json()["files"]:
        path = file["path"]
        lfs = path.endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if path in existing:
            answer["oid"] = existing[path].comparison_oid
        answers.append(answer)
    return as_json({"files": answers})


@route("POST", f"/{PREFIX}{ID}\\.git/info/lfs/objects/batch", write=True)
def lfs_batch(store: Store, request: Request) -> Answer:
    repo = repo_of(store, request)
    objects = []
    for wanted in request.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in store.lfs:
            address = f"{request.endpoint}/_lfs/{repo.type}/{repo.id}/{wanted['oid']}"
            answer["actions"] = {"upload": {"href": address}, "verify": {"href": address + "/verify"}}
        objects.append(answer)
    return as_json({"transfer": "basic", "objects": objects})


@route("PUT", f"/_lfs/{KIND}/{ID}/(?P<oid>[0-9a-f]{{64}})")
def lfs_put(store: Store, request: Request) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != request.groups["oid"]:
        raise HubError(400, "the uploaded content does not have the announced sha256")
    store.lfs[request.groups["oid"]] = request.body
    return Answer()


@route("POST", f"/_lfs/{KIND}/{ID}/(?P<oid>[0-9a-f]{{64}})/verify", write=True)
def lfs_verify(store: Store, request: Request) -> Answer:
    stored = store.lfs.get(request.groups["oid"])
    if stored is None or len(stored) != request.json()["size"]:
        raise HubError(404, "object not found or of another size")
    return as_json({})


@route("POST", f"/api/{KIND}/{ID}/commit/{REV}", write=True)
def commit(store: Store, request: Request) -> Answer:
    repo = repo_of(store, request)
    revision = request.groups["rev"]
    head = repo.resolve(revision)
    files, title, message = dict(head.files), "", ""
    for line in request.body.splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            title, message = value["summary"], value.get("description", "")
            if value.get("parentCommit") not in (None, head.sha):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
        else:
            apply(store, files, key, value)
    if request.flag("create_pr"):
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        ref = f"refs/pr/{number}"
        repo.refs[ref] = head.sha
    else:
        number, ref = 0, revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in repo.refs:
            raise HubError(400, f"{revision} is not a branch: commits go to branches only")
    made = repo.commit(ref, files, title, message)
    base = f"{request.endpoint}/{'' if repo.type == 'models' else repo.type + '/'}{repo.id}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{base}/commit/{made.sha}"}
    if number:
        answer["pullRequestUrl"] = f"{base}/discussions/{number}"
    return as_json(answer)


def apply(store: Store, files: dict[str, Blob], key: str, value: dict) -> None:
    """One line of a commit, applied to `files`."""
    path = value["path"]
    if ".." in path.split("/") or path.startswith("/"):
        raise HubError(400, f"invalid path {path!r}")
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in store.lfs:
            raise HubError(400, f"the LFS object of {path} was never uploaded")
        files[path] = Blob(store.lfs[value["oid"]], lfs=True)
    elif key == "deletedFile":
        if path not in files:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise HubError(400, f"unknown operation {key!r}")


@route("HEAD", f"/{PREFIX}{ID}/resolve/{REV}/(?P<path>.+)")
@route("GET", f"/{PREFIX}{ID}/resolve/{REV}/(?P<path>.+)")
def resolve(store: Store, request: Request) -> Answer:
    found, blob = repo_of(store, request).entry(request.groups["rev"], request.groups["path"])
    etag = f'"{blob.comparison_oid}"'
    headers = {"X-Repo-Commit": found.sha, "ETag": etag, "Accept-Ranges": "bytes"}
    if blob.lfs:
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(blob.data))}
    wanted = re.match(r"bytes=(\d+)-(\d*)$", request.headers.get("Range", ""))
    if wanted is None:
        return Answer(blob.data, 200, headers)
    start, stop = int(wanted[1]), int(wanted[2] or len(blob.data) - 1) + 1
    if start >= len(blob.data):
        return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(blob.data)}"})
    part = blob.data[start:stop]
    span = f"bytes {start}-{start + len(part) - 1}/{len(blob.data)}"
    return Answer(part, 206, {**headers, "Content-Range": span})


@route("GET", f"/api/{KIND}/{ID}(?:/revision/{REV})?")
def info(store: Store, request: Request) -> Answer:
    repo = repo_of(store, request)
    at = repo.resolve(request.groups["rev"] or "main")
    siblings = []
    for path, blob in sorted(at.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if request.flag("blobs"):
            sibling |= {"size": len(blob.data), "blobId": blob.git_oid}
            if blob.lfs:
                sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        siblings.append(sibling)
    card = card_data(at)
    described = {
        "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.split("/")[0],
        "sha": at.sha,
        "lastModified": at.date,
        "createdAt": repo.history()[-1].date,
        "private": repo.private,
        "disabled": False,
        "gated": False,
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
        "tags": list(card.get("tags") or []),
        "cardData": card,
    }
    for key in ("library_name", "pipeline_tag", "model-index"):
        if key in card:
            described[key] = card[key]
    return as_json(described)


def card_data(commit: Commit) -> dict:
    if "README.md" not in commit.files:
        return {}
    try:
        data = card_rules.metadata(commit.files["README.md"].data.decode())
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


@route("GET", f"/api/{KIND}/{ID}/tree/{REV}(?:/(?P<path>.+))?")
def tree(store: Store, request: Request) -> Answer:
    at = repo_of(store, request).resolve(request.groups["rev"])
    base = request.groups["path"].rstrip("/")
    prefix = f"{base}/" if base else ""
    items: dict[str, dict] = {}
    for path, blob in sorted(at.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if request.flag("recursive") else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            items.setdefault(folder, directory(folder))
        if request.flag("recursive") or len(parts) == 1:
            items[path] = listing(path, blob)
    if base and not items:
        raise HubError(404, f"{base} does not exist on {request.groups['rev']}", "EntryNotFound")
    return as_json(list(items.values()))


def directory(path: str) -> dict:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


@route("POST", f"/api/{KIND}/{ID}/paths-info/{REV}")
def paths_info(store: Store, request: Request) -> Answer:
    files = repo_of(store, request).resolve(request.groups["rev"]).files
    found = []
    for path in parse_qs(request.body.decode()).get("paths", []):
        if path in files:
            found.append(listing(path, files[path]))
        elif any(name.startswith(path.rstrip("/") + "/") for name in files):
            found.append(directory(path))
    return as_json(found)


@route("GET", f"/api/{KIND}/{ID}/refs")
def refs(store: Store, request: Request) -> Answer:
    found: dict[str, list] = {"heads": [], "tags": [], "pr": [], "convert": []}
    for ref, sha in repo_of(store, request).refs.items():
        _, group, name = ref.split("/", 2)
        found[group].append({"name": name, "ref": ref, "targetCommit": sha})
    renamed = {"branches": found["heads"], "tags": found["tags"], "converts": found["convert"]}
    return as_json({**renamed, "pullRequests": found["pr"]})


@route("GET", f"/api/{KIND}/{ID}/commits/{REV}")
def commits(store: Store, request: Request) -> Answer:
    return as_json(
        [
            {"id": c.sha, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": "user"}]}
            for c in repo_of(store, request).history(request.groups["rev"])
        ]
    )


@route("POST", f"/api/{KIND}/{ID}/branch/(?P<name>[^/]+)", write=True)
def create_branch(store: Store, request: Request) -> Answer:
    return create_ref(repo_of(store, request), f"refs/heads/{request.groups['name']}", request.json())


@route("POST", f"/api/{KIND}/{ID}/tag/{REV}", write=True)
def create_tag(store: Store, request: Request) -> Answer:
    payload = {"startingPoint": request.groups["rev"], **request.json()}
    return create_ref(repo_of(store, request), f"refs/tags/{payload['tag']}", payload)


def create_ref(repo: Repo, ref: str, payload: dict) -> Answer:
    if ref in repo.refs:
        raise HubError(409, f"{ref} exists already")
    repo.refs[ref] = repo.resolve(payload.get("startingPoint", "main")).sha
    return as_json({})


@route("DELETE", f"/api/{KIND}/{ID}/branch/(?P<name>[^/]+)", write=True)
@route("DELETE", f"/api/{KIND}/{ID}/tag/(?P<name>[^/]+)", write=True)
def delete_ref(store: Store, request: Request) -> Answer:
    repo = repo_of(store, request)
    group = "tags" if "/tag/" in request.path else "heads"
    ref = f"refs/{group}/{request.groups['name']}"
    if ref not in repo.refs:
        raise HubError(404, f"{ref} does not exist", "RevisionNotFound")
    del repo.refs[ref]
    return as_json({})
