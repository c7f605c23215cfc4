"""Recorded inputs and outputs of reference implementations; each folder says where they come from."""

from pathlib import Path

ORACLES = Path(__file__).parent
