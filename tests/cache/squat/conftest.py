"""What all tests of the cache share."""

import warnings

import pytest


@pytest.fixture(autouse=True)
def _quiet():
    """Two warnings that most tests here provoke; those that are about a warning look for it themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This model uses the attention")
        warnings.filterwarnings("ignore", message="Nothing of a")
        yield
