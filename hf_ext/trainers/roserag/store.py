"""Work that was done, kept on disk so that it need not be done again.

A file per stage has one line of JSON per question. Its name is a digest of everything that the results of the stage depend on but the question; the line
names a digest of that. What is interrupted loses the lines that were not written; a last line that is cut off is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def digest_of(content: Any) -> str:
    """Of anything that JSON can write."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Keep other builds out of a folder; a process that is killed leaves no lock.

    Raises:
        ValueError: another build is at work in it.
    """
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"cache_dir={str(folder)!r}: another build is at work there; build in one process alone."
        ) from error
    try:
        yield
    finally:
        lock.release()


class StageStore:
    """Results of one stage; those of thousands of questions take no memory but their places in the file.

    Args:
        folder: of the file; None keeps nothing.
        stage: its name.
        settings: what the results depend on beside the question.
    """

    def __init__(self, folder: Path | None, stage: str, settings: Any) -> None:
        self._places: dict[str, int] = {}
        self._path = None if folder is None else folder / f"{stage}-{digest_of(settings)}.jsonl"
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.with_suffix(".json").write_text(
            json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if self._path.exists():
            self._read_places()

    def _read_places(self) -> None:
        assert self._path is not None
        with self._path.open("rb+") as file:
            while True:
                place = file.tell()
                line = file.readline()
                if not line.endswith(b"\n"):
                    # Cut off by an interruption, or the end.
                    file.truncate(place)
                    return
                with contextlib.suppress(json.JSONDecodeError):
                    # A line that something else broke is done again.
                    self._places[json.loads(line)["key"]] = place

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Any | None:
        """The result of a question with this digest; None if there is none."""
        if self._path is None or key not in self._places:
            return None
        with self._path.open("rb") as file:
            file.seek(self._places[key])
            return json.loads(file.readline())["result"]

    def add(self, results: Iterable[tuple[str, Any]]) -> None:
        """Write the results of a batch, and wait until they are on the disk."""
        if self._path is None:
            return
        with self._path.open("ab") as file:
            for key, result in results:
                self._places[key] = file.tell()
                line = json.dumps({"key": key, "result": result}, ensure_ascii=False, separators=(",", ":"))
                file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
