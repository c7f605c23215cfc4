"""`validate` on repositories of the loopback Hub. Run by `test_validate.py` in a child process, see `tests.hub.fixtures`."""

from __future__ import annotations

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_ext.cli import main
from hf_ext.model_cards import validate
from tests.model_cards.written import card, rules, text


def test_files_of_a_repository_are_checked(hub, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "adapter_model.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "training_args.bin").write_bytes(b"1")
    (tmp_path / "no[te]s.txt").write_text("/home/jane/x hf_" + "Ab1" * 11)
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "a.yaml").write_text("- {value: 1}")
    api, body = HfApi(), text(Model_details="| Parameters of the adapter | 14 (0.1 MB) |")
    api.create_repo("user/a")
    api.upload_folder(repo_id="user/a", folder_path=tmp_path)
    beside = validate("user/a")
    assert rules(beside.errors) == ["token", "eval-results", "card-missing"]
    assert rules(beside.warnings) == ["pickle", "local-path"]
    hub.requests.clear()
    api.upload_file(repo_id="user/a", path_in_repo="README.md", path_or_fileobj=card(body=body).encode())
    report = validate("user/a")
    assert rules(report.errors) == ["token", "eval-results"]
    assert rules(report.warnings) == ["pickle", "local-path", "adapter-size"]
    assert not [request for request in hub.requests if "/model.safetensors" in request or ".bin" in request]


def test_a_hub_that_cannot_be_reached(hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert main(["card", "validate", "user/a"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-ext: the Hub cannot be reached: ")
