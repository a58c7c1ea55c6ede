"""What the routes of chats take and answer, for /openapi.json."""

from collections.abc import Mapping
from typing import Any

from app.flows.user_endpoints import EraseAnswer
from app.openapi import Answer, Content, Operation, Parameter
from app.sync.chat_endpoints import (
    BranchChat,
    ChatDeleted,
    ChatEntry,
    ChatList,
    ChatMessages,
    RenameChat,
)
from app.sync.claim_endpoints import ClaimAnswer, ClaimChats
from app.sync.file_endpoints import ExportedChats, ImportAnswer
from app.sync.version_endpoints import ChatVersions, VersionRestored

_JSON = "application/json"
_CHAT = "5b6f1f0a-6a55-4a3e-9d3c-0d1b2c3d4e5f"
_MESSAGE = "b4c8d1f0-6a55-4a3e-9d3c-0d1b2c3d4e5f"
_ENTRY: dict[str, Any] = {
    "id": _CHAT,
    "title": "Where is my order?",
    "messageCount": 2,
    "totalTokens": 91,
    "lastMessagePreview": "It was sent yesterday.",
    "createdAt": "2026-01-31T12:00:00.000Z",
    "updatedAt": "2026-01-31T12:00:07.250Z",
    "parentChatId": None,
    "branchFromMessageId": None,
    "branches": [],
}
_SAID: dict[str, Any] = {
    "id": _MESSAGE,
    "role": "user",
    "content": "Where is my order?",
    "status": "complete",
    "attachments": [],
    "parentId": None,
    "timestamp": "2026-01-31T12:00:00.000Z",
}
_USER_ID = Parameter("user_id", "query", "Whose chats. A user who asks is always this user.")
_CHAT_ID = Parameter("chat_id", "path", "A chat: what `session_id` says.", required=True)
_SIZE = Parameter(
    "size", "query", "How many on a page.", {"type": "integer", "minimum": 1, "maximum": 200, "default": 50}
)
_ABSENT: Mapping[int, list[str]] = {404: ["chat_unknown"], 422: ["invalid_request"]}
_READING: Mapping[int, list[str]] = {503: ["starting", "database_unavailable"]}
_WRITING: Mapping[int, list[str]] = {
    503: ["starting", "draining", "replica_lost", "database_unavailable", "database_busy"]
}
_BODY: Mapping[int, list[str]] = {400: ["invalid_json"], 408: ["body_too_slow"], 413: ["body_too_large"]}
_THE_CHAT = {200: Answer("The chat as it is now.", {_JSON: Content(_ENTRY, ChatEntry)})}

_LIST = Operation(
    "List chats",
    "A user's chats, those first that something was said in last; those without a message come behind them. A page "
    "costs the same at any depth, and may be shorter than `size` before the end: `nextCursor` is null there.",
    answers={200: Answer("A page.", {_JSON: Content({"chats": [_ENTRY], "nextCursor": None}, ChatList)})},
    parameters=[Parameter("cursor", "query", "`nextCursor` of the page before."), _SIZE, _USER_ID],
    problems={400: ["bad_parameter", "bad_cursor"], 422: ["invalid_request"], **_READING},
)
_GET = Operation(
    "Read a chat",
    "As a list shows it.",
    answers=_THE_CHAT,
    parameters=[_CHAT_ID, _USER_ID],
    problems={**_ABSENT, **_READING},
)
_PATCH = Operation(
    "Rename a chat",
    "A change like that of a device: it reaches all of them.",
    answers=_THE_CHAT,
    parameters=[_CHAT_ID, _USER_ID],
    body=Content({"title": "My order"}, RenameChat),
    problems={**_BODY, **_ABSENT, **_WRITING},
)
_DELETE = Operation(
    "Delete a chat",
    "With its messages, on all devices. A younger message of one of them brings it back until it is purged.",
    answers={200: Answer("It is deleted.", {_JSON: Content({"success": True, "id": _CHAT}, ChatDeleted)})},
    parameters=[_CHAT_ID, _USER_ID],
    problems={**_ABSENT, **_WRITING},
)
_MESSAGES = Operation(
    "Read the messages of a chat",
    "In the order in which they came here, or the last ones first. A page has at most 4 MiB of text, and one message "
    "at least.",
    answers={
        200: Answer(
            "A page.", {_JSON: Content({"chatId": _CHAT, "messages": [_SAID], "nextCursor": None}, ChatMessages)}
        )
    },
    parameters=[
        _CHAT_ID,
        Parameter("cursor", "query", "`nextCursor` of the page before, in the same order."),
        _SIZE,
        Parameter(
            "sort",
            "query",
            "`-position`: the last ones first.",
            {"type": "string", "enum": ["position", "-position"], "default": "position"},
        ),
        Parameter("failed", "query", "`true`: failed messages, too."),
        _USER_ID,
    ],
    problems={400: ["bad_parameter"], **_ABSENT, **_READING},
)
_BRANCH = Operation(
    "Branch off from a chat",
    "Makes a chat that begins with a copy of everything up to `message_id`, so that the conversation goes on from "
    "there another way; the chat itself stays as it is. At most 10,000 messages are copied, and none of them counts as "
    "usage.\n\n"
    "With an `id` of the caller's the request may be repeated, and goes on where it broke off.",
    answers={200: Answer("The new chat.", {_JSON: Content(_ENTRY, ChatEntry)})},
    parameters=[_CHAT_ID, _USER_ID],
    body=Content({"message_id": _MESSAGE}, BranchChat),
    problems={
        **_BODY,
        404: ["chat_unknown", "message_unknown"],
        409: ["chat_exists"],
        422: ["invalid_request", "branch_too_long"],
        **_WRITING,
    },
)

