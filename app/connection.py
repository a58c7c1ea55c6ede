"""One HTTP connection, with bounds on what arrives before there is a request: size, number and time of its head.

The server below has none for its fast parser: a header without an end would be kept in memory for ever.
"""

import asyncio
from http import HTTPStatus
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import BadRequest, HeadTooLarge, ParleyError, TooSlow, to_problem
from app.journal import Journal

# The request line with all headers, in bytes. A streaming URL of a hundred streams and tokens has 11 KiB.
HEAD_LIMIT = 32 * 1024
_MOST_HEADERS = 100
# From a connection's first byte, or from being made, to the end of a request's head.
HEAD_S = 10.0


class Connection(HttpToolsProtocol):
    """`head_s`: how long a request's head may take, and a connection that says nothing may stay."""

    def __init__(self, *given: Any, head_s: float = HEAD_S, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head_s = head_s
        self._timer: asyncio.TimerHandle | None = None
        # Bytes since the last end of a head, or piece of a body: also what the parser keeps to itself.
        self._pending = 0
        self._refusal: ParleyError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._head_s, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._calm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._pending += len(data)
        super().data_received(data)
        if self._pending > HEAD_LIMIT:
            self._refuse(_too_large())
        elif self._timer is None and (self.cycle is None or self.cycle.response_complete):
            # Something came, and no request has begun: the rest of it is not waited for as long as it pleases.
            self._timer = self.loop.call_later(self._head_s, self._give_up)

    def on_headers_complete(self) -> None:
        size = self._pending
        if size > HEAD_LIMIT:  # with a part of the body, perhaps
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_LIMIT or len(self.headers) > _MOST_HEADERS:
            self._refusal = _too_large()
            raise self._refusal
        self._pending = 0
        self._calm()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._pending = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """What the parser does not take, in our words."""
        self._refuse(self._refusal or BadRequest("bad_request", "This is no HTTP request."))

    def _unsupported_upgrade_warning(self) -> None:
        # The parser is done with this connection; its request is answered as if it had not asked.
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _calm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._timer = None
        if self._pending and not self._answering:
            self._refuse(TooSlow("head_too_slow", f"The request did not arrive within {self._head_s:g} seconds."))
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, error: ParleyError) -> None:
        """Say why, unless that would land in the middle of another answer, and close."""
        if self.transport.is_closing():
            return
        if not (self._answering and self.cycle.response_started):
            self.transport.write(self._problem(error))
        self.transport.close()

    def _problem(self, error: ParleyError) -> bytes:
        journal: Journal | None = self.app_state.get("journal")
        error_id = journal.count(error.code) if journal else ""
        body = orjson.dumps(to_problem(error, error_id))
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/problem+json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"connection", b"close"),
        ]
        line = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
        return line + b"".join(b"%b: %b\r\n" % header for header in headers) + b"\r\n" + body


def _too_large() -> HeadTooLarge:
    detail = f"The request's line and headers have more than {HEAD_LIMIT} bytes, or than {_MOST_HEADERS} headers."
    return HeadTooLarge("head_too_large", detail)
