"""GET /api/messages/conversations/events: server-sent events that say which conversations have changed."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypedDict

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import require_readable
from app.conversations.news import News, Told
from app.conversations.parameters import whose
from app.settings import Settings
from app.streams.seats import Seats
from app.streams.sse import HEARTBEAT, EventStream, come_back_later, retry_line
from app.telemetry import Metrics


class Needs(TypedDict):
    news: News
    seats: Seats
    metrics: Metrics
    settings: Settings


class ChangedConversation(BaseModel):
    """A conversation that has changed, by what names it in a list."""

    conversationId: str
    source: str
    username: str


class ConversationsChanged(BaseModel):
    """The data of `changed`. `all`: anything may have changed, and none is named."""

    all: bool
    conversations: list[ChangedConversation]


async def conversation_events(request: Request[Needs]) -> Response:
    """Follow changes of the list. What cannot be had now is 200 and a time to come back (G14)."""
    settings = request.state["settings"]
    username, left_s = whose(request), require_readable(request, [])
    if request.state["news"].closing or request.state["seats"].full:
        return come_back_later(settings.sse_retry_ms)
    return EventStream(
        _frames(request, username, min(settings.sse_max_age_s, left_s)),
        heartbeat_s=settings.sse_heartbeat_s,
        send_timeout_s=settings.sse_send_timeout_s,
    )


async def _frames(request: Request[Needs], username: str | None, max_age_s: float) -> AsyncGenerator[bytes, None]:
    settings, metrics = request.state["settings"], request.state["metrics"]
    opening = retry_line(settings.sse_retry_ms)
    with request.state["seats"].taken([], [username] if username else []) as seated:
        if not seated:
            yield opening
            return
        yield HEARTBEAT
        with metrics.readers.track_inprogress():
            async with aclosing(request.state["news"].follow(username, max_age_s=max_age_s)) as news:
                async for told in news:
                    yield opening + _frame(told)
                    opening = b""
    yield retry_line(settings.sse_retry_ms)


def _frame(told: Told) -> bytes:
    named = [{"conversationId": one.id, "source": one.source, "username": one.username} for one in told.conversations]
    return b"event: changed\ndata: %s\n\n" % orjson.dumps({"all": told.is_all, "conversations": named})
