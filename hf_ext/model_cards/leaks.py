"""Text that must not leave the machine: access tokens, local paths, e-mail addresses."""

from __future__ import annotations

import re
from pathlib import PurePath

# Shorter words with this prefix are names, such as that of this package.
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
LOCAL_PATH = re.compile(
    r"(?<![\w/:.<~-])(?:file://)?/[\w.+-]+(?:/[\w.+-]+)+/?"  # /home/name/model
    r"|(?<!\w)~/[\w.+-]+(?:/[\w.+-]+)*"  # ~/model
    r"|(?<!\w)[A-Za-z]:\\[^\s\"'`|]+"  # C:\models\model
)
# Bounded, and begun only where a word begins: a long run of letters would take quadratic time otherwise.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")


def without_paths(text: str) -> str:
    """`text` with every local path reduced to its last component."""
    return LOCAL_PATH.sub(lambda found: PurePath(found[0].replace("\\", "/")).name, text)
