"""What is imported when it is first used: names of a package, and libraries that not every installation has."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def lazy_attributes(
    namespace: dict[str, Any], modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        namespace: its `globals()`, which keep a name once it is imported.
        modules: public name -> the module that defines it, absolute or relative to the package (`".config"`).
    """
    package = namespace["__name__"]

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(modules[name], package), name)
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
        raise ImportError(f'{name.split(".")[0]} is not installed: pip install "hf-ext[{extra}]"') from error
