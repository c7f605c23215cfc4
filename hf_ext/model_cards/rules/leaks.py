"""Text that must not leave the machine: access tokens, local paths, e-mail addresses, the name of its user."""

from __future__ import annotations

import getpass
import re
from pathlib import PurePosixPath

# Of the Hub, OpenAI and its like, GitHub, AWS. Shorter words with these beginnings are names, such as that of this package.
TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-(?:(?:proj|ant|or|svcacct|admin)-[\w-]{20,}|[A-Za-z0-9]{20,})"
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b"
)
# What cards have in plenty is no path of a machine: routes of a server, links of a page, `/path/to/model`, the cache of the Hub.
# Every repetition is followed by something it cannot match itself, or is bounded, so that a search takes linear time.
LOCAL_PATH = re.compile(
    r"""
    (?<![\w/.<~-]) (?:file://)? / (?!bin/|usr/bin/|dev/null\b|path/to/|root/\.cache/huggingface\b)
        (?: (?=(?:home|Users|root|mnt|tmp|var|opt|data|scratch|srv|workspace|content|Volumes|media)/)
          | (?<![)\]}*%$]/) (?<!\]\(/) (?<!href="/) (?<!src="/) (?<!GET[ ]/) (?<!POST[ ]/) (?<!PUT[ ]/) (?<!DELETE[ ]/)
            (?!(?:v\d\w*|api|chat|completions?|embeddings?|generate|predict|invocations|docs|blog|papers|spaces|resolve)/) )
        (?: (?:home|Users)/[\w.+-]+(?:[ ][\w.+-]+){0,2}(?=/) | [\w.+-]+ )  # /home/name, also with blanks
        (?:/(?:My[ ]Drive(?=/)|[\w.+-]+))+ /?                              # /home/name/model
    | (?<![\w/~]) ~(?!/\.cache/huggingface\b)(?:[A-Za-z_][\w.-]*)?/[\w.+-]+(?:/[\w.+-]+)*            # ~/model, ~name/model
    | (?<!\w) [A-Za-z]:\\+(?=[^\s"'`|\\])(?:[^\s"'`|\\:]+(?:[ ][^\s"'`|\\:]+){0,2}\\+)*[^\s"'`|\\]*  # C:\models\model
    | (?<!\w) [A-Za-z]:/(?:[\w.+-]+/)+[\w.+-]*                             # C:/models/model
    | (?<![^\s"'`(=\[:]) \\\\[\w.-]{2,}\\[\w.$-]{2,}(?:\\[\w.$-]+)*         # \\server\share
    """,
    re.VERBOSE,
)
# Bounded, and begun only where a word begins: a long run of letters would take quadratic time otherwise.
# `git@github.com` is nobody's, and `you/data@main.v1` a revision.
EMAIL = re.compile(r"(?<![\w.+/-])(?!git@)[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,24}\b")

_HOMES = ("home", "Users")
# Logins that say nothing about a person.
_COMMON_LOGINS = frozenset(
    [
        "root",
        "user",
        "users",
        "admin",
        "administrator",
        "ubuntu",
        "debian",
        "centos",
        "ec2-user",
        "runner",
        "build",
        "builder",
        "test",
        "tester",
        "home",
        "jovyan",
        "docker",
        "vscode",
        "codespace",
        "gitpod",
        "sagemaker-user",
        "colab",
        "guest",
        "nobody",
        "default",
        "worker",
        "service",
        "server",
        "system",
        "local",
        "python",
        "conda",
        "model",
        "models",
        "train",
        "training",
        "data",
        "mail",
        "kaggle",
        "azureuser",
        "github",
        "hugging",
        "huggingface",
        "node",
        "main",
        "base",
        "eval",
        "demo",
        "work",
    ]
)


def without_paths(text: str) -> str:
    """`text` with every local path reduced to its last component, and a home directory to `~`."""
    return LOCAL_PATH.sub(_last_component, text)


def login_name() -> str | None:
    """The login on this machine, if it is one that a reader could tell a person by."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError, ImportError):  # no such variable, and no entry for the user's number
        return None
    return name if len(name) >= 4 and name.lower() not in _COMMON_LOGINS else None


def names_user(text: str, login: str) -> bool:
    """Whether `login` is a word of the text, other than in a local path or as the owner of a repository."""
    word = re.compile(rf"(?<![\w/@.-]){re.escape(login)}(?![\w/-]|\.\w)")
    return login in text and word.search(LOCAL_PATH.sub(" ", text)) is not None


def _last_component(found: re.Match[str]) -> str:
    path = PurePosixPath(re.sub(r"\\+", "/", found[0]))
    return "~" if path.parent.name in _HOMES and len(path.parts) <= 3 else path.name
