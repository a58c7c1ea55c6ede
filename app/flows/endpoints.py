"""POST /api/process-message: validation at the edge, then the intake."""

import hashlib
from typing import Annotated, Any, Literal, TypedDict

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from app.chats.chat import Message
from app.errors import Invalid
from app.flows.idempotency import Key
from app.flows.intake import Accepted, Incoming, Intake
from app.settings import Settings
from app.telemetry import request_id
from app.text import clean, parse_object

# Ids travel in URLs and log lines; a user id is whatever the front end calls its users, but for control characters.
_ID = r"^[A-Za-z0-9._~:-]{1,128}$"

Id = Annotated[str, Field(pattern=_ID)]
Printable = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f\ufffd]+$")]


class Needs(TypedDict):
    intake: Intake
    settings: Settings


class HistoryMessage(BaseModel):
    """One earlier message, as the model shall see it."""

    role: Literal["user", "assistant"]
    content: str


class ProcessMessage(BaseModel):
    """A user's message to a chatbot. `user_id`, `chatbot_id` and `message_text` are enough."""

    model_config = ConfigDict(strict=True)

    user_id: Printable
    chatbot_id: Printable
    message_text: Annotated[str, Field(min_length=1)]
    session_id: Id | None = None
    client_message_id: Id | None = None
    conversation_history: list[HistoryMessage] | None = None
    configuration: dict[str, Any] | None = None
    on_busy: Literal["enqueue", "reject", "interrupt"] | None = None
    image_data: dict[str, Any] | None = None
    image_id: str | None = None


class ProcessAnswer(BaseModel):
    """Where the answer streams."""

    success: Literal[True] = True
    session_id: str
    streaming_session_id: str
    flow_type: str
    streaming_url: str
    status: Literal["active", "queued"]


async def process_message(request: Request[Needs]) -> Response:
    """Accept a message; answers as soon as it is durable, before the model is asked."""
    body = await request.body()
    incoming = _incoming(request, body, request.state["settings"])
    accepted = await request.state["intake"].accept(incoming)
    return _answer(accepted)


def _incoming(request: Request[Needs], body: bytes, settings: Settings) -> Incoming:
    given = parse_object(body)
    message = _validated(given)
    _check_sizes(message, settings)
    return Incoming(
        user_id=message.user_id,
        chatbot_id=message.chatbot_id,
        text=clean(message.message_text),
        session_id=message.session_id,
        message_id=message.client_message_id,
        history=_history(message),
        configuration=message.configuration or {},
        key=_key(request, message, given),
        request_id=request_id(request.scope),
    )


def _validated(given: dict[str, Any]) -> ProcessMessage:
    try:
        message = ProcessMessage.model_validate(given)
    except ValidationError as error:
        # Never the input itself: it may be large, secret or both.
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:10])
        raise Invalid("invalid_request", f"The request is not valid: {wrong}.") from None
    if message.image_data is not None or message.image_id is not None:
        raise Invalid("images_unsupported", "This chatbot takes no images; leave image_data and image_id out.")
    return message


def _check_sizes(message: ProcessMessage, settings: Settings) -> None:
    if len(message.message_text.encode(errors="replace")) > settings.message_limit:
        raise Invalid("message_too_long", f"message_text is longer than {settings.message_limit} bytes.")
    history = message.conversation_history or []
    if len(history) > settings.history_limit:
        raise Invalid("history_too_long", f"conversation_history has more than {settings.history_limit} messages.")
    if sum(len(past.content.encode(errors="replace")) for past in history) > settings.history_bytes:
        raise Invalid("history_too_long", f"conversation_history is longer than {settings.history_bytes} bytes.")


def _history(message: ProcessMessage) -> list[Message] | None:
    if message.conversation_history is None:
        return None
    return [Message(past.role, clean(past.content)) for past in message.conversation_history]


def _key(request: Request[Needs], message: ProcessMessage, given: dict[str, Any]) -> Key | None:
    """The header wins; a client_message_id alone makes the POST repeatable too."""
    header = request.headers.get("idempotency-key")
    if header is not None and not (0 < len(header) <= 256 and header.isprintable()):
        raise Invalid("invalid_request", "Idempotency-Key must be 1 to 256 printable characters.")
    key = f"key:{header}" if header else f"message:{message.client_message_id}" if message.client_message_id else None
    if key is None:
        return None
    canonical = orjson.dumps(given, option=orjson.OPT_SORT_KEYS)
    return Key(message.user_id, "process-message", key, hashlib.sha256(canonical).hexdigest())


def _answer(accepted: Accepted) -> Response:
    answer = ProcessAnswer(
        session_id=accepted.session_id,
        streaming_session_id=accepted.streaming_session_id,
        flow_type=accepted.flow_type,
        streaming_url=f"/api/stream-events/{accepted.streaming_session_id}",
        status=accepted.status,
    )
    headers = {"Idempotent-Replayed": "true"} if accepted.replayed else None
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)
