"""What the routes of messages, pictures and queues take and answer."""

from collections.abc import Mapping
from typing import Any

from app.chats.endpoints import UploadAnswer, UploadImage
from app.flows.endpoints import (
    EditMessage,
    ProcessAnswer,
    ProcessMessage,
    Queue,
    QueueAnswer,
)
from app.openapi import Answer, Content, Operation, Parameter
from app.operations.streams import STREAM, URL

_JSON = "application/json"
_QUESTION: dict[str, Any] = {"user_id": "user-123", "chatbot_id": "demo", "message_text": "Hello"}
_ACCEPTED: dict[str, Any] = {
    "success": True,
    "session_id": "5b6f1f0a-6a55-4a3e-9d3c-0d1b2c3d4e5f",
    "streaming_session_id": STREAM,
    "flow_type": "main",
    "streaming_url": URL,
    "status": "active",
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

_WAITING: dict[str, Any] = {
    "message_id": "b1946ac9-2d0e-4c5e-8f43-7f2a2b6f1c11",
    "streaming_session_id": STREAM,
    "streaming_url": URL,
    "chatbot_id": "demo",
    "message_text": "And then?",
    "created_at": "2024-01-01T12:00:00.000Z",
    "updated_at": "2024-01-01T12:00:00.000Z",
}

_CHANGED = {"success": True, "message_id": _WAITING["message_id"], "streaming_session_id": STREAM}
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

MESSAGES: Mapping[tuple[str, str], Operation] = {
    ("POST", "/api/process-message"): _PROCESS_MESSAGE,
    ("POST", "/api/upload-image"): _UPLOAD_IMAGE,
    ("GET", "/api/sessions/{session_id}/queue"): _QUEUE,
    ("PATCH", "/api/sessions/{session_id}/queue/{message_id}"): _EDIT_QUEUED,
    ("DELETE", "/api/sessions/{session_id}/queue/{message_id}"): _REMOVE_QUEUED,
    ("POST", "/api/sessions/{session_id}/queue/{message_id}/send-now"): _SEND_NOW,
}
