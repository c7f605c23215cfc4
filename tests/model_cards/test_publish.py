"""Publishing, run where the Hugging Face libraries see the loopback Hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_ext.model_cards import PublishError, publish
from tests.hub.fixtures import run_against_hub
from tests.model_cards.tiny import lora_model


def test_publish():
    here = Path(__file__).parent
    run_against_hub(here / "publish_checks.py", str(here / "flow_checks.py"))


def test_offline_mode_is_named():
    with pytest.raises(PublishError, match=r"user/x was not published to .*HF_HUB_OFFLINE is set.*`save`"):
        publish(lora_model(), "user/x", token="hf_test", run_snippet=False)


def test_pull_request_against_a_branch():
    with pytest.raises(ValueError, match="revision='dev'"):
        publish(lora_model(), "user/x", revision="dev", create_pr=True)
