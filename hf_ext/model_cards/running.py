"""Run the code of a card before anybody else does: in a process of its own, in the folder that is published, told to work offline.

This finds code that does not run. It is no cage: the code may read what its user may, and start programs that nothing keeps
from the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from hf_ext.model_cards.rules.fences import FENCE, closes
from hf_ext.model_cards.rules.leaks import TOKEN, without_paths

NOT_RUN = "This code was generated with the card; it was not run before publishing."
_SHOWN = 600
_MOST = 2**20  # bytes of output
_POLL = 0.2  # seconds between looks at what was written
_PACKAGES = ("hf-ext", "torch", "transformers", "peft", "diffusers")

_REMEDY = (
    "Correct the code, or the base model that it names, which has to lie in the local cache or in the folder that it was loaded from; "
    "or pass run_snippet=False, and the card will say that it was not run."
)

# What libraries and their compilers need of the environment; all else, such as keys of services, is not the code's business.
_VARIABLES = re.compile(
    "PATH|HOME|USER|LOGNAME|TMPDIR|TEMP|TMP|TZ|LANG|LANGUAGE|LC_.*|XDG_CACHE_HOME|VIRTUAL_ENV|CONDA_PREFIX|PYTHONHOME|"
    "(DY)?LD_LIBRARY_PATH|CC|CXX|CUDA_(HOME|PATH|VISIBLE_DEVICES|DEVICE_ORDER)|ROCM_HOME|(HIP|ROCR)_VISIBLE_DEVICES|"
    "(OMP|MKL|OPENBLAS)_NUM_THREADS|KMP_DUPLICATE_LIB_OK|TORCH.*|PYTORCH_.*|TRITON_.*|"
    "HF_HOME|HF_(HUB|XET|ASSETS|MODULES|DATASETS)_CACHE|HUGGINGFACE_HUB_CACHE|"
    "SYSTEMROOT|SYSTEMDRIVE|WINDIR|COMSPEC|PATHEXT|USERPROFILE|HOMEDRIVE|HOMEPATH|(LOCAL)?APPDATA|PROGRAMDATA|"
    "PROGRAMFILES|NUMBER_OF_PROCESSORS|PROCESSOR_ARCHITECTURE"
)
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUTF8": "1",
}

# The folder must not shadow a library, and what a library caches on this machine is all it can get. Addresses that are no
# tuple are files of this machine.
_PRELUDE = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
names = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
addresses = {"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"}
def refuse(event, arguments):
    if event in names or event in addresses and isinstance(arguments[1], tuple):
        raise OSError(f"the code of the card needs the network: {event}{arguments[1:] or arguments}")
sys.addaudithook(refuse)
exec(compile(sys.stdin.read(), "<code of the card>", "exec"), {"__name__": "__main__"})
"""


class SnippetError(ValueError):
    """The code of the card does not run against what would be published."""


@dataclass(frozen=True)
class SnippetRun:
    """A successful run: of what code, what it printed, and the sha256 of that."""

    code: str
    output: str
    digest: str

    @property
    def note(self) -> str:
        """What the card says below the code."""
        used = [name for name in _PACKAGES if name == "torch" or f"{name.replace('-', '_')} " in self.code]
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in used)
        told = f"This code was run before publishing, in a process of its own that was told to work offline, with {versions}."
        if not self.output:
            return f"{told} It printed nothing."
        shown = self.output if len(self.output) <= _SHOWN else f"{self.output[:_SHOWN]} …"
        # A fence in the output must not end the block.
        return f"{told} It printed:\n\n```text\n{shown.replace('```', '` ` `')}\n```"


def code_of(text: str) -> str | None:
    """The first Python block of a card."""
    return next(iter(python_blocks(text)), None)


def python_blocks(text: str) -> list[str]:
    """The blocks of a card that are fenced, by backquotes or tildes, and said to be Python."""
    blocks: list[str] = []
    fence, language, lines = "", "", [""]
    for line in text.replace("\r\n", "\n").split("\n"):
        mark = FENCE.match(line)
        if mark and not fence:
            fence, language, lines = mark[1], mark[2].lower(), []
        elif closes(mark, fence):
            if language in ("python", "python3", "py"):
                blocks.append("\n".join([*lines, ""]))
            fence = ""
        elif fence:
            lines.append(line)
    return blocks