_FILE: dict[str, Any] = {
    "format": "parley",
    "version": 1,
    "exportedAt": "2026-01-31T12:05:00.000Z",
    "chats": [
        {
            "id": _CHAT,
            "title": "Where is my order?",
            "createdAt": "2026-01-31T12:00:00.000Z",
            "parentChatId": None,
            "branchFromMessageId": None,
            "messages": [
                {"id": _MESSAGE, "role": "user", "content": "Where is it?", "timestamp": "2026-01-31T12:00:00.000Z"}
            ],
        }
    ],
}
_MARKDOWN = "Exported on 2026-01-31 at 12:05 UTC\n\n# Where is my order?\n\n## User, 2026-01-31 12:00\n\nWhere is it?\n"
_EXPORTED = {
    200: Answer(
        "The file. One that could not be finished ends with the connection.",
        {_JSON: Content(_FILE, ExportedChats), "text/markdown": Content(_MARKDOWN)},
        headers=["Content-Disposition"],
    )
}
_FORMAT = Parameter(
    "format",
    "query",
    "`json`, which can be imported, or `markdown` for people.",
    {"type": "string", "enum": ["json", "markdown"], "default": "json"},
)
_EXPORT_ONE = Operation(
    "Export a chat",
    "The chat with all its messages but failed ones, as it is at one moment. Pictures are named, not included.",
    answers=_EXPORTED,
    parameters=[_CHAT_ID, _FORMAT, _USER_ID],
    problems={
        400: ["bad_parameter"],
        **_ABSENT,
        503: ["starting", "overloaded", "database_unavailable"],
    },
)
_EXPORT_ALL = Operation(
    "Export all chats",
    "Everything of this user in one file, as it is at one moment, however much that is. A replica makes two "
    "files at once, each within 15 minutes.",
    answers=_EXPORTED,
    parameters=[_FORMAT, _USER_ID],
    problems={
        400: ["bad_parameter"],
        422: ["invalid_request"],
        503: ["starting", "overloaded", "database_unavailable"],
    },
)

_IMPORT = Operation(
    "Import chats",
    "The body is a file of chats: of this server (`GET /api/chats/export`), `conversations.json` of ChatGPT, or an "
    "export of Open WebUI; which one shows by itself. Of a tree of messages the branch that was shown last is taken. "
    "Instructions and what tools said are left out, and nothing counts as usage.\n\n"
    "The same file again adds nothing. What was deleted meanwhile comes back with its chat; messages that were deleted "
    "one by one do not. A conversation that cannot be read is named in `failed`, the others are imported; of a file "
    "that breaks off, what stood before that. The file may have `PARLEY_IMPORT_LIMIT` bytes, a conversation 16 MiB.",
    answers={
        200: Answer(
            "What the file had, and what of it is new.",
            {
                _JSON: Content(
                    {
                        "success": True,
                        "formats": ["chatgpt"],
                        "chats": 1,
                        "messages": 2,
                        "added": {"chats": 1, "messages": 2},
                        "leftOut": 3,
                        "failures": 0,
                        "failed": [],
                    },
                    ImportAnswer,
                )
            },
        )
    },
    parameters=[_USER_ID],
    body=Content(_FILE, ExportedChats),
    problems={
        408: ["body_too_slow"],
        413: ["body_too_large"],
        422: ["invalid_request", "import_invalid", "import_unknown"],
        503: ["starting", "draining", "overloaded", "replica_lost", "database_unavailable", "database_busy"],
    },
)

