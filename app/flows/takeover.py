"""Streams of dead replicas: declare the silent ones dead, claim what they left, and end it with the text it has.

The two steps are separate commits (G6, G7). Restarting an answer instead of ending it comes with the flows.
"""

import structlog

from app.flows.ending import Ending
from app.flows.run import Failure, Progress, Result
from app.streams.event import data_of, kind_of
from app.streams.log import Log, StreamLost
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Orphan, Streams
from app.streams.tail import Tail

log = structlog.get_logger(__name__)

# Streams claimed per pass, and events read at once.
_CLAIMED = 50
_PAGE = 1000

_OWNER_LOST = Failure(
    "owner_lost", "The server that wrote this answer is gone; the text so far is kept.", retryable=True
)


class Takeover:
    """One pass looks for silent replicas and claims a bounded number of their streams."""

    def __init__(
        self,
        replica: Replica,
        streams: Streams,
        *,
        event_log: Log,
        tail: Tail,
        ending: Ending,
        lease_s: float,
    ) -> None:
        self._replica = replica
        self._streams = streams
        self._log = event_log
        self._tail = tail
        self._ending = ending
        self._lease_s = lease_s

    async def run_once(self) -> int:
        """Returns how many streams were ended."""
        if self._replica.may_fence(self._lease_s):
            for replica_id in await self._replica.fence_silent(self._lease_s):
                log.warning("replica_declared_dead", replica=str(replica_id))
        orphans = await self._streams.claim(_CLAIMED)
        for orphan in orphans:
            await self._end(orphan)
        return len(orphans)

    async def _end(self, orphan: Orphan) -> None:
        stream = orphan.stream
        writer = self._log.open(stream.id, last_id=orphan.last_id)
        try:
            progress = Progress(provider="", model="")
            saved = await self._recall(orphan, progress)
            # flow_end in the log: the provider had finished, only the saving is left to do.
            result = Result(progress, None if progress.finish_reason else _OWNER_LOST)
            await self._ending.conclude(stream, writer, result, answer_saved=saved)
            log.info("stream_taken_over", streaming_session_id=str(stream.id), status=result.status)
            self._streams.settle(stream.id)
        except (Fenced, StreamLost) as lost:
            log.warning("run_lost", streaming_session_id=str(stream.id), reason=type(lost).__name__)
        except Exception:  # around one stream: the others of this pass must be ended all the same
            log.exception("takeover_failed", streaming_session_id=str(stream.id))
        finally:
            self._log.close(writer)

    async def _recall(self, orphan: Orphan, progress: Progress) -> bool:
        """Read back what the log holds of the answer; returns whether it was saved as a message already."""
        saved, cursor = False, 0
        while payloads := await self._tail.read(orphan.stream.id, cursor, _PAGE):
            cursor += len(payloads)
            for payload in payloads:
                saved |= _recall_event(payload, orphan.stream.flow_type, progress)
        return saved


def _recall_event(payload: str, flow: str, progress: Progress) -> bool:
    kind = kind_of(payload)
    if kind not in ("flow_start", "token", "flow_end", "message") or (data := data_of(payload))["flow"] != flow:
        return False
    if kind == "flow_start":
        progress.provider, progress.model, progress.attempt = data["provider"], data["model"], data["attempt"]
    elif kind == "token":
        progress.pieces.append(data["token"])
    elif kind == "flow_end":
        progress.finish_reason = data["finish_reason"]
        progress.first_token_ms, progress.duration_ms = data["ttft_ms"], data["duration_ms"]
    return kind == "message"