def run_snippet(code: str, folder: Path, names: Mapping[str, str] | None = None, timeout: float = 600.0) -> SnippetRun:
    """Run `code` in a place that looks like `folder`: new files stay there, and disappear with it.

    Args:
        names: string literals of the code that stand for something on this machine: what is published later to be found at a
            Hub id is this folder now.
        timeout: seconds.

    Raises:
        SnippetError: it failed, asked for the network, took too long, wrote more than 1 MiB, or wrote to the files of `folder`; the message has its last lines.
    """
    for name, here in (names or {}).items():
        code = code.replace(f'"{name}"', repr(here))
    before = _state(folder)
    with TemporaryDirectory() as scratch:
        # Always the same name, as the code may print where it is.
        linked = Path(scratch, "model")
        _link(folder, linked)
        returncode, output, errors = _run(code, linked, [folder, linked], timeout)
    written = sorted(name for name, _ in before ^ _state(folder))
    if written:
        raise SnippetError(
            f"the code of the card writes to what is published: {', '.join(dict.fromkeys(written))}. {_REMEDY}"
        )
    if returncode:
        last = "\n".join(errors.strip().splitlines()[-4:])
        raise SnippetError(f"the code of the card fails:\n{last}\n{_REMEDY}")
    shown = TOKEN.sub("(removed)", without_paths(output.strip()))
    return SnippetRun(code, shown, hashlib.sha256(shown.encode()).hexdigest())


def _state(folder: Path) -> set[tuple[str, tuple[int, ...]]]:
    """Every file, and what of its status changes with its content; the change time cannot be set back."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    seen = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return {(name, (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)) for name, status in seen}


def _link(folder: Path, target: Path) -> None:
    """The same tree with links in the place of files, or with copies where the system refuses links."""
    target.mkdir()
    for path in sorted(folder.rglob("*")):
        place = target / path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            place.mkdir()
            continue
        try:
            place.symlink_to(path.resolve())
        except OSError:
            shutil.copyfile(path, place)


def _run(code: str, folder: Path, hidden: Sequence[Path], timeout: float) -> tuple[int, str, str]:
    """The exit status, and what was written to both outputs. Nothing is imported from `hidden`."""
    # Files, since the end of a pipe would be awaited from every child that has it open.
    with TemporaryFile() as source, TemporaryFile() as output, TemporaryFile() as errors:
        source.write(code.encode())
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", _PRELUDE],
            stdin=source,
            stdout=output,
            stderr=errors,
            cwd=folder,
            env=_environment(hidden),
            start_new_session=True,
        )
        try:
            _wait(process, (output, errors), timeout)
        finally:
            _stop(process)
        return process.returncode, _read(output), _read(errors)


def _environment(hidden: Sequence[Path]) -> dict[str, str]:
    """What the code is told of this process."""
    kept = {key: value for key, value in os.environ.items() if _VARIABLES.fullmatch(key)}
    # Relative entries would mean another place there, and files of the folder must not shadow a library.
    paths = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    outside = [str(path) for path in paths if not any(path.is_relative_to(place.resolve()) for place in hidden)]
    return {**kept, **_OFFLINE, **({"PYTHONPATH": os.pathsep.join(outside)} if outside else {})}


def _wait(process: subprocess.Popen[bytes], written: Sequence[IO[bytes]], timeout: float) -> None:
    """Until the process has ended, whatever its children do.

    Raises:
        SnippetError: it takes or writes too much.
    """
    end = time.monotonic() + timeout
    while True:
        try:
            process.wait(_POLL)
        except subprocess.TimeoutExpired:
            if time.monotonic() > end:
                raise SnippetError(f"the code of the card was stopped after {timeout:g} s. {_REMEDY}") from None
        if any(os.fstat(file.fileno()).st_size > _MOST for file in written):
            raise SnippetError(f"the code of the card writes more than {_MOST:,} bytes of output. {_REMEDY}")
        if process.returncode is not None:
            return


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MOST).decode("utf-8", errors="replace").replace("\r\n", "\n")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and those it started, which may outlive it."""
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()
