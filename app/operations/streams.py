"""What the routes of streams take and answer."""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import orjson

from app.flows.endpoints import (
    Cancel,
    CancelAnswer,
)
from app.openapi import Answer, Content, Operation, Parameter
from app.streams.endpoints import Page
from app.streams.event import to_frames, to_object, with_more_in_id

STREAM = "0197c1a2-7b3c-7def-8a01-23456789abcd"
_JSON = "application/json"
URL = f"/api/stream-events/{STREAM}?token=abJzwmlRU2ABl8Gimntzew3vigEjRWeJq83vRhUUvsXBLx5Qv4iCXG00"
_HELLO = '{"event":"token","data":{"token":"Hello","markers":{},"flow":"main"},"timestamp":"2024-01-01T12:00:00.000Z"}'
_END = (
    '{"event":"stream_end","data":{"status":"completed","usage":{"prompt_tokens":4,"completion_tokens":1}},'
    '"timestamp":"2024-01-01T12:00:01.000Z"}'
)

_FRAMES = "retry: 1200\n" + to_frames(UUID(STREAM), 2, [_HELLO, _END]).decode()
_PAGE: dict[str, Any] = {
    "events": [orjson.loads(to_object(2, _HELLO))],
    "session_status": "active",
    "last_event_id": 2,
    "has_more": True,
}


def _number(default: float) -> dict[str, Any]:
    return {"type": "number", "default": default}


_TOKEN = Parameter(
    "token",
    "query",
    "What `streaming_url` ends with where the server asks for credentials: enough to read this one stream for a time, "
    "without headers. Of several streams: all tokens, with a comma between two.",
    {"type": "string"},
)

_CURSOR = {"type": "string", "pattern": "^([0-9a-fA-F-]{36}:)?[0-9]{1,10}$"}
_OWNER = Parameter(
    "user_id",
    "query",
    "Whose stream it must be: another user's is as unknown as one that does not exist. Without it, of whoever acts for "
    "any user, anybody's.",
    {"type": "string", "minLength": 1},
)

# Frames: not one of OpenAPI 3.1's types, and readers of the document differ about what it would describe.
_ANY: dict[str, Any] = {}


def _or_empty(schema: dict[str, Any]) -> dict[str, Any]:
    """A header that says nothing is as none."""
    return {**schema, "pattern": f"^$|{schema['pattern']}"}


_STREAM_EVENTS = Operation(
    "Read a stream",
    "One URL for both kinds of readers: a page of JSON by default, server-sent events where `Accept` names "
    "`text/event-stream`. Events have the ids 1, 2, 3 … without a gap, and any position can be read again.\n\n"
    "A cursor is the id of the last event the reader has; `Last-Event-ID` wins over the query, and `after`, "
    "`last_event_id` and `starting_after` mean the same. As SSE, a frame is `id: STREAM:ID`, `event: KIND`, and the "
    "event object as `data:` in one line; a comment comes every 15 seconds; the server closes after `stream_end` and "
    "after ten minutes at a frame boundary. A reader that cannot be served now gets 200, a `retry:` line and the "
    "close, because browsers give up for ever on a 503.\n\n"
    "Kinds: `stream_start`, `flow_selected`, `flow_start`, `token`, `flow_output`, `flow_end`, `flow_error`, "
    "`flow_restart` (clear this flow's text), `message` (the answer is saved), `gap`, and last `stream_end`.",
    answers={
        200: Answer(
            "Events after the cursor.",
            {
                _JSON: Content(_PAGE, Page),
                "text/event-stream": Content(_FRAMES, schema=_ANY),
            },
            headers=["ETag", "Cache-Control", "Vary", "Retry-After"],
        ),
        204: Answer("SSE only: the stream has ended and the reader has its last event. EventSource stops."),
        304: Answer("JSON only: If-None-Match names the page's ETag.", headers=["ETag"]),
    },
    parameters=[
        Parameter("stream_id", "path", "The `streaming_session_id`.", {"type": "string", "format": "uuid"}),
        _TOKEN,
        Parameter("Last-Event-ID", "header", "The cursor: a number, or the `id:` of a frame.", _or_empty(_CURSOR)),
        Parameter("after", "query", "The cursor; 0, the default, is the beginning.", _CURSOR),
        Parameter("last_event_id", "query", "Means `after`.", _CURSOR),
        Parameter("starting_after", "query", "Means `after`.", _CURSOR),
        Parameter("limit", "query", "JSON only: most events in the page; at most 5,000.", _number(500)),
        Parameter(
            "wait",
            "query",
            "JSON only: wait so many seconds for the next event; at most 30. With too many readers it does not wait "
            "and says `Retry-After`.",
            _number(0),
        ),
        Parameter("If-None-Match", "header", "JSON only: the ETag of a page that the reader has."),
        _OWNER,
    ],
    problems={
        400: ["bad_cursor", "cursor_beyond_end", "bad_parameter"],
        404: ["stream_unknown"],
        410: ["stream_cleaned"],
        422: ["invalid_request"],
        503: ["starting", "database_unavailable"],
    },
)

