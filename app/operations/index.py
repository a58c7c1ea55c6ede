"""What the routes of the conversation index take and answer, for /openapi.json."""

from collections.abc import Mapping
from typing import Any

from app.conversations.administration import IndexDeleted, IndexMade, IndexReset, IndexStats, SyncResult
from app.conversations.endpoints import Conversations, Statistics, Transcript
from app.conversations.usage_endpoints import Usage
from app.openapi import Answer, Content, Operation, Parameter

_JSON = "application/json"
_SSE = "text/event-stream"

_ENTRY: dict[str, Any] = {
    "conversationId": "5b6f1f0a-6a55-4a3e-9d3c-0d1b2c3d4e5f",
    "source": "parley",
    "username": "user-123",
    "chatbotId": "shop",
    "model": "gpt-4o-mini",
    "clientIp": "203.0.113.7",
    "firstMessageTime": "2026-01-31T12:00:00.000Z",
    "lastMessageTime": "2026-01-31T12:00:07.250Z",
    "durationSeconds": 7,
    "messageCount": 2,
    "totalTokens": 91,
    "firstQuestion": "Where is my order?",
    "lastQuestion": "Where is my order?",
    "messageIds": ["b4c8", "a1f2"],
    "createdAt": "2026-01-31T12:00:00.000Z",
    "updatedAt": "2026-01-31T12:00:07.250Z",
}
_LISTED: dict[str, Any] = {
    "conversations": [_ENTRY],
    "total": 1,
    "totalIsExact": True,
    "page": 1,
    "size": 50,
    "totalPages": 1,
    "nextCursor": None,
}
_USERNAME = Parameter("username", "query", "Whose. A user who asks is always this user.")
_USER_ID = Parameter("user_id", "query", "Means `username`.")
_SOURCE = Parameter("source", "query", "Where it was held: `parley` for chats of this server, else a source's code.")
_FROM_TO = [
    Parameter("from", "query", "A date or a time (ISO 8601; UTC unless it has a zone): not before it."),
    Parameter("to", "query", "Likewise: before it."),
]


