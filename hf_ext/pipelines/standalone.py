"""A module of ours and all that it needs of ours, as one file that runs where hf_ext is not installed: the layout of custom pipelines in diffusers."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import version
from pathlib import Path

PACKAGE = "hf_ext"


def standalone_source(module: str) -> str:
    """Source of a module with the modules of ours that it imports in front of it.

    Raises:
        ValueError: a name stands for two things, or a module is imported in a way that cannot be copied.
    """
    parts: dict[str, str] = {}
    outside: dict[str, None] = {}
    _collect(module, parts, outside)
    _check_names(parts)
    head = f'"""{module} of hf_ext {version("hf-ext")} (Apache-2.0) in one file. Do not edit: it is written by `save_pretrained`."""'
    return "\n\n".join([head, "from __future__ import annotations", "\n".join(outside), *parts.values()]) + "\n"


def _collect(module: str, parts: dict[str, str], outside: dict[str, None]) -> None:
    if module in parts:
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    lines, kept = source.splitlines(), []
    for node in ast.parse(source).body:
        decorators = node.decorator_list if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
        first = min([node.lineno, *(each.lineno for each in decorators)])
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not _is_ours(node)):
            if not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
                outside[ast.unparse(node)] = None
        elif isinstance(node, ast.ImportFrom):
            if any(name.asname for name in node.names) or node.level:
                raise ValueError(f"{module}, line {node.lineno}: import names of ours as they are.")
            _collect(str(node.module), parts, outside)
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            kept.append("\n".join(lines[_with_comment(lines, first - 1) : node.end_lineno]))
    parts[module] = f"# -- {module} --\n\n" + "\n\n".join(kept)


def _is_ours(node: ast.ImportFrom) -> bool:
    return bool(node.level) or str(node.module).split(".")[0] == PACKAGE


def _with_comment(lines: list[str], first: int) -> int:
    """The line with which the comment above a line begins."""
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return first


def _check_names(parts: dict[str, str]) -> None:
    owners: dict[str, str] = {}
    for module, source in parts.items():
        for node in ast.parse(source).body:
            for name in _names(node):
                if owners.setdefault(name, module) != module:
                    raise ValueError(f"{name} is in {owners[name]} and in {module}; give one of them another name.")


def _names(node: ast.stmt) -> list[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
