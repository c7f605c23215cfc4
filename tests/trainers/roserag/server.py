"""An OpenAI-compatible server on the loopback that can misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Reply = tuple[int, dict[str, str], bytes]


def message(text) -> Reply:
    """A chat completion with this text."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, "logprobs": None}
    content = {"id": "1", "object": "chat.completion", "created": 0, "model": "served", "choices": [choice]}
    content["usage"] = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return 200, {}, json.dumps(content).encode()


class ChatServer:
    """Answers `POST .../chat/completions` with what `answer(request, how many times this request came before)` returns."""

    def __init__(self, answer: Callable[[dict, int], Reply | float]) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.seen: dict[str, int] = {}
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = json.dumps(request, sort_keys=True)
                with lock:
                    server.requests.append(request)
                    server.headers.append({name.lower(): value for name, value in self.headers.items()})
                    before = server.seen.get(key, 0)
                    server.seen[key] = before + 1
                found = answer(request, before)
                if isinstance(found, float):
                    # Longer than the client waits.
                    time.sleep(found)
                    return
                status, headers, body = found
                self.send_response(status)
                for name, value in {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(body)),
                    **headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *args):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()
