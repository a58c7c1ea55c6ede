"""A message as it came in, and how what it brought besides its text and ids is kept until it has been answered."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import orjson

from app.access.principal import Principal
from app.chats.chat import Message
from app.flows import idempotency


@dataclass(frozen=True, slots=True)
class Incoming:
    """A validated message. `history` of None means: what is stored; `on_busy` of None: as the chatbot has it."""

    user_id: str
    chatbot_id: str
    text: str
    session_id: str | None = None
    message_id: str | None = None
    history: Sequence[Message] | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    on_busy: str | None = None
    image_data: Mapping[str, Any] | None = None
    image_id: str | None = None
    key: idempotency.Key | None = None
    request_id: str | None = None
    # The address it came from, empty where that is not known.
    client_ip: str = ""
    # Who asked, for its quotas; not kept, as they are reserved when the message is accepted.
    principal: Principal | None = None
    # perf_counter's time. No part of what the message is: read twice, it is the same message.
    received: float = field(default_factory=perf_counter, compare=False)


def encode(incoming: Incoming) -> str:
    """As it is kept in a row. A picture must have been stored: its id is kept, not its data."""
    history = None if incoming.history is None else [asdict(message) for message in incoming.history]
    request = {
        "configuration": incoming.configuration,
        "history": history,
        "image_id": incoming.image_id,
        "request_id": incoming.request_id,
        "message_id": incoming.message_id,
        "client_ip": incoming.client_ip,
    }
    return orjson.dumps(request).decode()


def decode(request: str, *, user_id: str, chatbot_id: str, session_id: str, text: str = "") -> Incoming:
    """What `encode` has kept, with what stands in columns beside it. It counts as received now."""
    kept: Mapping[str, Any] = orjson.loads(request)
    history = kept["history"]
    return Incoming(
        user_id,
        chatbot_id,
        text,
        session_id=session_id,
        message_id=kept.get("message_id"),
        history=None if history is None else [Message(**message) for message in history],
        configuration=kept["configuration"],
        image_id=kept["image_id"],
        request_id=kept["request_id"],
        client_ip=kept.get("client_ip", ""),
    )
