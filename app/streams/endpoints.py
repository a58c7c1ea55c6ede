"""GET /api/stream-events/{id}: one URL for pollers (JSON, long poll) and EventSource (SSE), by Accept."""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal, TypedDict
from uuid import UUID

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.errors import BadRequest, Gone
from app.postgres import AWAY
from app.settings import Settings
from app.streams.event import TERMINAL, data_of, kind_of, to_object
from app.streams.hub import Batch, Hub
from app.streams.identity import stream_id_of
from app.streams.sse import HEARTBEAT, EventStream, come_back_later, retry_line
from app.streams.tail import State, Tail
from app.telemetry import Metrics

_MOST_EVENTS, _DEFAULT_EVENTS = 5000, 500
_LONGEST_WAIT_S = 30.0
_CURSOR_NAMES = ("after", "last_event_id", "starting_after")
_NUMBER = re.compile(r"[0-9]{1,10}")


class Needs(TypedDict):
    tail: Tail
    hub: Hub
    metrics: Metrics
    settings: Settings


class Event(BaseModel):
    """One event; `data` depends on its kind."""

    id: int
    event: str
    data: dict[str, object]
    timestamp: str


class Page(BaseModel):
    """Events after the cursor. `has_more` is false exactly when the stream has ended and nothing follows."""

    events: list[Event]
    session_status: Literal["queued", "active", "completed", "failed", "cancelled"]
    last_event_id: int
    has_more: bool


async def stream_events(request: Request[Needs]) -> Response:
    """Read a stream from any position, as a page of JSON or as server-sent events."""
    stream_id = stream_id_of(request.path_params["stream_id"])
    cursor = _cursor(request, stream_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        return await _sse(request, stream_id, cursor)
    return await _page(request, stream_id, cursor)


def _cursor(request: Request[Needs], stream_id: UUID) -> int:
    """The last id the reader has: the header wins over the query (an EventSource repeats its URL when it resumes)."""
    if header := request.headers.get("last-event-id"):
        prefix, _, number = header.rpartition(":")
        if prefix and prefix.lower() != str(stream_id):
            raise BadRequest("bad_cursor", "Last-Event-ID belongs to another stream.")
        return _whole(number, "Last-Event-ID")
    for name in _CURSOR_NAMES:
        if (given := request.query_params.get(name)) is not None:
            prefix, _, number = given.rpartition(":")
            if prefix and prefix.lower() != str(stream_id):
                raise BadRequest("bad_cursor", f"{name} belongs to another stream.")
            return _whole(number, name)
    return 0


def _whole(text: str, name: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise BadRequest("bad_cursor", f"{name} must be the whole number of the last event read, 0 for none.")
    return int(text)


# -- a page of JSON


async def _page(request: Request[Needs], stream_id: UUID, cursor: int) -> Response:
    tail = request.state["tail"]
    limit = int(_bounded(request, "limit", _DEFAULT_EVENTS, low=1, high=_MOST_EVENTS))
    wait_s = _bounded(request, "wait", 0, low=0, high=_LONGEST_WAIT_S)
    state = await tail.state(stream_id, cursor)
    if not state.ended:
        request.state["hub"].polled(stream_id)
    payloads = await tail.read_known(stream_id, cursor, limit, state)
    if not payloads and not state.ended and wait_s and request.method != "HEAD":
        payloads = (await tail.wait(stream_id, cursor, wait_s))[:limit]
    request.state["metrics"].events_delivered += len(payloads)
    return _page_response(request, cursor, payloads, state, f"{cursor}-{limit}")


def _bounded(request: Request[Needs], name: str, default: float, *, low: float, high: float) -> float:
    """A number from the query, brought within its bounds. Raises BadRequest for what is no number."""
    given = request.query_params.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        raise BadRequest("bad_parameter", f"{name} must be a number from {low:g} to {high:g}.") from None
    return min(max(value, low), high) if value == value else default  # NaN is not itself


def _page_response(request: Request[Needs], cursor: int, payloads: list[str], state: State, page: str) -> Response:
    last = cursor + len(payloads)
    status, ended, end = state.status, state.ended, state.tail
    if payloads and kind_of(payloads[-1]) == TERMINAL:
        status, ended, end = data_of(payloads[-1])["status"], True, last
    headers = {"Vary": "Accept, Last-Event-ID", "Cache-Control": "no-store"}
    if ended:
        etag = f'"{end}-{page}"'
        headers |= {"ETag": etag, "Cache-Control": "private, max-age=3600"}
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
    events = ",".join(to_object(event_id, payload) for event_id, payload in enumerate(payloads, cursor + 1))
    more = "false" if ended and last >= end else "true"
    body = f'{{"events":[{events}],"session_status":"{status}","last_event_id":{last},"has_more":{more}}}'
    return Response(body, media_type="application/json", headers=headers)


# -- server-sent events


async def _sse(request: Request[Needs], stream_id: UUID, cursor: int) -> Response:
    settings, hub = request.state["settings"], request.state["hub"]
    if hub.closing or hub.readers >= settings.max_readers:
        return come_back_later(settings.sse_retry_ms)
    try:
        state = await request.state["tail"].state(stream_id, cursor)
        if state.ended and cursor == state.tail:
            return Response(status_code=204)
        if state.ended:  # only then may its events have been cleaned up
            await request.state["tail"].read_known(stream_id, cursor, 1, state)
    except AWAY:
        return come_back_later(settings.sse_retry_ms)
    return EventStream(
        _frames(request, stream_id, cursor, at_once=cursor < state.tail),
        heartbeat_s=settings.sse_heartbeat_s,
        send_timeout_s=settings.sse_send_timeout_s,
    )


async def _frames(
    request: Request[Needs], stream_id: UUID, cursor: int, *, at_once: bool
) -> AsyncGenerator[bytes, None]:
    settings, metrics = request.state["settings"], request.state["metrics"]
    if not at_once:
        yield HEARTBEAT
    opening = retry_line(settings.sse_retry_ms)
    with metrics.readers.track_inprogress():
        async with aclosing(request.state["tail"].follow(stream_id, cursor, settings.sse_max_age_s)) as batches:
            try:
                async for batch in batches:
                    _count(metrics, cursor, batch)
                    cursor = batch.last
                    yield opening + batch.frames
                    opening = b""
            except Gone:
                # Cleaned up under the reader; the reconnect is told with 410.
                return
    if request.state["hub"].closing:
        yield retry_line(settings.sse_retry_ms)


def _count(metrics: Metrics, cursor: int, batch: Batch) -> None:
    """Count what is handed over, and check once more, apart from the tail, that it follows on the cursor."""
    metrics.events_delivered += batch.last - batch.first + 1
    if batch.first > cursor + 1:
        metrics.events_lost += batch.first - cursor - 1
    elif batch.first <= cursor:
        metrics.events_doubled += cursor - batch.first + 1
