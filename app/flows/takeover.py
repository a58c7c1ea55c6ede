"""Streams of dead replicas: declare the silent ones dead, claim what they left, and end it with the text it has.

The two steps are separate commits (G6, G7). Restarting an answer instead of ending it comes with the flows.
"""

from typing import Any

import orjson
import structlog

from app.flows.ending import Ending
from app.flows.run import CANCELLED, Attempt, Failure, Progress, Result
from app.journal import About, Journal
from app.streams.event import data_of, kind_of
from app.streams.log import Log, StreamLost, Writer
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Orphan, Stream, Streams
from app.streams.tail import Tail

log = structlog.get_logger(__name__)

# Streams claimed per pass, and events read at once.
_CLAIMED = 50
_PAGE = 1000

_OF_A_FLOW = ("flow_start", "flow_restart", "token", "flow_output", "flow_error", "flow_end", "message")

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
        journal: Journal,
        lease_s: float,
    ) -> None:
        self._replica = replica
        self._streams = streams
        self._log = event_log
        self._tail = tail
        self._ending = ending
        self._journal = journal
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
            memory = await self._recall(orphan)
            answer = memory.answer
            # flow_end in the log: the provider had finished, only the saving is left to do.
            answer.failure = memory.failure or (None if answer.finish_reason else _end_of(orphan))
            if answer.failure is not None and answer.attempts:
                answer.attempts[-1].end(answer.failure)
            if answer.failure is _OWNER_LOST:
                self._report(stream, writer, answer)
            if answer.shown and not memory.saved:
                await self._ending.save_answer(stream, writer, answer)
            await self._ending.conclude(stream, writer, Result(answer, [answer]))
            log.info("stream_taken_over", streaming_session_id=str(stream.id))
            self._streams.settle(stream.id)
        except (Fenced, StreamLost) as lost:
            log.warning("run_lost", streaming_session_id=str(stream.id), reason=type(lost).__name__)
        except Exception:  # around one stream: the others of this pass must be ended all the same
            log.exception("takeover_failed", streaming_session_id=str(stream.id))
        finally:
            self._log.close(writer)

    def _report(self, stream: Stream, writer: Writer, answer: Progress) -> None:
        about = About(None, stream.id, stream.session_id, stream.chatbot_id, answer.flow, len(answer.attempts))
        answer.error_id = self._journal.record(_OWNER_LOST.code, _OWNER_LOST.message, about=about)
        told = {"code": _OWNER_LOST.code, "message": _OWNER_LOST.message, "retryable": _OWNER_LOST.retryable}
        writer.append("flow_error", {"flow": answer.flow, **told, "error_id": answer.error_id})

    async def _recall(self, orphan: Orphan) -> "_Memory":
        """Read back what the log holds of the answer."""
        memory, cursor = _Memory(Progress(orphan.stream.flow_type)), 0
        while payloads := await self._tail.read(orphan.stream.id, cursor, _PAGE):
            cursor += len(payloads)
            for payload in payloads:
                memory.recall(payload)
        return memory


class _Memory:
    """What the log says of the answer flow, whichever flow that turned out to be."""

    def __init__(self, answer: Progress) -> None:
        self.answer = answer
        self.saved = False
        self.failure: Failure | None = None

    def recall(self, payload: str) -> None:
        kind = kind_of(payload)
        if kind == "flow_selected" and (chosen := data_of(payload)["flow"]) != self.answer.flow:
            self.answer = Progress(chosen)
        elif kind in _OF_A_FLOW and (data := data_of(payload))["flow"] == self.answer.flow:
            self._recall(kind, data)

    def _recall(self, kind: str, data: dict[str, Any]) -> None:
        answer = self.answer
        match kind:
            case "flow_start":
                answer.attempts.append(Attempt(data["attempt"], data["provider"], data["model"]))
            case "flow_restart":
                answer.clear()
            case "token":
                answer.pieces.append(data["token"])
                answer.length += len(data["token"])
                for name, contents in data["markers"].items():
                    answer.markers += [(name, content, answer.length) for content in contents]
            case "flow_output":
                answer.pieces.append(text_of(data["output"]))
            case "flow_error":
                self.failure = Failure(data["code"], data["message"], data["retryable"])
                answer.error_id = data["error_id"]
            case "flow_end":
                answer.finish_reason = data["finish_reason"]
                answer.first_token_ms, answer.duration_ms = data["ttft_ms"], data["duration_ms"]
                if data["finish_reason"] == "cancelled":
                    self.failure = CANCELLED
            case "message":
                self.saved = True


def _end_of(orphan: Orphan) -> Failure:
    return CANCELLED if orphan.cancelled else _OWNER_LOST


def text_of(output: Any) -> str:
    """A flow's output as text: what a model wrote as JSON is kept as JSON."""
    return output if isinstance(output, str) else orjson.dumps(output).decode()