def _whole(default: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": 1, "maximum": most, "default": default}


_PROBLEMS: Mapping[int, list[str]] = {503: ["starting", "database_unavailable"]}
_SIZE = Parameter("size", "query", "How many on a page.", _whole(50, 200))

_LIST = Operation(
    "List conversations",
    "The index over all conversations, wherever they were held; the last ones first. A page costs the same at any "
    "depth if `nextCursor` is sent back as `cursor`; pages are turned by number up to the 10,000th conversation. "
    "Filters may be combined, and one that is empty is none; a `q` without a word in it finds nothing.\n\n"
    "`total` is exact without filters, with one filter up to 10,000, with several or with `q` at least up to 1,000; "
    "beyond that, `totalIsExact` is false and there are more. With a cursor it is what it was on the first page. "
    "`from` and `to` are about the last message.",
    answers={200: Answer("A page.", {_JSON: Content(_LISTED, Conversations)})},
    parameters=[
        _USERNAME,
        _USER_ID,
        Parameter("model", "query", "The model that answered last."),
        Parameter("chatbot_id", "query", "The chatbot."),
        _SOURCE,
        *_FROM_TO,
        Parameter(
            "q",
            "query",
            'Words of the first or the last question, all of them. `"in quotes"` is a phrase, `word*` a beginning.',
            {"type": "string", "maxLength": 256},
        ),
        Parameter(
            "in",
            "query",
            "Where `q` is looked for: in the first and last questions, or in all messages of this server's chats, "
            "where `PARLEY_SEARCH_MESSAGES` has turned that on. Then one message has to have all the words, `match` "
            "says which, and `total` is a lower bound more often.",
            {"type": "string", "enum": ["questions", "messages"], "default": "questions"},
        ),
        Parameter(
            "sort",
            "query",
            "By the last message; a minus is the newest first.",
            {"type": "string", "enum": ["-lastMessageTime", "lastMessageTime"], "default": "-lastMessageTime"},
        ),
        Parameter("page", "query", "Which page, from 1; not with `cursor`.", _whole(1, (1 << 31) - 1)),
        _SIZE,
        Parameter("cursor", "query", "`nextCursor` of the page before, with the same filters and order."),
    ],
    problems={400: ["bad_parameter", "bad_cursor", "page_too_deep", "search_off"], 409: ["index_missing"], **_PROBLEMS},
)
_ONE = Operation(
    "Read a conversation",
    "A conversation with a page of its messages, in their order. Its id may be used by several users or sources: then "
    "409 `ambiguous` lists them, and `username` and `source` say which. Of another program's table, a row may hold "
    "several messages, and `size` counts rows.",
    answers={
        200: Answer(
            "A page of its messages.",
            {
                _JSON: Content(
                    {
                        "conversationId": _ENTRY["conversationId"],
                        "source": "parley",
                        "username": "user-123",
                        "messages": [
                            {
                                "id": "a1f2",
                                "role": "user",
                                "content": "Where is my order?",
                                "status": "complete",
                                "attachments": [],
                                "timestamp": "2026-01-31T12:00:00.000Z",
                            }
                        ],
                        "messageCount": 2,
                        "nextCursor": "1",
                    },
                    Transcript,
                )
            },
        )
    },
    parameters=[
        Parameter("conversation_id", "path", "The `conversationId`; of a chat of this server its `session_id`."),
        _USERNAME,
        _USER_ID,
        _SOURCE,
        _SIZE,
        Parameter("cursor", "query", "`nextCursor` of the page before.", {"type": "string", "pattern": "^[0-9]*$"}),
    ],
    problems={
        400: ["bad_parameter"],
        404: ["conversation_unknown"],
        409: ["index_missing", "ambiguous"],
        503: [*_PROBLEMS[503], "overloaded", "source_unavailable"],
    },
)
_EVENTS = Operation(
    "Follow changes of the list",
    "Server-sent events: `changed` names conversations that have changed since the last one, at most 100, or says "
    "`all`: then read the list again. That comes once at the beginning, and for whatever cannot be named: what was "
    "read from other programs' tables, what was deleted or built anew, at most every 5 seconds. A user is told of the "
    "user's own conversations only. Changes of a quarter of a second are told together, and there is nothing to "
    "resume: whoever comes back reads the list.",
    answers={
        200: Answer(
            "Frames.",
            {
                _SSE: Content(
                    'event: changed\ndata: {"all":false,"conversations":[{"conversationId":"5b6f1f0a",'
                    '"source":"parley","username":"user-123"}]}\n\n',
                    schema={},
                )
            },
            headers=["Cache-Control"],
        )
    },
    parameters=[_USERNAME, _USER_ID],
    problems={400: ["bad_parameter"]},
)
_STATISTICS = Operation(
    "Add conversations up",
    "Messages, questions, tokens and durations per day, model, user or chatbot, of the last 30 days unless `from` and "
    "`to` say otherwise; at most 400 days. They were added up as messages were saved, so this reads no message.",
    answers={
        200: Answer(
            "The groups.",
            {
                _JSON: Content(
                    {
                        "group": "day",
                        "since": "2026-01-01",
                        "until": "2026-02-01",
                        "statistics": [
                            {"name": "2026-01-31", "messages": 2, "questions": 1, "tokens": 91, "durationMs": 1250}
                        ],
                    },
                    Statistics,
                )
            },
        )
    },
    parameters=[
        Parameter(
            "group",
            "query",
            "What the groups are.",
            {"type": "string", "enum": ["day", "model", "user", "chatbot"], "default": "day"},
        ),
        *_FROM_TO,
        _USERNAME,
        _USER_ID,
        _SOURCE,
    ],
    problems={400: ["bad_parameter"], **_PROBLEMS},
)
_USAGE = Operation(
    "Add usage up",
    "What answers have cost per day, model or chatbot, of the last 30 days unless `from` and `to` say otherwise; at "
    "most 400 days. It comes from the calls of providers alone, up to the last one that was recorded: nothing that is "
    "synchronised or imported counts. Of a user who asks the user's own; of everybody where an API key names nobody.",
    answers={
        200: Answer(
            "The groups.",
            {
                _JSON: Content(
                    {
                        "group": "day",
                        "since": "2026-01-01",
                        "until": "2026-02-01",
                        "usage": [
                            {
                                "name": "2026-01-31",
                                "calls": 2,
                                "failed": 1,
                                "promptTokens": 60,
                                "completionTokens": 31,
                                "totalTokens": 91,
                                "durationMs": 1250,
                            }
                        ],
                    },
                    Usage,
                )
            },
        )
    },
    parameters=[
        Parameter(
            "group",
            "query",
            "What the groups are.",
            {"type": "string", "enum": ["day", "model", "chatbot"], "default": "day"},
        ),
        *_FROM_TO,
        _USERNAME,
        _USER_ID,
    ],
    problems={400: ["bad_parameter"], 503: _PROBLEMS[503]},
)

_STATS: dict[str, Any] = {
    "indexExists": True,
    "conversationCount": 1204,
    "documentCount": 1204,
    "indexSize": 1343488,
    "schemaVersion": 1,
    "lastSyncTime": "2026-01-31T12:00:00.000Z",
    "sources": {"n8n": 204, "parley": 1000},
    "messageSearch": {"enabled": True, "complete": True, "users": 90, "usersReady": 90, "size": 9420800},
}
_INIT = Operation(
    "Make the index",
    "After a delete. It is empty but for what is saved from now on, until `POST /api/sync/sync` fills it.",
    answers={
        200: Answer("There is one.", {_JSON: Content({"created": True, "message": "The index is there."}, IndexMade)})
    },
    problems=_PROBLEMS,
)
_PROGRESS = (
    "With `Accept: text/event-stream` the answer is events: `progress` with `phase`, `done` and `of`, at the end "
    "`result` with what is answered otherwise, or `failed` with a problem document. Whoever leaves ends the work. "
    "One sync or rebuild is under way at a time, on all replicas."
)
_SYNC = Operation(
    "Fill the index",
    "Counts conversations of this server anew from their messages, while messages go on being saved. Lists are "
    f"served all the time, and what is right already is not written.\n\n{_PROGRESS}",
    answers={
        200: Answer(
            "What was done.",
            {
                _JSON: Content(
                    {
                        "success": True,
                        "syncStartTime": "2026-01-31T12:00:00.000Z",
                        "syncEndTime": "2026-01-31T12:00:02.500Z",
                        "durationSeconds": 2.5,
                        "messagesProcessed": 2400,
                        "conversationsFound": 1204,
                        "conversationsIndexed": 3,
                        "skipped": 0,
                        "failed": [],
                        "failures": 0,
                    },
                    SyncResult,
                ),
                _SSE: Content('event: progress\ndata: {"phase":"recount","done":200,"of":1204}\n\n'),
            },
        )
    },
    problems={409: ["index_missing", "sync_running"], **_PROBLEMS},
)
_INDEX_STATS = Operation(
    "Look at the index",
    "How many conversations it has, and how large it is. Of one user: of the user's own rows, without `sources`.",
    answers={200: Answer("The figures.", {_JSON: Content(_STATS, IndexStats)})},
    parameters=[_USERNAME, _USER_ID],
    problems={400: ["bad_parameter"], **_PROBLEMS},
)
_DELETE = Operation(
    "Delete the index",
    "Empties it. Lists answer 409 `index_missing` then; messages go on being saved, and init and sync bring everything "
    "back that messages can tell.",
    answers={
        200: Answer(
            "There is none.",
            {_JSON: Content({"deleted": True, "message": "The index was deleted."}, IndexDeleted)},
        )
    },
    problems={409: ["sync_running"], **_PROBLEMS},
)
_RESET = Operation(
    "Build the index anew",
    "Beside the one that is read, which is then replaced: lists never go empty and cursors stay good. Conversations of "
    f"this server are counted from their messages, those of other sources are carried over.\n\n{_PROGRESS}",
    answers={
        200: Answer(
            "It was replaced.",
            {
                _JSON: Content({"message": "The index was built anew.", "stats": _STATS}, IndexReset),
                _SSE: Content('event: progress\ndata: {"phase":"fill","done":500,"of":1204}\n\n'),
            },
        )
    },
    problems={409: ["sync_running", "index_held"], 503: [*_PROBLEMS[503], "index_busy"]},
)

INDEX: Mapping[tuple[str, str], Operation] = {
    ("GET", "/api/messages/conversations"): _LIST,
    ("GET", "/conversations"): _LIST,
    ("GET", "/api/messages/conversations/events"): _EVENTS,
    ("GET", "/api/messages/conversations/{conversation_id}"): _ONE,
    ("GET", "/api/messages/statistics"): _STATISTICS,
    ("GET", "/api/usage"): _USAGE,
    ("POST", "/api/sync/init"): _INIT,
    ("POST", "/api/sync/sync"): _SYNC,
    ("GET", "/api/sync/stats"): _INDEX_STATS,
    ("DELETE", "/api/sync/index"): _DELETE,
    ("POST", "/api/sync/reset"): _RESET,
}
