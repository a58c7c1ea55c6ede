"""What every route takes and answers, as /openapi.json tells it: one entry per method and path of the route table."""

from collections.abc import Mapping
from typing import Any, Literal
from uuid import UUID

import orjson
from pydantic import BaseModel

from app.chat_operations import CHAT_OPERATIONS
from app.chats.endpoints import UploadAnswer, UploadImage
from app.conversations.discovery_endpoints import ConversationComplete, ConversationCompleteAnswer, DiscoveryStatus
from app.flows.configuration import ConfigurationAnswer, ReplaceAnswer, ReplaceConfiguration
from app.flows.endpoints import (
    Cancel,
    CancelAnswer,
    EditMessage,
    ProcessAnswer,
    ProcessMessage,
    Queue,
    QueueAnswer,
)
from app.index_operations import INDEX_OPERATIONS
from app.openapi import Answer, Content, Operation, Parameter
from app.streams.endpoints import Page
from app.streams.event import to_frames, to_object, with_more_in_id
from app.sync_operations import SYNC_OPERATIONS

_STREAM = "0197c1a2-7b3c-7def-8a01-23456789abcd"
_JSON = "application/json"
_URL = f"/api/stream-events/{_STREAM}?token=abJzwmlRU2ABl8Gimntzew3vigEjRWeJq83vRhUUvsXBLx5Qv4iCXG00"


class ConversationHealth(BaseModel):
    """How this replica is. `active_streams` are the answers under way on it."""

    status: Literal["healthy", "degraded", "unhealthy"]
    database: Literal["connected", "disconnected"]
    active_streams: int
    timestamp: str


class Liveness(BaseModel):
    """The process runs."""

    status: Literal["alive"]


class Readiness(BaseModel):
    """Whether new work may be sent here; all but `status` only with `?verbose`."""

    status: Literal["ready", "not ready"]
    database: Literal["connected", "disconnected"] | None = None
    refusal: str | None = None
    failing: list[str] | None = None
    bus: dict[str, object] | None = None
    replica: str | None = None
    version: str | None = None


HEADERS: Mapping[str, str] = {
    "Content-Disposition": "The file's name.",
    "X-Request-Id": "The id of this request: the given one if it is 1 to 64 letters, digits, `.`, `_` or `-`.",
    "Retry-After": "Seconds after which another try makes sense.",
    "Idempotent-Replayed": "`true` where this repeats the answer to an earlier request with the same key.",
    "ETag": "Of a chatbot, and of a stream that has ended; send it back as If-None-Match.",
    "Cache-Control": "`private, max-age=3600` for a stream that has ended, `private, no-cache` for a chatbot, "
    "otherwise `no-store`; SSE is never cached.",
    "Vary": "What changes the answer: `Accept`, `Last-Event-ID`, and who asks.",
    "RateLimit": "Of the tightest of the limits that the request counted for: how often more now (`r`), and in how "
    "many seconds all of it, or, where this was one too many, the next (`t`); draft-ietf-httpapi-ratelimit-headers-10.",
    "RateLimit-Policy": "That limit: how often (`q`) in how many seconds (`w`).",
    "WWW-Authenticate": "How to become somebody, as RFC 6750 says it.",
    "Content-Security-Policy": "Only the page's own script and style run; it talks to this server alone.",
}

_QUESTION: dict[str, Any] = {"user_id": "user-123", "chatbot_id": "demo", "message_text": "Hello"}
_ACCEPTED: dict[str, Any] = {
    "success": True,
    "session_id": "5b6f1f0a-6a55-4a3e-9d3c-0d1b2c3d4e5f",
    "streaming_session_id": _STREAM,
    "flow_type": "main",
    "streaming_url": _URL,
    "status": "active",
}
_HELLO = '{"event":"token","data":{"token":"Hello","markers":{},"flow":"main"},"timestamp":"2024-01-01T12:00:00.000Z"}'
_END = (
    '{"event":"stream_end","data":{"status":"completed","usage":{"prompt_tokens":4,"completion_tokens":1}},'
    '"timestamp":"2024-01-01T12:00:01.000Z"}'
)
_FRAMES = "retry: 1200\n" + to_frames(UUID(_STREAM), 2, [_HELLO, _END]).decode()
_PAGE: dict[str, Any] = {
    "events": [orjson.loads(to_object(2, _HELLO))],
    "session_status": "active",
    "last_event_id": 2,
    "has_more": True,
}

