"""The index as a whole over HTTP: make, fill, empty, rebuild and look at it. Long work tells how far it is over SSE."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, TypedDict

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.audit import Actor
from app.access.guard import principal_of
from app.answers import private_json, time_of
from app.conversations import upkeep
from app.conversations.message_words import Status
from app.conversations.parameters import whose
from app.conversations.upkeep import Discover, Progress, Stats, Synced, Tell
from app.errors import ParleyError, to_problem
from app.postgres import Connection, Pool
from app.settings import Settings
from app.streams.sse import EventStream
from app.telemetry import request_id
from app.wall import Wall

# Progress is told at most so often, in seconds.
_TOLD_S = 0.5

Json = Mapping[str, Any]
Work = Callable[[Connection, Tell], Awaitable[Json]]


class Needs(TypedDict):
    settings: Settings
    pool: Pool
    wall: Wall
    discover: Discover


class IndexMade(BaseModel):
    """`created` is false where there was an index."""

    created: bool
    message: str


class IndexDeleted(BaseModel):
    """`deleted` is false where there was none."""

    deleted: bool
    message: str


class NotIndexed(BaseModel):
    source: str
    id: str
    reason: str


class SyncResult(BaseModel):
    """`conversationsIndexed` are those of which the index said something else before. `failed` names at most 100."""

    success: bool
    syncStartTime: str
    syncEndTime: str
    durationSeconds: float
    messagesProcessed: int
    conversationsFound: int
    conversationsIndexed: int
    skipped: int
    failed: list[NotIndexed]
    failures: int


class MessageSearch(BaseModel):
    """How far all messages can be searched: `usersReady` of so many have words of all that was there before. `size` in
    bytes."""

    enabled: bool
    complete: bool
    users: int
    usersReady: int
    size: int


class IndexStats(BaseModel):
    """`documentCount` counts entries, which are conversations. `indexSize` in bytes, with everything that belongs to
    the table; of one user it is what the user's own rows take, as all of it is about the user's own. `messageSearch`
    is of everybody only."""

    indexExists: bool
    conversationCount: int
    documentCount: int
    indexSize: int
    schemaVersion: int
    lastSyncTime: str | None
    sources: dict[str, int]
    messageSearch: MessageSearch | None


class IndexReset(BaseModel):
    message: str
    stats: IndexStats


async def init(request: Request[Needs]) -> Response:
    """Have an index."""
    async with request.state["pool"].acquire() as connection:
        created = await upkeep.init(connection)
    message = "The index is there; POST /api/sync/sync fills it." if created else "There was an index already."
    return private_json({"created": created, "message": message})


async def delete(request: Request[Needs]) -> Response:
    """Empty it."""
    async with upkeep.alone(_dsn(request)) as connection:
        deleted = await upkeep.delete(connection, _actor(request))
    message = "The index was deleted." if deleted else "There was no index."
    return private_json({"deleted": deleted, "message": f"{message} POST /api/sync/init makes it anew."})


async def stats(request: Request[Needs]) -> Response:
    """What is in it: of everybody, or of one user."""
    username = whose(request)
    async with request.state["wall"].connection() as connection:
        found = await upkeep.stats(connection, username)
    return private_json(_stats(found))


async def sync(request: Request[Needs]) -> Response:
    """Fill it."""

    async def work(connection: Connection, tell: Tell) -> Json:
        return _synced(await upkeep.sync(connection, tell, discover=request.state["discover"]))

    return await _answer(request, work)


async def reset(request: Request[Needs]) -> Response:
    """Build it anew."""
    actor = _actor(request)

    async def work(connection: Connection, tell: Tell) -> Json:
        found = await upkeep.reset(connection, actor, tell)
        return {"message": "The index was built anew.", "stats": _stats(found)}

    return await _answer(request, work)


async def _answer(request: Request[Needs], work: Work) -> Response:
    """The result at the end, or as the last frame behind those that say how far it is."""
    if "text/event-stream" not in request.headers.get("accept", ""):
        async with upkeep.alone(_dsn(request)) as connection:
            return private_json(await work(connection, lambda _: None))
    async with request.state["pool"].acquire() as connection:
        await upkeep.require_free(connection)
    settings = request.state["settings"]
    return EventStream(
        _frames(_dsn(request), work, request_id(request.scope) or ""),
        heartbeat_s=settings.sse_heartbeat_s,
        send_timeout_s=settings.sse_send_timeout_s,
    )


async def _frames(dsn: str, work: Work, error_id: str) -> AsyncGenerator[bytes, None]:
    """`progress`, and at the end `result` or `failed`. Whoever leaves ends the work, too."""
    news, last = asyncio.Event(), Progress("begin", 0, 0)

    def tell(progress: Progress) -> None:
        nonlocal last
        last = progress
        news.set()

    async def run() -> bytes:
        try:
            async with upkeep.alone(dsn) as connection:
                return _frame("result", await work(connection, tell))
        except ParleyError as error:
            return _frame("failed", to_problem(error, error_id))

    yield _frame("progress", asdict(last))
    running = asyncio.ensure_future(run())
    try:
        while not running.done():
            await asyncio.wait([running], timeout=_TOLD_S)
            if news.is_set() and not running.done():
                news.clear()
                yield _frame("progress", asdict(last))
        yield running.result()
    finally:
        running.cancel()
        await asyncio.wait([running])


def _frame(event: str, data: Json) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event.encode(), orjson.dumps(data))


def _synced(done: Synced) -> Json:
    return {
        "success": not done.failures,
        "syncStartTime": time_of(done.began),
        "syncEndTime": time_of(done.ended),
        "durationSeconds": round((done.ended - done.began).total_seconds(), 3),
        "messagesProcessed": done.messages,
        "conversationsFound": done.found,
        "conversationsIndexed": done.indexed,
        "skipped": done.skipped,
        "failed": [asdict(failed) for failed in done.failed],
        "failures": done.failures,
    }


def _stats(found: Stats) -> Json:
    return {
        "indexExists": found.exists,
        "conversationCount": found.conversations,
        "documentCount": found.conversations,
        "indexSize": found.size,
        "schemaVersion": found.version,
        "lastSyncTime": found.synced_at and time_of(found.synced_at),
        "sources": found.sources,
        "messageSearch": found.messages and _searched(found.messages),
    }


def _searched(status: Status) -> Json:
    return {
        "enabled": status.is_on,
        "complete": status.is_complete,
        "users": status.users,
        "usersReady": status.filled,
        "size": status.size,
    }


def _actor(request: Request[Needs]) -> Actor:
    return Actor(principal_of(request).id, request_id(request.scope))


def _dsn(request: Request[Needs]) -> str:
    dsn = request.state["settings"].database_url
    assert dsn is not None
    return dsn
