"""What is imported when it is first used: names of a package, and libraries that not every installation has."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# Libraries that modules of ours import at their top, and the extra that brings them.
_EXTRAS = {"datasets": "trl", "trl": "trl"}


def lazy_attributes(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        namespace: its `globals()`, which keep a name once it is imported.
        modules: public name -> the module that defines it, absolute or relative to the package (`".config"`).

    Raises:
        ImportError: later, when a name is used that needs a library that is not installed; the message names the extra that brings it.
    """
    package = namespace["__name__"]

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(modules[name], package), name)
        except ModuleNotFoundError as error:
            if error.name not in _EXTRAS:
                raise
            raise _missing(error.name, _EXTRAS[error.name]) from error
        namespace[name] = value
        return value

    def names() -> list[str]:
        return sorted({*namespace, *modules})

    return load, names


def optional_import(name: str, extra: str) -> ModuleType:
    """The module `name`.

    Raises:
        ImportError: it is not installed; the message names the extra of this package that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing(name.split(".")[0], extra) from error


def _missing(library: str, extra: str) -> ImportError:
    return ImportError(f'{library} is not installed: pip install "hf-ext[{extra}]"')
