"""huggingface_hub against the loopback Hub. Run by `test_hub.py` in a child process, see `tests.hub.fixtures`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from huggingface_hub import (
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.fixtures import put_card

try:
    import httpx2 as httpx
except ImportError:  # huggingface_hub 1
    import httpx

CARD = "---\nlicense: mit\ntags:\n- a\n---\n# Title\n"


@pytest.fixture
def api():
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """One regular file, one nested file and one LFS file."""
    source = tmp_path / "source"
    (source / "nested").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "nested" / "notes.txt").write_text("notes")
    (source / "weights.safetensors").write_bytes(os.urandom(100_000))
    return source


@pytest.fixture
def repo(api, request):
    repo_id = f"user/{request.node.originalname}"
    api.create_repo(repo_id, exist_ok=True)
    return repo_id


def test_environment_and_identity(api, hub):
    assert api.endpoint == hub.endpoint
    assert api.whoami()["name"] == "user"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        HfApi(token="hf_wrong").whoami()


def test_create_twice_and_delete(api):
    url = api.create_repo("user/twice", private=True)
    assert (url.repo_id, url.repo_type) == ("user/twice", "model")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("user/twice")
    assert api.create_repo("user/twice", exist_ok=True).repo_id == "user/twice"
    assert api.create_repo("unqualified").repo_id == "user/unqualified"
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("user/twice")
    api.delete_repo("user/twice")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/twice")


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_other_kinds(api, hub, kind, tmp_path):
    api.create_repo(f"user/a-{kind}", repo_type=kind, space_sdk="static" if kind == "space" else None)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.bin", repo_id=f"user/a-{kind}", repo_type=kind)
    path = hf_hub_download(f"user/a-{kind}", "x.bin", repo_type=kind, local_dir=tmp_path)
    assert Path(path).read_bytes() == b"x"
    assert (
        api.repo_info(f"user/a-{kind}", repo_type=kind).sha
        == hub.repos[f"{kind}s", f"user/a-{kind}"].resolve("main").sha
    )


def test_upload_folder_is_one_commit_and_a_second_upload_none(api, hub, repo, folder):
    first = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="all")
    stored = hub.repos["models", repo]
    assert stored.files()["weights.safetensors"] == (folder / "weights.safetensors").read_bytes()
    assert stored.resolve("main").files["weights.safetensors"].lfs
    assert not stored.resolve("main").files["config.json"].lfs
    assert [c.title for c in stored.history()] == ["all", "initial commit"]
    assert first.oid == stored.resolve("main").sha
    again = api.upload_folder(repo_id=repo, folder_path=folder)
    assert again.oid == first.oid
    assert len(stored.commits) == 2


def test_download(api, hub, repo, folder, tmp_path):
    api.upload_folder(repo_id=repo, folder_path=folder)
    path = hf_hub_download(repo, "weights.safetensors")
    assert Path(path).read_bytes() == (folder / "weights.safetensors").read_bytes()
    snapshot = snapshot_download(repo)
    assert (tmp_path / snapshot / "nested" / "notes.txt").read_text() == "notes"
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "absent.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(repo, "config.json", revision="absent")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/absent", "config.json")


def test_range_request(hub, api, repo):
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="digits.bin", repo_id=repo)
    url = f"{hub.endpoint}/{repo}/resolve/main/digits.bin"
    part = httpx.get(url, headers={"Range": "bytes=4-6"})
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (206, b"456", "bytes 4-6/10")
    assert httpx.get(url, headers={"Range": "bytes=8-"}).content == b"89"
    assert httpx.get(url, headers={"Range": "bytes=10-"}).status_code == 416


def test_tree_and_paths_info(api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    assert {item.path for item in api.list_repo_tree(repo)} == {
        ".gitattributes",
        "config.json",
        "nested",
        "weights.safetensors",
    }
    assert "nested/notes.txt" in {item.path for item in api.list_repo_tree(repo, recursive=True)}
    assert [item.path for item in api.list_repo_tree(repo, "nested")] == ["nested/notes.txt"]
    assert api.list_repo_files(repo) == [".gitattributes", "config.json", "nested/notes.txt", "weights.safetensors"]
    file, directory = api.get_paths_info(repo, ["weights.safetensors", "nested", "absent"])
    assert file.lfs.size == 100_000 and directory.path == "nested"
    siblings = {s.rfilename: s for s in api.model_info(repo, files_metadata=True).siblings}
    assert siblings["weights.safetensors"].lfs.sha256 == file.lfs.sha256


def test_branches_tags_and_pull_requests(api, hub, repo):
    api.create_branch(repo, branch="dev")
    api.create_branch(repo, branch="dev", exist_ok=True)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo, revision="dev")
    api.create_tag(repo, tag="v1", revision="dev")
    assert api.file_exists(repo, "a.txt", revision="v1") and not api.file_exists(repo, "a.txt")
    proposal = api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo, create_pr=True)
    assert (proposal.pr_num, proposal.pr_revision) == (1, "refs/pr/1")
    assert Path(hf_hub_download(repo, "a.txt", revision="refs/pr/1")).read_bytes() == b"2"
    api.upload_file(path_or_fileobj=b"3", path_in_repo="a.txt", repo_id=repo, revision="refs/pr/1")
    assert hub.repos["models", repo].files("refs/pr/1")["a.txt"] == b"3"
    refs = api.list_repo_refs(repo, include_pull_requests=True)
    assert [b.name for b in refs.branches] == ["main", "dev"]
    assert [t.name for t in refs.tags] == ["v1"] and [p.ref for p in refs.pull_requests] == ["refs/pr/1"]
    api.delete_branch(repo, branch="dev")
    api.delete_tag(repo, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="dev")


def test_deletions_and_history(api, repo, folder):
    api.upload_folder(repo_id=repo, folder_path=folder)
    api.delete_file("config.json", repo)
    api.delete_folder("nested", repo)
    assert api.list_repo_files(repo) == [".gitattributes", "weights.safetensors"]
    assert len(api.list_repo_commits(repo)) == 4
    with pytest.raises(EntryNotFoundError):
        api.delete_file("config.json", repo)


def test_card_and_metadata(api, repo):
    data = ModelCardData(
        license="mit",
        model_name="m",
        eval_results=[EvalResult("text-generation", "user/d", "D", "accuracy", 0.5)],
    )
    put_card(ModelCard(f"---\n{data.to_yaml()}\n---\n# Title\n"), repo)
    card = ModelCard.load(repo)
    card.data.tags = ["later"]
    put_card(card, repo)
    info = api.model_info(repo)
    assert info.card_data.license == "mit" and info.tags == ["later"]
    assert info.card_data.eval_results[0].metric_value == 0.5
    assert ModelCard.load(repo).text.strip() == "# Title"


@pytest.mark.parametrize(
    "block",
    ["base_model: /home/someone/model", "tags: [1]", "license: other", "- a list", "a: b: c"],
)
def test_invalid_metadata_is_rejected(api, repo, block):
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(path_or_fileobj=f"---\n{block}\n---\n".encode(), path_in_repo="README.md", repo_id=repo)


def test_writing_needs_a_token_with_the_right(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi(token=False).create_repo("user/no-token")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(token="hf_readonly").create_repo("user/read-token")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("someone-else/model")
    assert not {("models", "user/no-token"), ("models", "user/read-token")} & set(hub.repos)


def test_commit_on_an_outdated_parent_is_refused(api, hub, repo):
    outdated = api.model_info(repo).sha
    api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=repo)
    with pytest.raises(HfHubHTTPError, match="412"):
        api.upload_file(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=repo, parent_commit=outdated)
    assert hub.repos["models", repo].files()["a.txt"] == b"1"


def put(api, repo, content=b"new"):
    return api.upload_file(path_or_fileobj=content, path_in_repo="a.bin", repo_id=repo)


def test_fault_statuses(api, hub, repo):
    for status in (500, 401, 412):
        hub.faults.add("POST .*/commit/", status=status)
        with pytest.raises(HfHubHTTPError, match=str(status)):
            put(api, repo)
    assert put(api, repo).oid == hub.repos["models", repo].resolve("main").sha


def test_fault_hits_the_nth_request_only(api, hub, repo):
    hub.faults.add("POST .*/commit/", status=500, nth=2)
    put(api, repo, b"1")
    with pytest.raises(HfHubHTTPError, match="500"):
        put(api, repo, b"2")
    put(api, repo, b"3")


def test_client_waits_and_retries_after_429(api, hub, repo):
    hub.faults.add("POST .*/preupload/", status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    put(api, repo)
    assert time.monotonic() - start >= 1
    assert sum("/preupload/" in request for request in hub.requests) == 2


def test_dropped_request_changes_nothing(api, hub, repo):
    before = hub.repos["models", repo].resolve("main").sha
    hub.faults.add("POST .*/commit/", drop="request")
    with pytest.raises(httpx.TransportError):
        put(api, repo)
    assert hub.repos["models", repo].resolve("main").sha == before


def test_dropped_response_has_taken_effect(api, hub, repo):
    hub.faults.add("POST .*/commit/", drop="response")
    with pytest.raises(httpx.TransportError):
        put(api, repo)
    assert hub.repos["models", repo].files()["a.bin"] == b"new"


def test_interrupted_download_is_resumed(api, hub, repo):
    content = os.urandom(300_000)
    put(api, repo, content)
    hub.faults.add("GET /user/.*/resolve/main/a.bin", drop="response")
    assert Path(hf_hub_download(repo, "a.bin")).read_bytes() == content
    assert sum(r.startswith("GET") and r.endswith("/a.bin") for r in hub.requests) == 2


def test_delay(api, hub, repo):
    hub.faults.add("GET /api/models/", delay=0.5)
    start = time.monotonic()
    api.model_info(repo)
    assert time.monotonic() - start >= 0.5
