"""GET /api/stream-events/{id}: one URL for pollers (JSON, long poll) and EventSource (SSE), by Accept.

GET /api/stream: several streams for one EventSource."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Literal, TypedDict
from uuid import UUID

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from app.access.guard import owner_of, require_readable
from app.errors import BadRequest, Gone, NotFound, Unavailable
from app.postgres import AWAY, CONFLICT
from app.settings import Settings
from app.streams.cursors import cursor_of, cursors_of
from app.streams.event import TERMINAL, data_of, kind_of, to_object
from app.streams.hub import Batch, Hub
from app.streams.identity import stream_id_of
from app.streams.multiplex import follow_all
from app.streams.replicas import Replica
from app.streams.seats import Seats
from app.streams.sse import HEARTBEAT, EventStream, come_back_later, retry_line
from app.streams.tail import State, Tail
from app.telemetry import Metrics

_MOST_EVENTS, _DEFAULT_EVENTS = 5000, 500
_LONGEST_WAIT_S = 30.0
# How long a reader waits for the database to say where its streams stand.
_LOOK_S = 3.0


class Needs(TypedDict):
    tail: Tail
    hub: Hub
    seats: Seats
    replica: Replica
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
    left_s = require_readable(request, [stream_id])
    cursor = cursor_of(request.headers, request.query_params, stream_id)
    if "text/event-stream" in request.headers.get("accept", ""):
        return await _sse(request, {stream_id: cursor}, left_s)
    return await _page(request, stream_id, cursor, left_s)


async def several_streams(request: Request[Needs]) -> Response:
    """Read several streams from any positions over one connection, as server-sent events."""
    most = request.state["settings"].reader_streams
    cursors = cursors_of(request.headers, request.query_params, most=most)
    return await _sse(request, cursors, require_readable(request, cursors))


# -- a page of JSON


async def _page(request: Request[Needs], stream_id: UUID, cursor: int, left_s: float) -> Response:
    tail = request.state["tail"]
    limit = int(_bounded(request, "limit", _DEFAULT_EVENTS, low=1, high=_MOST_EVENTS))
    wait_s = min(left_s, _bounded(request, "wait", 0, low=0, high=_LONGEST_WAIT_S))
    _require_started(request)
    async with asyncio.timeout(_LOOK_S):
        state = await tail.state(stream_id, cursor, owner=owner_of(request))
        if not state.ended:
            request.state["hub"].polled(stream_id)
        payloads = await tail.read_known(stream_id, cursor, limit, state)
    crowded = False
    if not payloads and not state.ended and wait_s and request.method != "HEAD":
        with request.state["seats"].taken([stream_id], _users(state)) as seated:
            crowded = not seated
            payloads = (await tail.wait(stream_id, cursor, wait_s))[:limit] if seated else []
    request.state["metrics"].events_delivered += len(payloads)
    response = _page_response(request, cursor, payloads, state, f"{cursor}-{limit}")
    if crowded:
        response.headers["Retry-After"] = "1"
    return response


def _require_started(request: Request[Needs]) -> None:
    """Raises Unavailable while nothing can be read yet. A server that drains is read from to its last moment."""
    refusal = request.state["replica"].refusal
    if refusal is not None and refusal.code == "starting":
        raise refusal


def _users(*states: State) -> set[str]:
    return {state.user_id for state in states if state.user_id is not None}


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
    headers = {"Vary": "Accept, Authorization, Last-Event-ID, X-API-Key", "Cache-Control": "no-store"}
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


async def _sse(request: Request[Needs], cursors: Mapping[UUID, int], left_s: float) -> Response:
    """A connection that follows one stream or several. What cannot be had now is 200 and a time to come back (G14)."""
    settings, tail = request.state["settings"], request.state["tail"]
    if request.state["hub"].closing or request.state["seats"].full:
        return come_back_later(settings.sse_retry_ms)
    try:
        _require_started(request)
        async with asyncio.timeout(_LOOK_S):
            states = await tail.states(cursors, owner=owner_of(request))
            tail.require_kept(states)
    except (Unavailable, *AWAY, *CONFLICT):
        return come_back_later(settings.sse_retry_ms)
    if all(states[stream_id].ended_at(cursor) for stream_id, cursor in cursors.items()):
        return Response(status_code=204)
    return EventStream(
        _frames(request, cursors, states, min(settings.sse_max_age_s, left_s)),
        heartbeat_s=settings.sse_heartbeat_s,
        send_timeout_s=settings.sse_send_timeout_s,
    )


async def _frames(
    request: Request[Needs], cursors: Mapping[UUID, int], states: Mapping[UUID, State], max_age_s: float
) -> AsyncGenerator[bytes, None]:
    """What one connection is sent. It holds a seat for as long as it runs, and runs only while somebody reads."""
    settings, metrics = request.state["settings"], request.state["metrics"]
    opening, last = retry_line(settings.sse_retry_ms), dict(cursors)
    ended = {stream_id for stream_id, cursor in cursors.items() if states[stream_id].ended_at(cursor)}
    with request.state["seats"].taken(cursors, _users(*states.values())) as seated:
        if not seated:
            yield opening
            return
        if all(cursor == states[stream_id].tail for stream_id, cursor in cursors.items()):
            yield HEARTBEAT
        # What is cleaned up under the reader is told by the 410 of the reconnect.
        with metrics.readers.track_inprogress(), suppress(Gone, NotFound):
            following = follow_all(request.state["tail"], cursors, max_age_s, ended=ended)
            async with aclosing(following) as batches:
                async for batch in batches:
                    _count(metrics, last, batch)
                    if batch.frames:
                        yield opening + batch.frames
                        opening = b""
    # Also to a reader that was never told, as nothing came before its time was over.
    if request.state["hub"].closing or opening:
        yield retry_line(settings.sse_retry_ms)


def _count(metrics: Metrics, last: dict[UUID, int], batch: Batch) -> None:
    """Count what is handed over, and check once more, apart from the tail, that it follows on the cursor."""
    cursor = last[batch.stream_id]
    last[batch.stream_id] = batch.last
    metrics.events_delivered += batch.last - batch.first + 1
    if batch.first > cursor + 1:
        metrics.events_lost += batch.first - cursor - 1
    elif batch.first <= cursor:
        metrics.events_doubled += cursor - batch.first + 1
