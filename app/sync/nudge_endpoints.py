"""GET /api/chat/sync/events: server-sent events that say when there is something to pull."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TypedDict

from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import owner_of, require_readable
from app.settings import Settings
from app.streams.seats import Seats
from app.streams.sse import HEARTBEAT, EventStream, come_back_later, retry_line
from app.sync import cursor
from app.sync.endpoints import Id, require_enabled, require_named
from app.sync.nudges import Nudges
from app.telemetry import Metrics
from app.text import validated

# Whoever was replaced and does not know what that means comes back no sooner than this, in milliseconds.
_REPLACED_MS = 30_000


class Needs(TypedDict):
    nudges: Nudges
    seats: Seats
    metrics: Metrics
    settings: Settings


class _Follow(BaseModel):
    """Who follows, and up to where it has pulled."""

    client: Id = ""
    cursor: str | None = Field(default=None, max_length=128)


async def sync_events(request: Request[Needs]) -> Response:
    """Follow the changes of a user's chats. What cannot be had now is 200 and a time to come back (G14)."""
    settings = request.state["settings"]
    require_enabled(settings)
    user_id, left_s = require_named(owner_of(request)), require_readable(request, [])
    names = ("client", "cursor")
    asked = validated(_Follow, {name: request.query_params[name] for name in names if name in request.query_params})
    # EventSource repeats its URL when it resumes, so the header is the newer one.
    seen = request.headers.get("Last-Event-ID") or asked.cursor or None
    if seen is not None:
        seen = str(replace(cursor.read(seen), failed=False))
    if request.state["nudges"].closing or request.state["seats"].full:
        return come_back_later(settings.sse_retry_ms)
    return EventStream(
        _frames(request, user_id, asked.client, seen, min(settings.sse_max_age_s, left_s)),
        heartbeat_s=settings.sse_heartbeat_s,
        send_timeout_s=settings.sse_send_timeout_s,
    )


async def _frames(
    request: Request[Needs], user_id: str, client: str, seen: str | None, max_age_s: float
) -> AsyncGenerator[bytes, None]:
    settings, metrics = request.state["settings"], request.state["metrics"]
    opening = retry_line(settings.sse_retry_ms)
    with request.state["seats"].taken([], [user_id]) as seated:
        if not seated:
            yield opening
            return
        yield HEARTBEAT
        following = request.state["nudges"].follow(user_id, client=client, seen=seen, max_age_s=max_age_s)
        with metrics.readers.track_inprogress():
            async with aclosing(following) as nudges:
                async for reached in nudges:
                    if reached is None:
                        yield retry_line(_REPLACED_MS) + b"event: replaced\ndata: {}\n\n"
                        return
                    metrics.nudges.inc()
                    yield opening + _frame(reached)
                    opening = b""
    yield retry_line(settings.sse_retry_ms)


def _frame(reached: str) -> bytes:
    return f'id: {reached}\nevent: changed\ndata: {{"cursor":"{reached}"}}\n\n'.encode()
