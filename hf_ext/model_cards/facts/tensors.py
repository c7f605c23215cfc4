"""What files of tensors hold, from their headers."""

from __future__ import annotations

import math
from pathlib import Path

from safetensors import SafetensorError, safe_open


def headers(folder: Path, pattern: str) -> tuple[int, int]:
    """Numbers in the safetensors files that match, and the bytes of these files.

    Raises:
        ValueError: a file is damaged.
    """
    numbers = size = 0
    for file in sorted(folder.glob(pattern)):
        try:
            with safe_open(file, framework="pt") as tensors:
                numbers += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file.name} is damaged or cut short ({error}); fetch or save it again.") from None
        size += file.stat().st_size
    return numbers, size
