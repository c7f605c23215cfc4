"""Where the code of a text is: blocks fenced by backquotes or tildes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

# A fence and the language behind it.
FENCE = re.compile(r"\s*(`{3,}(?=[^`]*$)|~{3,})[ \t]*([\w.+-]*)")


def closes(mark: re.Match[str] | None, fence: str) -> bool:
    """Whether a line that `FENCE` matched ends the block that `fence` began."""
    return mark is not None and mark[1].startswith(fence) and not mark[2]


def with_code(lines: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Every line, and whether it belongs to a block, as its fences do."""
    fence = ""
    for line in lines:
        mark = FENCE.match(line.rstrip("\r\n"))
        yield line, bool(fence or mark)
        if not fence:
            fence = mark[1] if mark else ""
        elif closes(mark, fence):
            fence = ""
