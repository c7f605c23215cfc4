"""The `hub` fixture, and how tests run real clients against it.

The Hugging Face libraries read the endpoint from the environment when they are imported, so their tests run in a child
process: `run_against_hub(file)` starts pytest on `file` with this module as plugin, which starts a server and sets the
environment before anything else is imported. Inside the child the fixture gives that server, in the parent a fresh one
for use with `subprocess.run(..., env={**os.environ, **hub.env})`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.server import HubServer

ROOT = Path(__file__).resolve().parents[2]
CHILD = "HF_EXT_TEST_HUB_CHILD"

_own_server: HubServer | None = None
if os.environ.get(CHILD) == "1":
    _own_server = HubServer()
    os.environ.update(_own_server.env)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A running loopback Hub."""
    if _own_server is not None:
        _own_server.reset()
        yield _own_server
        assert _own_server.unhandled == [], "the clients made requests that the loopback Hub does not know"
    else:
        with HubServer() as server:
            yield server


def put_card(card: object, repo_id: str) -> None:
    """As `card.push_to_hub`, which in huggingface_hub below 2.2 asks the public Hub, whatever the endpoint is."""
    from huggingface_hub import HfApi  # where it is first imported, it reads the endpoint

    HfApi().upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id=repo_id)


def run_against_hub(file: str | Path, *arguments: str, timeout: float = 300) -> None:
    """Run the pytest file `file` in a child process whose Hugging Face libraries talk to a loopback Hub."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.hub.fixtures", "-p", "no:cacheprovider", "--tb=short"]
    environment = {**os.environ, CHILD: "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(file), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-3000:]
