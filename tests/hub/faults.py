"""Faults that the loopback Hub commits on demand, as a real server or a real network would."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to the `nth` and the following `times - 1` requests whose "METHOD /path?query" matches `pattern`.

    Attributes:
        status: answer with this status instead of serving the request.
        headers: headers of that answer, e.g. `{"Retry-After": "1"}`.
        drop: cut the TCP connection: `"request"` after half of the body was read, so that nothing happens on the
            server; `"response"` after half of the answer was sent, so that the request has taken effect.
        delay: seconds to wait before serving.
    """

    pattern: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = None
    delay: float = 0.0
    nth: int = 1
    times: int = 1
    seen: int = 0


class Faults:
    """The faults armed on a server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Fault] = []

    def add(self, pattern: str, **fields) -> Fault:
        fault = Fault(pattern, **fields)
        with self._lock:
            self._armed.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._armed.clear()

    def match(self, request: str) -> Fault | None:
        """The fault that hits this request, counting the request for every armed pattern it matches."""
        hit = None
        with self._lock:
            for fault in self._armed:
                if re.search(fault.pattern, request):
                    fault.seen += 1
                    if fault.nth <= fault.seen < fault.nth + fault.times:
                        hit = hit or fault
        return hit
