"""What the routes of chatbots' configuration take and answer."""

from collections.abc import Mapping
from typing import Any

from app.flows.configuration import ConfigurationAnswer, ReplaceAnswer, ReplaceConfiguration
from app.openapi import Answer, Content, Operation, Parameter

_JSON = "application/json"
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

CONFIGURATION: Mapping[tuple[str, str], Operation] = {
    ("GET", "/api/conversation-config/{chatbot_id}"): _GET_CONFIG,
    ("PUT", "/api/conversation-config/{chatbot_id}"): _PUT_CONFIG,
}
