"""An event of a stream: how it is encoded once, stored as text, and framed for SSE without parsing it again.

The stored payload is the event object of wire.md without its id, which is known only when the log commits it:
`{"event": …, "data": …, "timestamp": …}`. Putting the id in front is a splice of bytes.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import UUID

import orjson

Kind = Literal[
    "stream_start",
    "flow_selected",
    "flow_start",
    "token",
    "flow_output",
    "flow_end",
    "flow_error",
    "flow_restart",
    "message",
    "gap",
    "stream_end",
]
TERMINAL: Kind = "stream_end"
Status = Literal["queued", "active", "completed", "failed", "cancelled"]

_PREFIX = '{"event":"'


def encode(kind: Kind, data: Mapping[str, Any]) -> str:
    """The payload to store, stamped with this machine's clock (ids give the order, never times)."""
    event = {"event": kind, "data": data, "timestamp": datetime.now(UTC)}
    return orjson.dumps(event, option=orjson.OPT_UTC_Z).decode()


def kind_of(payload: str) -> str:
    return payload[len(_PREFIX) : payload.index('"', len(_PREFIX))]


def data_of(payload: str) -> dict[str, Any]:
    data = orjson.loads(payload)["data"]
    assert isinstance(data, dict)
    return data


def to_object(event_id: int, payload: str) -> str:
    """The event object's JSON, in one line."""
    return f'{{"id":{event_id},{payload[1:]}'


def to_frames(stream_id: UUID, first_id: int, payloads: Sequence[str]) -> bytes:
    """SSE frames of neighbouring events. A payload holds no raw CR or LF: JSON escapes both."""
    head = f"id: {stream_id}:"
    frames = [
        f"{head}{event_id}\nevent: {kind_of(payload)}\ndata: {to_object(event_id, payload)}\n\n"
        for event_id, payload in enumerate(payloads, first_id)
    ]
    return "".join(frames).encode()


def with_more_in_id(frames: bytes, more: str) -> bytes:
    """The same frames, each with `more` at the end of its id. Only an id line is followed by the kind's line."""
    return frames.replace(b"\nevent: ", f"{more}\nevent: ".encode()) if more else frames
