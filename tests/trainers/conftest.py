"""What all tests of the trainers share."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="session")
def _imported_modules_are_not_collected():
    """A run of a trainer ends in a full garbage collection, which takes longer than the training if it visits them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