_OTHER = "0197c1a2-8c4d-7abc-9b12-3456789abcde"
_PAIRS = {"type": "string", "pattern": "^[0-9a-fA-F-]{36}(:[0-9]{1,10})?(,[0-9a-fA-F-]{36}(:[0-9]{1,10})?)*$"}

_STREAMS = Operation(
    "Read several streams",
    "Server-sent events of up to 20 streams (unless the server is configured otherwise) over one connection, so that a "
    "page with many tabs does not run out of them. Each stream's events come once and in order; between streams there "
    "is no order, and none holds up the others. Everything else is as for one stream.\n\n"
    "A frame's `id:` is `STREAM:ID` of its event, followed by `,STREAM:ID` for each other stream of which anything was "
    "read. Sent back as `Last-Event-ID`, which EventSource does by itself, it resumes all of them exactly. The server "
    "closes when all of them have ended.",
    answers={
        200: Answer(
            "Events after the cursors.",
            {"text/event-stream": Content(with_more_in_id(_FRAMES.encode(), f",{_OTHER}:7").decode(), schema=_ANY)},
            headers=["Cache-Control"],
        ),
        204: Answer("All streams have ended and the reader has their last events. EventSource stops."),
    },
    parameters=[
        Parameter(
            "streams",
            "query",
            "The streams, each with the id of the last event read of it where there is one.",
            _PAIRS,
            required=True,
        ),
        _TOKEN,
        Parameter("Last-Event-ID", "header", "The `id:` of the last frame; it wins over the query.", _or_empty(_PAIRS)),
        _OWNER,
    ],
    problems={
        400: ["bad_streams", "bad_cursor", "cursor_beyond_end"],
        404: ["stream_unknown"],
        410: ["stream_cleaned"],
        422: ["invalid_request"],
    },
)

_CANCEL = Operation(
    "Stop an answer",
    "The provider's connection is closed, what was said so far is kept, and the stream ends as `cancelled`. May be "
    "asked of any replica and any number of times: what has ended stays as it is. Where another replica runs the "
    "answer and does not confirm within two seconds, `session_status` is still `active` and `upstream_closed` false; "
    "the order stands. With `flow` only that flow is stopped. The body may be left out.",
    answers={
        200: Answer(
            "Stopped, or had ended.",
            {
                _JSON: Content(
                    {
                        "success": True,
                        "session_status": "cancelled",
                        "upstream_closed": True,
                        "upstream_close_ms": 12,
                        "last_event_id": 17,
                    },
                    CancelAnswer,
                )
            },
        )
    },
    parameters=[
        Parameter("stream_id", "path", "The `streaming_session_id`.", {"type": "string", "format": "uuid"}),
        _OWNER,
    ],
    body=Content({"flow": None}, Cancel),
    problems={
        400: ["invalid_json"],
        404: ["stream_unknown"],
        408: ["body_too_slow"],
        413: ["body_too_large"],
        422: ["invalid_request"],
        503: ["database_unavailable"],
    },
)

STREAMS: Mapping[tuple[str, str], Operation] = {
    ("GET", "/api/stream-events/{stream_id}"): _STREAM_EVENTS,
    ("GET", "/api/stream"): _STREAMS,
    ("POST", "/api/stream-events/{stream_id}/cancel"): _CANCEL,
}
