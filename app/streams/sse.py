"""Server-sent events on the wire; the only module that knows sse-starlette.

Its exit watcher is switched off: it is global to the process, while each of our servers closes its own readers at a
frame boundary through the hub.
"""

import random
from collections.abc import AsyncIterator

from sse_starlette import EventSourceResponse
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import AppStatus
from starlette.responses import Response

# One newline, no blank line: a blank line dispatches an event, and one popular client shows it as an empty message.
HEARTBEAT = b": hb\n"
HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


class _Heartbeat(ServerSentEvent):
    def encode(self) -> bytes:
        return HEARTBEAT


def event_stream(frames: AsyncIterator[bytes], *, heartbeat_s: float, send_timeout_s: float) -> Response:
    """A response that sends whole frames as they come, heartbeats in between, and frees a reader that takes nothing."""
    AppStatus.enable_automatic_graceful_drain = False
    return EventSourceResponse(
        frames,
        headers=HEADERS,
        ping=heartbeat_s,
        ping_message_factory=_Heartbeat,
        send_timeout=send_timeout_s,
    )


def retry_line(ms: int) -> bytes:
    """The reconnection time, jittered by half so that many readers do not come back at once. Never sent alone with a
    blank line: it goes in front of a frame, or is the last line before a close."""
    return b"retry: %d\n" % (ms + random.randint(0, ms // 2))


def come_back_later(ms: int) -> Response:
    """What an EventSource gets instead of a 503, after which browsers would give up for ever (G14)."""
    return Response(retry_line(ms), media_type="text/event-stream", headers=HEADERS)