_PROCESS_MESSAGE = Operation(
    "Send a message",
    "Answers as soon as the message is durable, before the model is asked; the answer streams at `streaming_url`. "
    "`user_id`, `chatbot_id` and `message_text` are enough.\n\n"
    "`message_text` may have 32 KiB, `conversation_history` 200 messages and 256 KiB, the body 4 MiB, unless the "
    "server is configured otherwise. Without `session_id` a session is made; with one, the message goes to this "
    "user's chat of that id, which is made if new. Without `conversation_history` the stored messages are the "
    "history. `configuration` may set only what the chatbot allows.\n\n"
    "With an `Idempotency-Key` or a `client_message_id` the request may be repeated: the same body gets the same "
    "answer and starts nothing twice.",
    answers={
        200: Answer(
            "The message is stored and its answer is on the way.",
            {_JSON: Content(_ACCEPTED, ProcessAnswer)},
            headers=["Idempotent-Replayed"],
        )
    },
    parameters=[
        Parameter(
            "Idempotency-Key",
            "header",
            "1 to 256 printable characters, remembered per caller and user for 24 hours unless configured otherwise. "
            "It wins over `client_message_id`.",
            {"type": "string", "minLength": 1, "maxLength": 256},
        )
    ],
    body=Content(_QUESTION, ProcessMessage),
    problems={
        400: ["invalid_json", "bad_request"],
        404: ["chatbot_unknown", "image_unknown"],
        409: ["session_busy", "message_exists"],
        408: ["body_too_slow"],
        429: ["queue_full", "too_many_runs", "quota_exceeded"],
        413: ["body_too_large"],
        422: [
            "invalid_request",
            "message_too_long",
            "history_too_long",
            "images_unsupported",
            "image_invalid",
            "image_too_large",
            "configuration_refused",
            "idempotency_mismatch",
        ],
        503: [
            "starting",
            "draining",
            "overloaded",
            "upstream_busy",
            "replica_lost",
            "decoder_lost",
            "database_unavailable",
            "database_busy",
        ],
    },
)

# One pixel.
_PICTURE = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
_UPLOAD: dict[str, Any] = {
    "chatbot_id": "demo",
    "image_data": {"name": "dot.png", "mime": "image/png", "data": _PICTURE},
}
_UPLOADED: dict[str, Any] = {
    "success": True,
    "image": {
        "id": "6b8e2f52-6f0e-4d6c-9d3b-6f6f1b1c2a10",
        "mime": "image/png",
        "width": 1,
        "height": 1,
        "bytes": 67,
        "sha256": "a1abfd410973b0111c215baa879b9edcd739e601659ba44168269767cc2e9108",
    },
    "analysis": None,
    "streaming_session_id": None,
    "streaming_url": None,
}
_UPLOAD_IMAGE = Operation(
    "Upload a picture",
    "Checks a PNG, JPEG, WebP or GIF by its content, stores it anew and upright, scaled down to 2048 pixels and "
    "without metadata, and answers with the `id` that a message names as its `image_id`. The same picture of the same "
    "user is stored once. Of an animation the first frame is kept.\n\n"
    "With `message_text` the chatbot's image flow looks at it: the answer streams at `streaming_url` like any "
    "other.\n\n"
    "The body may have 10 MiB and must arrive within 30 seconds; the picture may have 40 million pixels, unless the "
    "server is configured otherwise. A picture uploaded without `user_id` can be named by anybody who knows its id.",
    answers={200: Answer("The picture is stored.", {_JSON: Content(_UPLOADED, UploadAnswer)})},
    body=Content(_UPLOAD, UploadImage),
    problems={
        400: ["invalid_json", "bad_request"],
        404: ["chatbot_unknown"],
        408: ["upload_too_slow"],
        413: ["body_too_large"],
        429: ["too_many_runs", "quota_exceeded"],
        422: [
            "invalid_request",
            "message_too_long",
            "image_invalid",
            "image_too_large",
            "images_unsupported",
            "configuration_refused",
        ],
        503: [
            "starting",
            "draining",
            "overloaded",
            "upstream_busy",
            "decoder_lost",
            "database_unavailable",
            "database_busy",
        ],
    },
)


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

