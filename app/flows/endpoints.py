"""Sending a message, stopping an answer, and what a user may do with messages that wait: validation at the edge."""

import hashlib
from typing import Annotated, Any, Literal, TypedDict
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from app.access.client import client_address
from app.access.guard import acting_for, owner_of, principal_of
from app.access.limits import Limits
from app.access.links import Links
from app.access.principal import Principal
from app.answers import private_json, time_of
from app.chats.chat import Message
from app.chats.store import has_chat
from app.errors import Invalid, NotFound
from app.flows import queue as waiting
from app.flows.idempotency import Key
from app.flows.incoming import Incoming
from app.flows.intake import Accepted, Intake
from app.flows.stopping import Stopping
from app.flows.waiting import Waiting
from app.settings import Settings
from app.streams.identity import stream_id_of
from app.telemetry import request_id
from app.text import PRINTABLE, clean, parse_object, validated
from app.wall import Wall

# Ids travel in URLs and log lines; a user id is whatever the front end calls its users, but for control characters.
_ID = r"^[A-Za-z0-9._~:-]{1,128}$"

Id = Annotated[str, Field(pattern=_ID)]
Printable = Annotated[str, Field(min_length=1, max_length=256, pattern=PRINTABLE)]


class Needs(TypedDict):
    intake: Intake
    stopping: Stopping
    waiting: Waiting
    wall: Wall
    settings: Settings
    links: Links
    limits: Limits


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


class Cancel(BaseModel):
    """What to stop: the whole answer, or one of its flows."""

    flow: Annotated[str, Field(min_length=1, max_length=128)] | None = None


class CancelAnswer(BaseModel):
    """What became of it. `upstream_closed`: no connection to a provider is open any more, after so many ms."""

    success: Literal[True] = True
    session_status: Literal["queued", "active", "completed", "failed", "cancelled"]
    upstream_closed: bool
    upstream_close_ms: int | None
    last_event_id: int


class QueuedMessage(BaseModel):
    """A message that waits for its turn."""

    message_id: str
    streaming_session_id: str
    streaming_url: str
    chatbot_id: str
    message_text: str
    created_at: str
    updated_at: str


class Queue(BaseModel):
    """The waiting messages of a session, in the order of their turns."""

    success: Literal[True] = True
    session_id: str
    messages: list[QueuedMessage]


class EditMessage(BaseModel):
    """The new text of a waiting message."""

    message_text: Annotated[str, Field(min_length=1)]


class QueueAnswer(BaseModel):
    """The stream of the message that was changed."""

    success: Literal[True] = True
    message_id: str
    streaming_session_id: str | None = None


async def process_message(request: Request[Needs]) -> Response:
    """Accept a message; answers as soon as it is durable, before the model is asked."""
    body = await request.body()
    incoming = _incoming(request, principal_of(request), body)
    limits = request.state["limits"]
    limits.count_named(request.scope, "messages", incoming.user_id)
    if incoming.image_data is not None:
        limits.count_as_well(request.scope, "uploads", incoming.user_id)
    accepted = await request.state["intake"].accept(incoming)
    return _answer(accepted, request.state["links"])


def _incoming(request: Request[Needs], principal: Principal, body: bytes) -> Incoming:
    given = _with_user(parse_object(body), principal)
    message = _validated(given)
    acting_for(request, message.user_id)
    _check_sizes(message, request.state["settings"])
    return Incoming(
        user_id=message.user_id,
        chatbot_id=message.chatbot_id,
        text=clean(message.message_text),
        session_id=message.session_id,
        message_id=message.client_message_id,
        history=_history(message),
        configuration=message.configuration or {},
        on_busy=message.on_busy,
        image_data=message.image_data,
        image_id=message.image_id,
        key=_key(request, principal, message, given),
        request_id=request_id(request.scope),
        client_ip=client_address(request.scope),
        principal=principal,
    )


def _with_user(given: dict[str, Any], principal: Principal) -> dict[str, Any]:
    """Whoever is one user need not say which."""
    return given if principal.user_id is None else {"user_id": principal.user_id, **given}


def _validated(given: dict[str, Any]) -> ProcessMessage:
    message = validated(ProcessMessage, given)
    if message.image_data is not None and message.image_id is not None:
        raise Invalid("invalid_request", "The request is not valid: send image_data or image_id, not both.")
    return message


def _check_length(text: str, settings: Settings) -> None:
    if len(text.encode(errors="replace")) > settings.message_limit:
        raise Invalid("message_too_long", f"message_text is longer than {settings.message_limit} bytes.")


def _check_sizes(message: ProcessMessage, settings: Settings) -> None:
    _check_length(message.message_text, settings)
    history = message.conversation_history or []
    if len(history) > settings.history_limit:
        raise Invalid("history_too_long", f"conversation_history has more than {settings.history_limit} messages.")
    if sum(len(past.content.encode(errors="replace")) for past in history) > settings.history_bytes:
        raise Invalid("history_too_long", f"conversation_history is longer than {settings.history_bytes} bytes.")


