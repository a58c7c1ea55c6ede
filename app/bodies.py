"""Bodies of requests: each is refused as soon as it shows to be larger than its route takes, or too slow."""

import asyncio
from dataclasses import dataclass
from math import inf

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import TooLarge, TooSlow

# What has to arrive of a body where it must keep a pace.
_STEP = 64 << 10


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a body may take, and the next 64 KiB of it or its end."""

    whole_s: float = inf
    stall_s: float = inf
    upload: bool = False

    def too_slow(self) -> TooSlow:
        stalled = f", or {_STEP >> 10} KiB of it did not within {self.stall_s:g}" if self.stall_s < inf else ""
        told = f"The body did not arrive within {self.whole_s:g} seconds{stalled}."
        return TooSlow("upload_too_slow", told) if self.upload else TooSlow("body_too_slow", told)


class BodyLimit:
    """ASGI middleware: a body over `limit` bytes is refused as soon as that shows, whether it is declared or not, and
    one that keeps its pace no more. Time counts from when it is first asked for.

    Starlette's own answers a declared one in plain text, whatever the handlers of errors say.
    """

    def __init__(self, app: ASGIApp, limit: int, pace: Pace = Pace()) -> None:
        self._app = app
        self._limit = limit
        self._pace = pace

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        declared = Headers(scope=scope).get("content-length", "0")
        body = _Body(receive, self._limit, self._pace, int(declared) if declared.isdecimal() else 0)
        await self._app(scope, body.receive, send)


class _Body:
    """One that is being read."""

    def __init__(self, receive: Receive, limit: int, pace: Pace, declared: int) -> None:
        self._receive = receive
        self._limit = limit
        self._pace = pace
        self._declared = declared
        self._read = self._step = 0
        self._more = True
        self._due: float | None = None
        # For the step that is on its way; what the reader itself takes its time for does not count.
        self._waited_s = 0.0

    async def receive(self) -> Message:
        if not self._more:  # nobody is slow who has sent everything; what comes now is the end of the connection
            return await self._receive()
        self._check(self._declared)
        message = await self._in_time()
        self._read += len(message.get("body", b""))
        self._more = message.get("more_body", False)
        if self._read >= self._step + _STEP:
            self._step, self._waited_s = self._read, 0.0
        self._check(self._read)
        return message

    async def _in_time(self) -> Message:
        clock = asyncio.get_running_loop().time
        began = clock()
        self._due = self._due or began + self._pace.whole_s
        try:
            async with asyncio.timeout_at(min(self._due, began + self._pace.stall_s - self._waited_s)):
                return await self._receive()
        except TimeoutError:
            raise self._pace.too_slow() from None
        finally:
            self._waited_s += clock() - began

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise TooLarge("body_too_large", f"The request body is larger than {self._limit} bytes.")
