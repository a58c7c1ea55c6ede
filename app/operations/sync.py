"""What the routes of chat synchronisation take and answer, for /openapi.json."""

from collections.abc import Mapping
from typing import Any

from pydantic import RootModel

from app.openapi import Answer, Content, Operation, Parameter
from app.sync.endpoints import SyncAnswer, SyncChats
from app.sync.history_endpoints import HistoryTaken, HistoryTold, SyncHistory
from app.sync.status_endpoints import SyncDone, SyncNow, SyncStatus

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


class ExchangeOrHistory(RootModel[SyncChats | SyncHistory]):
    """What a device did, or all that a front end without a cursor has."""


class ExchangedOrTaken(RootModel[SyncAnswer | HistoryTaken]):
    """The answer to an exchange, or to a whole history."""


class ChangesOrHistory(RootModel[SyncAnswer | HistoryTold]):
    """What has changed since a cursor, or whole chats that have since a time."""


def _answer(model: type[RootModel[Any]]) -> dict[int, Answer]:
    return {200: Answer("What became of it, and what the device has not seen.", {_JSON: Content(_TOLD, model)})}


_EXCHANGE = Operation(
    "Synchronise chats",
    "One exchange: `push` goes up, what this device has not seen since `cursor` comes down. Any number of times with "
    "the same effect.\n\n"
    "A device has a `client` id of its own and numbers its mutations 1, 2, 3 …; it repeats what is not `acked`. A "
    "mutation is applied whole, at most 100 operations; a body has at most 1 MiB, a page about 500 rows. Without "
    "`cursor`, and wherever the answer says `bootstrap`, everything is sent: what the device had is to be dropped but "
    "for what it has not pushed yet; `resync` says why. A device's own rows are left out, unless the server made "
    "something else of them; `results` says so: `lost` against a later word, `forked` under another id, `moved` to "
    "another chat. docs/sync.md has the rules.\n\n"
    "Front ends that keep no cursor send whole histories instead: `conversations`. They are compared with what is "
    "stored, and what is not new writes nothing; such a body may have `PARLEY_SYNC_HISTORY_LIMIT` bytes and 20,000 "
    "messages. The answer then counts what was compared.",
    answers=_answer(ExchangedOrTaken),
    parameters=[_USER_ID],
    body=Content(_PUSH, ExchangeOrHistory),
    problems={
        400: ["invalid_json", "bad_cursor"],
        403: ["sync_disabled"],
        408: ["body_too_slow"],
        409: ["gap", "unknown_client"],
        413: ["body_too_large"],
        422: ["invalid_request"],
        503: ["starting", "draining", "overloaded", "replica_lost", "database_unavailable", "database_busy"],
    },
)
_DEVICE: dict[str, Any] = {
    "lastSyncTimestamp": "2026-01-31T12:00:07.250Z",
    "pendingChanges": 0,
    "isOnline": True,
    "deviceId": "desk-9a31",
    "serverTime": "2026-01-31T12:00:07.250Z",
    "cursor": "5b6f1f0a6a55.12",
}
_STATUS = Operation(
    "Look how far a device is",
    "When it last synchronised by `POST /api/sync` or pushed anything, and how much it was not told since. `cursor` is "
    "what it has shown to have read.",
    answers={200: Answer("How it is.", {_JSON: Content(_DEVICE, SyncStatus)})},
    parameters=[Parameter("device_id", "query", "Which device; without it, the server's `DEVICE_ID`."), _USER_ID],
    problems={
        403: ["sync_disabled"],
        422: ["invalid_request"],
        503: ["starting", "database_unavailable"],
    },
)
_SYNC_NOW = Operation(
    "Synchronise in a direction",
    "The exchange of `POST /api/chat/sync` for front ends that know `full`, `upload` and `download`. An upload reads "
    "nothing and leaves the cursor where it was; a download leaves `push` where it is.",
    answers={
        200: Answer(
            "What the exchange answers, and how the device is now.",
            {
                _JSON: Content(
                    {"message": "What was new has gone both ways.", "status": _DEVICE, "result": _TOLD}, SyncDone
                )
            },
        )
    },
    parameters=[_USER_ID],
    body=Content({"direction": "full", "device_id": "desk-9a31", "user_id": "user-123"}, SyncNow),
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
    "As the exchange without pushing anything, and without leaving out what this device did. With `since` whole chats "
    "that have changed since then, for front ends that keep no cursor, and the ids of those that were deleted.",
    answers=_answer(ChangesOrHistory),
    parameters=[
        Parameter("cursor", "query", "Of the answer before; without it, everything."),
        Parameter("since", "query", "A time in ISO 8601, as `syncedAt` tells one; empty: of everything."),
        _USER_ID,
    ],
    problems={
        400: ["bad_cursor", "bad_parameter"],
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

SYNC: Mapping[tuple[str, str], Operation] = {
    ("POST", "/api/chat/sync"): _EXCHANGE,
    ("GET", "/api/chat/sync"): _PULL,
    ("GET", "/api/sync"): _STATUS,
    ("POST", "/api/sync"): _SYNC_NOW,
    ("GET", "/api/chat/sync/events"): _EVENTS,
}