def _history(message: ProcessMessage) -> list[Message] | None:
    if message.conversation_history is None:
        return None
    return [Message(past.role, clean(past.content)) for past in message.conversation_history]


def _key(request: Request[Needs], principal: Principal, message: ProcessMessage, given: dict[str, Any]) -> Key | None:
    """The header wins; a client_message_id alone makes the POST repeatable too.

    Each principal has its own keys, and of one that acts for many users each user.
    """
    header = request.headers.get("idempotency-key")
    if header is not None and not (0 < len(header) <= 256 and header.isprintable()):
        raise Invalid("invalid_request", "Idempotency-Key must be 1 to 256 printable characters.")
    key = f"key:{header}" if header else f"message:{message.client_message_id}" if message.client_message_id else None
    if key is None:
        return None
    canonical = orjson.dumps(given, option=orjson.OPT_SORT_KEYS)
    return Key(f"{principal.id} {message.user_id}", "process-message", key, hashlib.sha256(canonical).hexdigest())


def _answer(accepted: Accepted, links: Links) -> Response:
    stream_id = UUID(accepted.streaming_session_id)
    answer = ProcessAnswer(
        session_id=accepted.session_id,
        streaming_session_id=accepted.streaming_session_id,
        flow_type=accepted.flow_type,
        streaming_url=links.url(stream_id, queued=accepted.status == "queued"),
        status=accepted.status,
    )
    headers = {"Idempotent-Replayed": "true"} if accepted.replayed else None
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)


# -- stopping


async def cancel(request: Request[Needs]) -> Response:
    """Stop an answer, or one of its flows; what was said so far is kept. Any number of times."""
    body = await request.body()
    wanted = validated(Cancel, parse_object(body) if body.strip() else {})
    stream_id = stream_id_of(request.path_params["stream_id"])
    stopped = await request.state["stopping"].stop(stream_id, wanted.flow, owner=owner_of(request))
    return private_json(
        CancelAnswer(
            session_status=stopped.status,
            upstream_closed=stopped.closed,
            upstream_close_ms=stopped.close_ms,
            last_event_id=stopped.last_event_id,
        )
    )


# -- messages that wait


async def queue(request: Request[Needs]) -> Response:
    """The messages that wait in a session."""
    names = _names(request)
    async with request.state["wall"].connection() as connection:
        messages = await waiting.listed(connection, **names)
        known = messages or await has_chat(connection, user_id=names["user_id"], chat_id=names["session_id"])
    if not known:
        raise NotFound("session_unknown", "There is no such session; POST /api/process-message says ids.")
    return private_json(
        Queue(
            session_id=names["session_id"],
            messages=[
                QueuedMessage(
                    message_id=message.message_id,
                    streaming_session_id=str(message.stream_id),
                    streaming_url=request.state["links"].url(message.stream_id, queued=True),
                    chatbot_id=message.chatbot_id,
                    message_text=message.text,
                    created_at=time_of(message.created_at),
                    updated_at=time_of(message.updated_at),
                )
                for message in messages
            ],
        )
    )


async def queued_message(request: Request[Needs]) -> Response:
    """Change or remove a waiting message."""
    return await (_edit(request) if request.method == "PATCH" else _remove(request))


async def _edit(request: Request[Needs]) -> Response:
    wanted = validated(EditMessage, parse_object(await request.body()))
    _check_length(wanted.message_text, request.state["settings"])
    message_id = clean(request.path_params["message_id"])
    text = clean(wanted.message_text)
    await request.state["waiting"].edit(**_names(request), message_id=message_id, text=text)
    return private_json(QueueAnswer(message_id=message_id))


async def _remove(request: Request[Needs]) -> Response:
    message_id = clean(request.path_params["message_id"])
    stream_id = await request.state["waiting"].remove(**_names(request), message_id=message_id)
    return private_json(QueueAnswer(message_id=message_id, streaming_session_id=str(stream_id)))


async def send_now(request: Request[Needs]) -> Response:
    """Give a waiting message its turn at once: the answer under way is stopped, keeping its text."""
    message_id = clean(request.path_params["message_id"])
    stream_id = await request.state["waiting"].send_now(**_names(request), message_id=message_id)
    return private_json(QueueAnswer(message_id=message_id, streaming_session_id=str(stream_id)))


def _names(request: Request[Needs]) -> dict[str, str]:
    """Session ids are a user's own, so a user must be named by whoever is not one."""
    if (user_id := owner_of(request)) is None:
        raise Invalid("invalid_request", "Add ?user_id=: session ids are known per user.")
    return {"user_id": user_id, "session_id": clean(request.path_params["session_id"])}
