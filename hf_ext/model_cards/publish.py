"""Publish a model with its card in one commit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from hf_ext._compat import is_request_error
from hf_ext.model_cards.facts.records import Artefact
from hf_ext.model_cards.manifest import FILE as MANIFEST
from hf_ext.model_cards.manifest import read_manifest
from hf_ext.model_cards.markers import load_card
from hf_ext.model_cards.merging import merge
from hf_ext.model_cards.package import finished_card, is_first_process, refuse_errors, tell_warnings, write_package

_ADAPTER = frozenset({"adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"})
_REMEDIES = {
    401: "the token is missing, wrong or expired; run `hf auth login` or set HF_TOKEN",
    403: "the token may not write there; use a write token, and a namespace that it belongs to",
    404: "the repository or revision does not exist, or the token may not see it; check repo_id and revision",
    412: "someone else committed in the meantime; publish again to build on their commit",
    429: "too many requests; wait and publish again",
}


class PublishError(RuntimeError):
    """Publishing failed; the message says what happened, in which state the repository is, and what to do."""


def publish(
    model_or_trainer: Artefact,
    repo_id: str,
    card: ModelCard | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    merged: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
    run_snippet: bool = True,
    probe: bool | Sequence[str] = True,
    benchmarks: Mapping[str, str] | None = None,
    **card_arguments: Any,
) -> CommitInfo | None:
    """Save the model, write its card, and upload both in one commit. Publishing the same thing again commits nothing.

    An existing README.md keeps what people wrote: text outside our markers stays, and metadata is merged key by key.
    Only safetensors, JSON and text are uploaded; never optimizer state, `training_args.bin` or another pickle.

    Args:
        model_or_trainer: as for `build_card`. Of several adapters the active one is published.
        repo_id: `namespace/name`; created if it does not exist.
        card: from `build_card`; built here from `card_arguments` if absent.
        revision: branch to commit to, created if it does not exist.
        private: visibility of a repository that is created here.
        create_pr: open a pull request instead of committing.
        merged: publish plain weights with the adapter merged into them, see `save`.
        run_snippet: run the code of the card against what is about to be uploaded, in a process of its own that is told to work offline, and
            publish only if it runs. The base model is taken from the local cache or from the folder it was loaded from.
        probe, benchmarks: as for `save`.
        card_arguments: arguments of `build_card`, such as `base_model=`, `license=`, `metrics=`, `datasets=`.

    Returns:
        The commit, or the latest one if nothing had changed. `None` in every process of a distributed run but the first, which alone publishes.

    Raises:
        ValueError: an argument is wrong, the card breaks a rule or its code fails (`SnippetError`); nothing was sent.
        PublishError: the Hub refused or could not be reached. Model files and card arrive together or not at all.
    """
    if not is_first_process():
        return None
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r}: {error} Give it as 'namespace/name'.") from None
    if create_pr and revision is not None:
        raise ValueError(
            f"revision={revision!r}: a pull request is always opened against the main branch; leave it out."
        )
    api = HfApi(token=token)
    if token is None and get_token() is None:
        raise PublishError(
            f"{repo_id} was not published to {api.endpoint}: there is no access token. Run `hf auth login`, set "
            "HF_TOKEN or pass token=."
        )
    card = finished_card(model_or_trainer, card, merged, {**card_arguments, "repo_id": repo_id})
    refuse_errors(card)
    with tempfile.TemporaryDirectory(prefix="hf_ext_publish_") as scratch:
        folder = Path(scratch)
        card = write_package(
            model_or_trainer,
            folder,
            card,
            merged=merged,
            repo_id=repo_id,
            run_code=run_snippet,
            probe=probe,
            benchmarks=benchmarks,
        )
        with _explained(api, repo_id, "preparing the repository", None):
            head = _prepare_repo(api, repo_id, None if create_pr else revision, private)
            before = _remote_manifest(api, repo_id, head)
            united = _united_with_remote(api, repo_id, head, card, before)
        refuse_errors(united)
        tell_warnings(united, repo_id)
        united.save(folder / "README.md")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = {path.relative_to(folder).as_posix() for path in files}
        leftovers = _leftovers(api, repo_id, head, before, names)
        # `upload_folder` may split a push into several commits; this is one, and only on top of the card united above.
        with _explained(api, repo_id, "uploading", (revision, head)):
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files),
                    *(CommitOperationDelete(name) for name in leftovers),
                ],
                commit_message=commit_message or f"Publish with hf_ext: {_heading(card)}",
                revision=None if create_pr else revision,
                create_pr=create_pr,
                parent_commit=head,
            )


def _heading(card: ModelCard) -> str:
    return next((line.removeprefix("# ") for line in card.text.splitlines() if line.startswith("# ")), "model")


def _prepare_repo(api: HfApi, repo_id: str, revision: str | None, private: bool | None) -> str | None:
    """Create repository and branch where they are missing; the commit to build on."""
    try:
        return api.model_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        pass
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.model_info(repo_id, revision=revision).sha


def _united_with_remote(
    api: HfApi, repo_id: str, head: str | None, card: ModelCard, before: Mapping[str, Any] | None
) -> ModelCard:
    try:
        existing = api.hf_hub_download(repo_id, "README.md", revision=head)
    except LocalEntryNotFoundError:  # nothing is known of it: the Hub did not answer
        raise
    except EntryNotFoundError:
        return card
    return merge(card, load_card(Path(existing)), before and before["card"])


def _remote_manifest(api: HfApi, repo_id: str, head: str | None) -> Mapping[str, Any] | None:
    """What we recorded with the last commit; `None` if there is none, or none that can be read."""
    try:
        file = Path(api.hf_hub_download(repo_id, MANIFEST, revision=head))
        return read_manifest(file.parent)
    except LocalEntryNotFoundError:
        raise
    except (EntryNotFoundError, ValueError):
        return None


def _leftovers(
    api: HfApi, repo_id: str, head: str | None, before: Mapping[str, Any] | None, names: set[str]
) -> list[str]:
    """Files in the repository that would be taken for a part of what is published now: those that we published before, and an adapter beside merged weights, which
    transformers would load on top of them."""
    remote = set(api.list_repo_files(repo_id, revision=head)) - names
    ours = set(before["files"]) if before else set()
    return sorted(name for name in remote if name in ours or ("config.json" in names and name in _ADAPTER))


@contextmanager
def _explained(api: HfApi, repo_id: str, step: str, commit: tuple[str | None, str | None] | None) -> Iterator[None]:
    """Turn what the Hub or the way there makes a remote step raise into a `PublishError` that says how things stand."""
    try:
        yield
    except Exception as error:
        diagnosis = _diagnosis(error)
        if diagnosis is None:
            raise
        cause, remedy = diagnosis
        state = "nothing was uploaded" if commit is None else _state(api, repo_id, *commit)
        raise PublishError(
            f"{repo_id} was not published to {api.endpoint}: {step} failed, {cause}. Repository: {state}. Remedy: {remedy}."
        ) from error


def _diagnosis(error: Exception) -> tuple[str, str] | None:
    """Cause and remedy; `None` for a fault that is neither the Hub's nor the network's."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "unset it, or write to a folder with `save`"
    root: BaseException | None = error
    while root is not None and not isinstance(root, HfHubHTTPError):
        root = root.__cause__ or root.__context__
    if isinstance(root, HfHubHTTPError) and root.response is not None:
        status = root.response.status_code
        fallback = "the Hub has a fault; try again later" if status >= 500 else "see the answer of the Hub above"
        return f"the Hub answered {status} ({_first_line(root)})", _REMEDIES.get(status, fallback)
    if isinstance(error, ValueError | yaml.YAMLError):
        return (
            f"the Hub or a file in the repository is at odds with the card: {error}",
            "correct that and publish again",
        )
    # Uploads that break off are a RuntimeError.
    if not isinstance(error, OSError | RuntimeError) and not is_request_error(error):
        return None
    return (
        f"the connection broke ({type(error).__name__}: {_first_line(error)})",
        "check the network and publish again",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _state(api: HfApi, repo_id: str, revision: str | None, head: str | None) -> str:
    """Whether the commit arrived: an answer can get lost after the Hub has acted on the request."""
    try:
        now = api.model_info(repo_id, revision=revision).sha
    except Exception:
        return "its state is unknown, because the Hub does not answer; publishing again does no harm"
    if now == head:
        return f"unchanged, at commit {head}"
    return f"moved on to commit {now}; if that is this upload, publishing again commits nothing"
