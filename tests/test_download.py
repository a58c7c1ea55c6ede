"""Files that are made while they are sent: whole ones end, broken ones do not."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from app.download import Download
from app.errors import NotFound, Unavailable


class _Reader:
    """What a server sends, as far as it is taken."""

    def __init__(self, *, takes: int = 99, stays: bool = True) -> None:
        self.got: list[dict[str, Any]] = []
        self._takes, self._stays = takes, stays

    async def receive(self) -> dict[str, Any]:
        if self._stays:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if len(self.got) > self._takes:
            await asyncio.Event().wait()
        self.got.append(message)

    async def read(self, parts: AsyncGenerator[bytes, None], method: str = "GET") -> bytes | None:
        """The whole file; None where it has no end."""
        scope = {"type": "http", "method": method, "headers": []}
        await Download(parts, name="a.json", media_type="application/json", send_timeout_s=0.05)(
            scope, self.receive, self.send
        )
        bodies = self.got[1:]
        return b"".join(one["body"] for one in bodies) if bodies and not bodies[-1].get("more_body") else None


class _File:
    def __init__(self, *parts: bytes | Exception) -> None:
        self._parts = parts
        self.closed = False

    async def parts(self) -> AsyncGenerator[bytes, None]:
        try:
            for part in self._parts:
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed = True


_BROKEN = Unavailable("overloaded", "Too slow.")


async def test_a_file_is_sent_whole_or_has_no_end() -> None:
    for file, reader, wanted in (
        (_File(b"a", b"", b"b"), _Reader(), b"ab"),
        (_File(b"a", _BROKEN), _Reader(), None),
        (_File(b"a", b"b"), _Reader(takes=1), None),
        (_File(b"a", b"b"), _Reader(stays=False), None),
    ):
        assert await reader.read(file.parts()) == wanted
        assert file.closed
        assert reader.got[0]["status"] == 200
    file = _File(b"a", b"b")
    assert await _Reader().read(file.parts(), "HEAD") == b""
    assert file.closed


async def test_what_goes_wrong_before_the_first_piece_is_a_failure_like_any() -> None:
    reader = _Reader()
    with pytest.raises(NotFound):
        await reader.read(_File(NotFound("chat_unknown", "None.")).parts())
    assert reader.got == []
