"""What the routes of discovery take and answer."""

from collections.abc import Mapping
from typing import Any

from app.conversations.discovery_endpoints import ConversationComplete, ConversationCompleteAnswer, DiscoveryStatus
from app.openapi import Answer, Content, Operation, Parameter

_JSON = "application/json"
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

DISCOVERY: Mapping[tuple[str, str], Operation] = {
    ("GET", "/api/discovery/status"): _DISCOVERY_STATUS,
    ("POST", "/api/webhooks/conversation-complete"): _CONVERSATION_COMPLETE,
}