_CONFIGURATION: dict[str, Any] = {
    "chatbot_id": "shop",
    "version": 3,
    "image_enabled": False,
    "language": "en",
    "languages": ["en", "de"],
    "flows": ["intent", "main"],
    "answers": ["main"],
    "markers": ["card"],
    "on_busy": "enqueue",
    "topKSettings": {"main": 5},
    "flowApiKeys": {"intent": "configured", "main": "configured"},
    "allowed": {"temperature": [0, 1], "topKSettings": None, "values": [], "flow_type": False},
}
_CHATBOT = Parameter("chatbot_id", "path", "The chatbot's id.")
_GET_CONFIG = Operation(
    "Look at a chatbot",
    "What a front end needs. Secrets never leave: a flow's key is `configured` or empty. `allowed` is what the "
    "`configuration` of a message may set. The scope `admin` shows prompts, base URLs, templates and the rest, too, in "
    "`definition`, as PUT takes it; keys are references in it.",
    answers={
        200: Answer(
            "The chatbot in the version in use.",
            {_JSON: Content({"success": True, "configuration": _CONFIGURATION}, ConfigurationAnswer)},
            headers=["ETag", "Cache-Control"],
        ),
        304: Answer("If-None-Match names the ETag.", headers=["ETag", "Cache-Control"]),
    },
    parameters=[_CHATBOT, Parameter("If-None-Match", "header", "The ETag of what the front end has.")],
    problems={404: ["chatbot_unknown"], 503: ["database_unavailable"]},
)
_PUT_CONFIG = Operation(
    "Replace a chatbot",
    "In the shapes of the chatbots file (docs/chatbots.md), with the providers and templates that it names. In use "
    "within a second on every replica; answers under way keep the version they began with. At most 1 MiB. A 422 lists "
    "what is wrong, each with its place, in `mistakes`.",
    answers={
        200: Answer(
            "In use.",
            {_JSON: Content({"success": True, "chatbot_id": "shop", "version": 4, "changed": True}, ReplaceAnswer)},
        )
    },
    parameters=[_CHATBOT],
    body=Content(
        {
            "providers": {"demo": {"kind": "openai", "base_url": "env:PARLEY_DEMO_URL"}},
            "chatbot": {"flows": {"main": {"provider": "demo", "model": "demo"}}},
        },
        ReplaceConfiguration,
    ),
    problems={
        400: ["invalid_json"],
        408: ["body_too_slow"],
        413: ["body_too_large"],
        422: ["configuration_invalid"],
        503: ["database_unavailable", "database_busy"],
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

_WAITING: dict[str, Any] = {
    "message_id": "b1946ac9-2d0e-4c5e-8f43-7f2a2b6f1c11",
    "streaming_session_id": _STREAM,
    "streaming_url": _URL,
    "chatbot_id": "demo",
    "message_text": "And then?",
    "created_at": "2024-01-01T12:00:00.000Z",
    "updated_at": "2024-01-01T12:00:00.000Z",
}
_CHANGED = {"success": True, "message_id": _WAITING["message_id"], "streaming_session_id": _STREAM}
_OF_A_SESSION = [
    Parameter("session_id", "path", "The `session_id` of the chat."),
    Parameter("user_id", "query", "Whose session it is. Required, except of a user who is signed in."),
]
_OF_A_MESSAGE = [*_OF_A_SESSION, Parameter("message_id", "path", "The `message_id` from the queue.")]
_QUEUE_PROBLEMS = {
    404: ["message_not_queued"],
    422: ["invalid_request"],
    503: ["database_unavailable"],
}
_QUEUE = Operation(
    "List waiting messages",
    "What was sent with `on_busy: enqueue` while an answer was under way, in the order of its turns.",
    answers={
        200: Answer(
            "The queue.",
            {_JSON: Content({"success": True, "session_id": "chat-1", "messages": [_WAITING]}, Queue)},
        )
    },
    parameters=_OF_A_SESSION,
    problems={404: ["session_unknown"], 422: ["invalid_request"], 503: ["database_unavailable"]},
)
_EDIT_QUEUED = Operation(
    "Edit a waiting message",
    "Gives it another text, and what that may take of daily quotas. Not once its turn has come.",
    answers={200: Answer("Changed.", {_JSON: Content({**_CHANGED, "streaming_session_id": None}, QueueAnswer)})},
    parameters=_OF_A_MESSAGE,
    body=Content({"message_text": "And after that?"}, EditMessage),
    problems={
        **_QUEUE_PROBLEMS,
        400: ["invalid_json"],
        408: ["body_too_slow"],
        413: ["body_too_large"],
        422: ["invalid_request", "message_too_long"],
        429: ["quota_exceeded"],
    },
)
_REMOVE_QUEUED = Operation(
    "Remove a waiting message",
    "Its stream ends as `cancelled`. Not once its turn has come: stop its answer instead.",
    answers={200: Answer("Removed.", {_JSON: Content(_CHANGED, QueueAnswer)})},
    parameters=_OF_A_MESSAGE,
    problems=_QUEUE_PROBLEMS,
)
_SEND_NOW = Operation(
    "Answer a waiting message now",
    "It goes to the front of the queue, and the answer under way is stopped, keeping its text.",
    answers={200: Answer("Next.", {_JSON: Content(_CHANGED, QueueAnswer)})},
    parameters=_OF_A_MESSAGE,
    problems=_QUEUE_PROBLEMS,
)

_STATUS: dict[str, Any] = {
    "cron": "*/5 * * * *",
    "lastRun": "2024-01-01T12:00:00.000Z",
    "nextRun": "2024-01-01T12:05:00.000Z",
    "alerts": [],
    "chats": {"lastReconcile": "2024-01-01T01:02:00.000Z", "compared": 1000, "drift": 0},
    "sources": [
        {
            "source": "n8n",
            "crewCode": "n8n",
            "client": "",
            "enabled": True,
            "lastRun": "2024-01-01T12:00:00.000Z",
            "lastComplete": "2024-01-01T12:00:00.000Z",
            "lagSeconds": 12.5,
            "watermark": 4711,
            "conversations": 310,
            "rows": 4711,
            "skipped": {"no_conversation": 2},
            "lastSessions": 3,
            "lastRows": 8,
            "lastSeconds": 0.012,
            "consecutiveFailures": 0,
            "error": None,
            "lastReconcile": "2024-01-01T01:04:00.000Z",
            "drift": 0,
        }
    ],
}
_DISCOVERY_STATUS = Operation(
    "How discovery is doing",
    "When sources were looked through last and will be next, and of each source how far it is read, how far behind, "
    "and what went wrong. `alerts` are sentences for operators. `drift` counts conversations that the nightly "
    "comparison has put right, of this server's own `chats` and of each source.",
    answers={200: Answer("The state of every source.", {_JSON: Content(_STATUS, DiscoveryStatus)})},
    problems={503: ["database_unavailable"]},
)
_CONVERSATION_COMPLETE = Operation(
    "Say that a conversation is complete",
    "Another program tells that it has written a conversation to the table of a source: it is indexed at once, and not "
    "only when the source is looked through next. Signed as [Standard Webhooks](https://www.standardwebhooks.com) say, "
    "with one of `PARLEY_WEBHOOK_SECRETS`. An id that was received before does nothing.",
    answers={
        200: Answer(
            "The source has been read.",
            {
                _JSON: Content(
                    {"success": True, "source": "n8n", "indexed": True, "new": 1, "replayed": False},
                    ConversationCompleteAnswer,
                )
            },
        )
    },
    parameters=[
        Parameter("webhook-id", "header", "Names the webhook; the same one when it is sent again."),
        Parameter("webhook-timestamp", "header", "Seconds since 1970; at most five minutes from now."),
        Parameter("webhook-signature", "header", "`v1,` and HMAC-SHA256 in base64; several with a space between two."),
    ],
    body=Content({"session_id": "5b6f1f0a", "crew_code": "n8n"}, ConversationComplete),
    problems={
        400: ["invalid_json", "bad_request"],
        401: ["webhook_refused"],
        404: ["source_unknown"],
        408: ["body_too_slow"],
        413: ["body_too_large"],
        422: ["invalid_request"],
        503: ["source_unavailable", "database_unavailable"],
    },
)

_HEALTH: dict[str, Any] = {
    "status": "healthy",
    "database": "connected",
    "active_streams": 5,
    "timestamp": "2024-01-01T12:00:00.000Z",
}
_CONVERSATION_HEALTH = Operation(
    "Health for load balancers",
    "`degraded` serves, but something needs an operator. `unhealthy` is no database, starting or stopping. "
    "Answers within about a second even when the database hangs.",
    answers={
        200: Answer("Serving: healthy or degraded.", {_JSON: Content(_HEALTH, ConversationHealth)}),
        503: Answer(
            "Unhealthy: send no requests here.",
            {_JSON: Content(_HEALTH | {"status": "unhealthy", "database": "disconnected"}, ConversationHealth)},
        ),
    },
)
_LIVEZ = Operation(
    "Is the process alive?",
    "Asks the process and its loop only, so that no outage elsewhere restarts it.",
    answers={200: Answer("Alive.", {_JSON: Content({"status": "alive"}, Liveness)})},
)
_READYZ = Operation(
    "May new work be sent here?",
    "The database answers, its schema fits, and the server is not stopping. With `?verbose` it says why not, for which "
    "it needs the scope `admin`.",
    answers={
        200: Answer("Ready.", {_JSON: Content({"status": "ready"}, Readiness)}),
        503: Answer("Not ready.", {_JSON: Content({"status": "not ready"}, Readiness)}),
    },
    parameters=[
        Parameter("verbose", "query", "Present, whatever its value: say why."),
    ],
)
_METRICS = Operation(
    "Prometheus metrics",
    "In Prometheus' text format; docs/operations.md says what each means.",
    answers={
        200: Answer(
            "The metrics of this replica.",
            {"text/plain": Content("# TYPE parley_active_streams gauge\nparley_active_streams 5.0\n")},
        )
    },
)
_OPENAPI = Operation(
    "This document",
    "OpenAPI 3.1.",
    answers={200: Answer("The document.", {_JSON: Content({"openapi": "3.1.0"}, schema={"type": "object"})})},
)
_DOCS = Operation(
    "This API to read and try",
    "A page that needs nothing but this server.",
    answers={200: Answer("The page.", {"text/html": Content("<!doctype html>")}, headers=["Content-Security-Policy"])},
)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/api/process-message"): _PROCESS_MESSAGE,
    ("POST", "/api/upload-image"): _UPLOAD_IMAGE,
    ("GET", "/api/stream-events/{stream_id}"): _STREAM_EVENTS,
    ("GET", "/api/stream"): _STREAMS,
    ("GET", "/api/conversation-config/{chatbot_id}"): _GET_CONFIG,
    ("PUT", "/api/conversation-config/{chatbot_id}"): _PUT_CONFIG,
    ("POST", "/api/stream-events/{stream_id}/cancel"): _CANCEL,
    ("GET", "/api/sessions/{session_id}/queue"): _QUEUE,
    ("PATCH", "/api/sessions/{session_id}/queue/{message_id}"): _EDIT_QUEUED,
    ("DELETE", "/api/sessions/{session_id}/queue/{message_id}"): _REMOVE_QUEUED,
    ("POST", "/api/sessions/{session_id}/queue/{message_id}/send-now"): _SEND_NOW,
    **INDEX_OPERATIONS,
    ("GET", "/api/discovery/status"): _DISCOVERY_STATUS,
    ("POST", "/api/webhooks/conversation-complete"): _CONVERSATION_COMPLETE,
    **SYNC_OPERATIONS,
    **CHAT_OPERATIONS,
    ("GET", "/api/conversation-health"): _CONVERSATION_HEALTH,
    ("GET", "/livez"): _LIVEZ,
    ("GET", "/readyz"): _READYZ,
    ("GET", "/metrics"): _METRICS,
    ("GET", "/openapi.json"): _OPENAPI,
    ("GET", "/docs"): _DOCS,
}