_VERSION: dict[str, Any] = {
    "id": "018bcfe56800-0000.phone-7d1e",
    "title": "My order",
    "client": "phone-7d1e",
    "parentChatId": None,
    "branchFromMessageId": None,
    "keptAt": "2026-01-31T12:00:07.250Z",
}
_VERSIONS = Operation(
    "List versions of a chat",
    "What it was called, and what it branched off from, before another device's word won: the last 20. Also of a "
    "deleted chat, until it is purged.",
    answers={200: Answer("They.", {_JSON: Content({"chatId": _CHAT, "versions": [_VERSION]}, ChatVersions)})},
    parameters=[_CHAT_ID, _USER_ID],
    problems={**_ABSENT, **_READING},
)
_RESTORE = Operation(
    "Restore a version of a chat",
    "It is the chat's again, by a new word that reaches all devices; what it replaces is kept. A deleted chat comes "
    "back with its messages. Repeated, it changes nothing.",
    answers={
        200: Answer("It is.", {_JSON: Content({"success": True, "id": _CHAT, "title": "My order"}, VersionRestored)})
    },
    parameters=[_CHAT_ID, Parameter("version", "path", "`id` of a version.", required=True), _USER_ID],
    problems={404: ["chat_unknown", "version_unknown"], 422: ["invalid_request"], **_WRITING},
)

_ERASE = Operation(
    "Erase a user",
    "Everything of a user goes: chats, messages, pictures, streams, what waits, what devices have synchronised, error "
    "rows. Answers under way are stopped. What was used stays in the totals, and is nobody's. An "
    "administrator erases anybody; a user's token with the scope `sync` is enough to erase oneself.\n\n"
    "It goes in small pieces. After ten seconds the answer is 202: the server goes on by itself, and the same request "
    "again helps.",
    answers={
        200: Answer("Nothing is left.", {_JSON: Content({"success": True, "erased": True}, EraseAnswer)}),
        202: Answer("The rest follows.", {_JSON: Content({"success": True, "erased": False}, EraseAnswer)}),
    },
    parameters=[
        Parameter("user_id", "path", "The user.", required=True),
        Parameter("user_id", "query", "Whoever is signed in, or left out."),
    ],
    problems={
        404: ["user_unknown"],
        422: ["invalid_request"],
        503: ["starting", "replica_lost", "database_unavailable", "database_busy"],
    },
)

_CLAIM = Operation(
    "Take over chats",
    "All chats of another user, as of somebody anonymous before signing in, become one's own: `proof` is a token of "
    "that user. An API key, which acts for any user, names the user in `from_user_id`. Once: another user's claim is "
    "refused from then on; the same user may repeat it.",
    answers={
        200: Answer("They are here.", {_JSON: Content({"success": True, "chats": 2, "messages": 9}, ClaimAnswer)})
    },
    parameters=[_USER_ID],
    body=Content({"proof": "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ2aXNpdG9yIn0.c2lnbmF0dXJl"}, ClaimChats),
    problems={
        **_BODY,
        403: ["proof_invalid"],
        409: ["already_claimed", "session_busy"],
        422: ["invalid_request"],
        **_WRITING,
    },
)

CHATS: Mapping[tuple[str, str], Operation] = {
    ("DELETE", "/api/users/{user_id}"): _ERASE,
    ("GET", "/api/chats"): _LIST,
    ("GET", "/api/chats/{chat_id}"): _GET,
    ("PATCH", "/api/chats/{chat_id}"): _PATCH,
    ("DELETE", "/api/chats/{chat_id}"): _DELETE,
    ("GET", "/api/chats/export"): _EXPORT_ALL,
    ("POST", "/api/chats/import"): _IMPORT,
    ("POST", "/api/chats/claim"): _CLAIM,
    ("GET", "/api/chats/{chat_id}/export"): _EXPORT_ONE,
    ("GET", "/api/chats/{chat_id}/messages"): _MESSAGES,
    ("POST", "/api/chats/{chat_id}/branch"): _BRANCH,
    ("GET", "/api/chats/{chat_id}/versions"): _VERSIONS,
    ("POST", "/api/chats/{chat_id}/versions/{version}/restore"): _RESTORE,
}
