"""Run the loopback Hub from a shell: `python -m tests.hub [--port PORT] [--root DIR]`."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import threading

from tests.hub.server import HubServer


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 picks a free one")
    parser.add_argument("--root", help="folder that keeps the repositories between runs; in memory without it")
    arguments = parser.parse_args()
    with HubServer(arguments.port, arguments.root) as hub:
        print("# Paste into the shell of the client, before Python starts:")
        for name, value in hub.env.items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
