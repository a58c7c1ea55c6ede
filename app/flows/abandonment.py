"""Answers that nobody reads any more are stopped, where their chatbot says so (`cancel_when_abandoned_s`)."""

from time import monotonic
from uuid import UUID

import structlog

from app.flows.run import CANCELLED
from app.flows.runner import Runner
from app.streams.hub import Hub
from app.streams.stream import Streams

log = structlog.get_logger(__name__)

# A poller counts as a reader for so long after its last page, in seconds.
_POLLER_S = 5


class Abandonment:
    """A pass notes who is read: here for our own runs, in the table for those of other replicas."""

    def __init__(self, hub: Hub, streams: Streams, runner: Runner) -> None:
        self._hub = hub
        self._streams = streams
        self._runner = runner
        self._read_at: dict[UUID, float] = {}

    async def run_once(self) -> int:
        """Stop what was abandoned; returns how many runs."""
        now, read = monotonic(), self._hub.read_lately(_POLLER_S)
        ours = self._runner.abandonable()
        self._read_at = {
            stream_id: now if stream_id in read else self._read_at.get(stream_id, now) for stream_id in ours
        }
        if elsewhere := [stream_id for stream_id in read if not self._runner.runs(stream_id)]:
            await self._streams.note_readers(elsewhere)
        left = [stream_id for stream_id, within_s in ours.items() if self._read_at[stream_id] < now - within_s]
        unread = await self._streams.unread(left) if left else []
        for stream_id in unread:
            log.info("run_left_alone", streaming_session_id=str(stream_id))
            self._runner.stop(stream_id, CANCELLED)
        return len(unread)
