"""A file that is made while it is sent: what goes wrong before its first piece is answered as any failure is."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import asyncpg
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.errors import ParleyError
from app.postgres import AWAY

log = structlog.get_logger(__name__)


class Download(Response):
    """Sends pieces as they come, one at a time in memory, and gives up on a reader that left or takes nothing.

    `parts` is closed whatever ends the response. A file that cannot be finished ends with the connection, so that
    nobody takes it for a whole one.
    """

    def __init__(
        self, parts: AsyncGenerator[bytes, None], *, name: str, media_type: str, send_timeout_s: float
    ) -> None:
        headers = {"Cache-Control": "no-store", "Content-Disposition": f'attachment; filename="{name}"'}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._parts = parts
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._parts):
            first = await anext(self._parts)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            try:
                await self._rest(first, Request(scope, receive), send)
            except (ParleyError, asyncpg.PostgresError, *AWAY) as error:
                log.warning("download_broken", error=type(error).__name__)

    async def _rest(self, part: bytes, request: Request, send: Send) -> None:
        await self._send(part, send)
        async for part in self._parts:
            if await request.is_disconnected():
                return
            if part:
                await self._send(part, send)
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, part: bytes, send: Send) -> None:
        async with asyncio.timeout(self._send_timeout_s):
            await send({"type": "http.response.body", "body": part, "more_body": True})
