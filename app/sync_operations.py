"""What the routes of chat synchronisation take and answer, for /openapi.json."""

from collections.abc import Mapping
from typing import Any

from app.openapi import Answer, Content, Operation, Parameter
from app.sync.endpoints import SyncAnswer, SyncChats

_JSON = "application/json"
_STAMP = "018bcfe56800-0000"
_PUSH: dict[str, Any] = {
    "client": "phone-7d1e",
    "cursor": None,
    "push": [
        {
            "mid": 1,
            "ops": [
                {"op": "chat.put", "id": "c1", "title": "Trip", "stamp": _STAMP},
                {
                    "op": "msg.add",
                    "id": "m1",
                    "chat_id": "c1",
                    "role": "user",
                    "content": "Where to?",
                    "stamp": "018bcfe56800-0001",
                },
            ],
        }
    ],
    "user_id": "user-123",
}
_TOLD: dict[str, Any] = {
    "acked": 1,
    "cursor": "5b6f1f0a6a55.12",
    "server_time": 1700000000000,
    "chats": [{"id": "c0", "title": "Shoes", "stamp": _STAMP, "client": "desk-9a31"}],
    "messages": [],
    "more": False,
}
_USER_ID = Parameter("user_id", "query", "Whose chats. A user who asks is always this user.")
_ANSWER = {200: Answer("What became of it, and what the device has not seen.", {_JSON: Content(_TOLD, SyncAnswer)})}

_EXCHANGE = Operation(
    "Synchronise chats",
    "One exchange: `push` goes up, what this device has not seen since `cursor` comes down. Any number of times with "
    "the same effect.\n\n"
    "A device has a `client` id of its own and numbers its mutations 1, 2, 3 …; it repeats what is not `acked`. A "
    "mutation is applied whole, at most 100 operations; a body has at most 1 MiB, a page about 500 rows. Without "
    "`cursor`, and wherever the answer says `bootstrap`, everything is sent: what the device had is to be dropped but "
    "for what it has not pushed yet; `resync` says why. A device's own rows are left out, unless the server made "
    "something else of them; `results` says so: `lost` against a later word, `forked` under another id, `moved` to "
    "another chat. docs/sync.md has the rules.",
    answers=_ANSWER,
    parameters=[_USER_ID],
    body=Content(_PUSH, SyncChats),
    problems={
        400: ["invalid_json", "bad_cursor"],
        403: ["sync_disabled"],
        408: ["body_too_slow"],
        409: ["gap", "unknown_client"],
        413: ["body_too_large"],
        422: ["invalid_request"],
        503: ["starting", "draining", "replica_lost", "database_unavailable", "database_busy"],
    },
)
_PULL = Operation(
    "Read changes of chats",
    "As the exchange without pushing anything, and without leaving out what this device did.",
    answers=_ANSWER,
    parameters=[Parameter("cursor", "query", "Of the answer before; without it, everything."), _USER_ID],
    problems={
        400: ["bad_cursor"],
        403: ["sync_disabled"],
        422: ["invalid_request"],
        503: ["starting", "replica_lost", "database_unavailable", "database_busy"],
    },
)
_EVENTS = Operation(
    "Follow changes of chats",
    "Server-sent events: `changed` says that there is something to pull, and the `cursor` that a pull leads to; "
    "whoever has that one already, as after a push of its own, has nothing to do. It comes once at the beginning, "
    "unless `cursor` or `Last-Event-ID` is where the user stands now, and then after changes, however many there are "
    "in 20 ms.\n\n"
    "One connection for each `client`: a newer one at the same replica takes its place, and the older one is told "
    "`replaced` and closed; it should not come back then.",
    answers={
        200: Answer(
            "Frames, with the cursor as their id.",
            {
                "text/event-stream": Content(
                    'id: 5b6f1f0a6a55.12\nevent: changed\ndata: {"cursor":"5b6f1f0a6a55.12"}\n\n', schema={}
                )
            },
            headers=["Cache-Control"],
        )
    },
    parameters=[
        Parameter("client", "query", "The device that follows. Without it none is replaced."),
        Parameter("cursor", "query", "Of the last answer; nothing is told until there is another."),
        Parameter("Last-Event-ID", "header", "The id of the last frame; it wins over the query."),
        _USER_ID,
    ],
    problems={400: ["bad_cursor"], 403: ["sync_disabled"], 422: ["invalid_request"]},
)

SYNC_OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/api/chat/sync"): _EXCHANGE,
    ("GET", "/api/chat/sync"): _PULL,
    ("GET", "/api/chat/sync/events"): _EVENTS,
}
