"""The loopback Hub serves the real clients, and survives a restart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

from tests.hub.fixtures import ROOT, run_against_hub
from tests.hub.server import HubServer
from tests.hub.store import Blob

HERE = Path(__file__).parent


def get(url: str) -> dict:
    return json.loads(urllib.request.urlopen(url).read())


def test_huggingface_hub_client():
    run_against_hub(HERE / "client_checks.py")


def test_transformers_peft_and_trl_clients():
    run_against_hub(HERE / "library_checks.py")


def test_binds_to_the_loopback_interface_only(hub):
    assert hub.endpoint.startswith("http://127.0.0.1:")
    assert hub._http.socket.getsockname()[0] == "127.0.0.1"


def test_environment_is_what_a_client_process_needs(hub):
    code = "from huggingface_hub import constants, create_repo; print(constants.ENDPOINT); create_repo('user/x')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **hub.env}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hub.endpoint
    assert ("models", "user/x") in hub.repos


def test_folder_keeps_the_repositories(tmp_path):
    with HubServer(root=tmp_path) as first:
        repo = first.store.create("models", "user/kept", private=False)
        made = repo.commit("refs/heads/main", {"w.bin": Blob(b"\0\1", lfs=True), "a.txt": Blob(b"a")}, "files")
        first.store.save()
    with HubServer(root=tmp_path) as second:
        assert second.repos["models", "user/kept"].files() == {"w.bin": b"\0\1", "a.txt": b"a"}
        assert get(f"{second.endpoint}/api/models/user/kept")["sha"] == made.sha
        assert made.files["w.bin"].sha256 in second.store.lfs


def test_command_prints_the_environment():
    server = subprocess.Popen([sys.executable, "-m", "tests.hub"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        printed = [server.stdout.readline() for _ in range(3)]
        assert printed[1].startswith("export HF_ENDPOINT=http://127.0.0.1:")
        assert printed[2] == "export HF_HUB_DISABLE_XET=1\n"
    finally:
        server.kill()
        server.wait()
