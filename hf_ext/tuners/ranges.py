"""Questions that the configurations of several tuners ask of a field."""

from __future__ import annotations


def is_count(value: object) -> bool:
    """Whether a value counts something: an int, which a bool is not here."""
    return isinstance(value, int) and not isinstance(value, bool)
