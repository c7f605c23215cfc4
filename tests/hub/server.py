"""The loopback Hub: an HTTP server bound to 127.0.0.1 that the unchanged Hugging Face clients can push to and load from.

with HubServer() as hub:
    subprocess.run([...], env={**os.environ, **hub.env})
    hub.repos["models", "user/name"].files()["README.md"]
    hub.faults.add(r"POST .*/commit/", status=500)
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.hub import routes
from tests.hub.faults import Fault, Faults
from tests.hub.store import HubError, Repo, Store

WRITE_TOKEN = "hf_test"
READ_TOKEN = "hf_readonly"
USER = "user"
NAMESPACES = (USER, "org")


class HubServer:
    """A running server.

    Args:
        port: 0 picks a free one.
        root: folder that keeps the repositories between runs; in memory when absent.

    Attributes:
        repos: `{(kind, id): Repo}`, kind one of `models`, `datasets`, `spaces`, `kernels`.
        faults: faults to commit, see `tests.hub.faults`.
        requests: "METHOD /path?query" of every request.
        unhandled: the requests no route knows, and handlers that crashed; a test of a real client asserts it is empty.
    """

    def __init__(self, port: int = 0, root: str | Path | None = None):
        self.store = Store(root)
        self.faults = Faults()
        self.requests: list[str] = []
        self.unhandled: list[str] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._http.hub = self  # type: ignore[attr-defined]
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._home = tempfile.mkdtemp(prefix="hub_home_")
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def repos(self) -> dict[tuple[str, str], Repo]:
        return self.store.repos

    @property
    def env(self) -> dict[str, str]:
        """What a client process needs in its environment before it imports huggingface_hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": self._home,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def reset(self) -> None:
        """Forget faults and the log; repositories stay."""
        self.faults.clear()
        self.requests.clear()
        self.unhandled.clear()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        shutil.rmtree(self._home, ignore_errors=True)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Handler(BaseHTTPRequestHandler):
    """One connection. Reads the whole request, applies an armed fault, dispatches, answers."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """The log is `HubServer.requests`."""

    def serve(self) -> None:
        line = f"{self.command} {self.path}"
        self.hub.requests.append(line)
        fault = self.hub.faults.match(line)
        if fault is not None and fault.drop == "request":
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.cut()
        body = self.read_body()
        if fault is not None:
            time.sleep(fault.delay)
            if fault.status is not None:
                return self.send(routes.as_json({"error": "injected fault"}, fault.status, **fault.headers))
        self.send(self.answer(body), fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, body: bytes) -> routes.Answer:
        url = urlsplit(self.path)
        try:
            user, may_write = self.identify()
            found = routes.find(self.command, url.path)
            if found is None:
                self.hub.unhandled.append(f"{self.command} {self.path}")
                raise HubError(404, f"no route for {self.command} {url.path}", "RepoNotFound")
            handler, groups, write = found
            query = parse_qs(url.query)
            request = routes.Request(
                self.command, url.path, query, self.headers, body, self.hub.endpoint, user, groups
            )
            if write:
                self.authorise(request, may_write)
            with self.hub.store.lock:
                answer = handler(self.hub.store, request)
                if write:
                    self.hub.store.save()
            return answer
        except HubError as error:
            headers = {"X-Error-Message": error.message, **error.extra}
            if error.code is not None:
                headers["X-Error-Code"] = error.code
            return routes.as_json({"error": error.message}, error.status, **headers)
        except Exception:
            self.hub.unhandled.append(f"{self.command} {self.path}\n{traceback.format_exc()}")
            return routes.as_json({"error": "the loopback Hub crashed, see HubServer.unhandled"}, 500)

    def identify(self) -> tuple[str | None, bool]:
        """User name and whether the token may write."""
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None, False
        if token not in (WRITE_TOKEN, READ_TOKEN):
            raise HubError(401, "Invalid credentials in Authorization header")
        return USER, token == WRITE_TOKEN

    def authorise(self, request: routes.Request, may_write: bool) -> None:
        if request.user is None:
            raise HubError(401, "Invalid username or password.")
        namespace = request.groups["id"].split("/")[0] if "id" in request.groups else None
        if namespace is None:
            namespace = json.loads(request.body or b"{}").get("organization") or USER
        if not may_write or namespace not in NAMESPACES:
            raise HubError(403, f"You don't have the rights to write to the namespace {namespace!r}.")

    def send(self, answer: routes.Answer, fault: Fault | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        if fault is not None and fault.drop == "response":
            self.wfile.write(body[: len(body) // 2])
            return self.cut()
        self.wfile.write(body)

    def cut(self) -> None:
        """Close the connection without a word."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
