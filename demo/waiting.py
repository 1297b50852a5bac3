"""A page at the demo's address that says what is being loaded, until the demo itself is there.

Libraries and the model take seconds, a large model minutes. Until then a browser would find nothing there.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import TDMError

PAGE = Path(__file__).with_name("waiting.html")
PORTS = range(7860, 7960)  # tried in this order when none is asked for: Gradio's own


class Waiting:
    """A page on an address and a port, for the length of a `with`. It tells nothing but what is being loaded.

    Args:
        address: to listen on.
        port: None takes the first free one of `PORTS`.

    Attributes:
        port: which it is.
        url: for a browser of this machine.

    Raises:
        TDMError: the address or the port cannot be used.
    """

    def __init__(self, address: str, port: int | None) -> None:
        self._doing = "libraries"
        self._begun = time.monotonic()
        self._server = self._bound(address, PORTS if port is None else [port])
        self.port: int = self._server.server_address[1]
        host = {"0.0.0.0": "localhost", "::": "localhost"}.get(address, f"[{address}]" if ":" in address else address)
        self.url = f"http://{host}:{self.port}/"

    def __enter__(self) -> Waiting:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="waiting", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def say(self, doing: str) -> None:
        """Set what the page says is being loaded."""
        self._doing = doing

    def _bound(self, address: str, ports: range | list[int]) -> _Server:
        for port in ports:
            try:
                return _Server(address, port, self._state)
            except OSError as error:
                reason = error.strerror or str(error)
        if len(ports) > 1:
            raise TDMError(f"cannot serve on {address}: no port from {ports[0]} to {ports[-1]} is free; name another")
        raise TDMError(f"cannot serve on {address}, port {ports[0]}: {reason}")

    def _state(self) -> dict[str, Any]:
        return {"doing": self._doing, "seconds": round(time.monotonic() - self._begun, 1)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, port: int, state: Any) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.state = state
        super().__init__((address, port), _Handler)

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which can take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 5  # seconds for a request to come whole

    def do_GET(self) -> None:
        """`/starting`: what is being done. All else: the page, as what is not here yet (503)."""
        if self.path == "/starting":
            self._answer(HTTPStatus.OK, "application/json", json.dumps(self.server.state()).encode())
        else:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/html; charset=utf-8", PAGE.read_bytes())

    def do_POST(self) -> None:
        """Answer 503, so that clients try again later."""
        self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", b"the demo is starting\n")

    do_HEAD = do_GET  # noqa: N815 (the name that the library calls)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        for name, value in {**headers, "Retry-After": "1"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Log nothing: the terminal is for what the demo says."""
