"""The event log: group commits under the fence, ids without gaps.

All events of this process go through one lane: what arrives while a flush is under way is committed by the next
one. Readers hear of an event after its commit, never before (G3). Bounded: `Writer.room` holds back a stream at
`stream_bytes` and all streams at `total_bytes` of unsaved payload; a flush carries at most `flush_events`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic, perf_counter
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from app.errors import Unavailable
from app.postgres import why
from app.streams.appending import Appender, Events, StreamLost
from app.streams.event import Kind, encode, kind_of
from app.streams.hub import Hub
from app.streams.pace import Pace
from app.streams.replicas import Fenced, Replica
from app.telemetry import Metrics

log = structlog.get_logger(__name__)
# Asked for each flush; cheaper than building a line for every event that nobody wants to read.
_VERBOSE = logging.getLogger(__name__)

# The database understood a batch and will not have it: one of its streams is to blame, or this replica is dead.
_BAD_EVENTS = (StreamLost, asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
_REFUSED = (*_BAD_EVENTS, Fenced)


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes of payload, times in seconds."""

    flush_events: int = 2000
    flush_gap_s: float = 0.008
    stream_bytes: int = 1 << 20
    total_bytes: int = 64 << 20
    unsaved_s: float = 30


class Writer:
    """The one place where events of a stream are appended while this replica owns it."""

    __slots__ = (
        "_barrier",
        "_ended",
        "_failure",
        "_last",
        "_log",
        "_pending",
        "_size",
        "_taken",
        "_waiters",
        "owner",
        "stream_id",
    )

    def __init__(self, log: "Log", stream_id: UUID, last_id: int, owner: UUID) -> None:
        self.stream_id = stream_id
        # The incarnation that opened it: a later one of this process may not write here.
        self.owner = owner
        self._log = log
        self._last = last_id
        self._pending: list[str] = []
        self._taken = 0
        self._size = 0
        # How many of the pending events the lane may still take while somebody writes alone; None: all of them.
        self._barrier: int | None = None
        self._ended = False
        self._failure: Exception | None = None
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def last_id(self) -> int:
        """The last committed id."""
        return self._last

    def append(self, kind: Kind, data: Mapping[str, Any]) -> None:
        """Queue one event; ids are given in this order. Raises Fenced or StreamLost when there is no more writing."""
        if self._failure is not None:
            raise self._failure
        payload = encode(kind, data)
        self._pending.append(payload)
        self._size += len(payload)
        self._log._arrived(self, len(payload))

    def crowded(self) -> bool:
        """Whether the provider's read must wait in `room`; checked first, because it is hardly ever true."""
        return self._size > self._log.limits.stream_bytes or self._log.full

    async def room(self) -> None:
        """Wait until there is room for more. Raises Unavailable after `unsaved_s` without progress (G12)."""
        try:
            async with asyncio.timeout(self._log.limits.unsaved_s):
                while self.crowded():
                    await self._progress()
        except TimeoutError:
            raise Unavailable(
                "log_unavailable", "The answer could not be saved in time: the database is away."
            ) from None

    async def saved(self) -> int:
        """Wait until everything appended is committed; returns the last id. Raises what ended the writing."""
        while self._pending:
            await self._progress()
        if self._failure is not None:
            raise self._failure
        return self._last

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[int, None]:
        """Commit what was appended so far, then keep the lane off this stream; yields the next id.

        For an event that is committed in a transaction with other rows. Events appended meanwhile wait. The caller
        reports the commit with `committed_alone`; leaving without that leaves the id to the next event.
        """
        while self._barrier is not None:
            await self._progress()
        self._barrier = len(self._pending)
        try:
            while self._barrier:
                await self._progress()
            if self._failure is not None:
                raise self._failure
            yield self._last + 1
        finally:
            self._barrier = None
            self._log._resume(self)
            self._wake()

    def committed_alone(self, payload: str, *, ended: bool) -> None:
        self._last += 1
        self._ended = ended
        if ended:
            self._log._hub.over(self.stream_id, self._last)
        self._log._publish(self.stream_id, self._last, [payload])

    async def _progress(self) -> None:
        if self._failure is not None:
            raise self._failure
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _take(self, most: int) -> Events:
        """The next events with their ids; `_acknowledge` or `_fail` must follow."""
        payloads = self._pending[: most if self._barrier is None else min(most, self._barrier)]
        self._taken = len(payloads)
        return [(self.stream_id, event_id, payload) for event_id, payload in enumerate(payloads, self._last + 1)]

    def _acknowledge(self) -> int:
        """Move the taken events behind the last committed id; returns their bytes."""
        done = self._pending[: self._taken]
        del self._pending[: self._taken]
        self._last += self._taken
        if self._barrier is not None:
            self._barrier -= self._taken
        self._taken = 0
        size = sum(map(len, done))
        self._size -= size
        self._wake()
        return size

    def _fail(self, failure: Exception) -> int:
        """No more writing; returns the bytes dropped."""
        size, self._size = self._size, 0
        self._failure = failure
        self._pending.clear()
        self._taken = 0
        self._wake()
        return size


class Log:
    """The lane of this process. `run` must be running for anything to be saved."""

    def __init__(self, appender: Appender, replica: Replica, hub: Hub, *, limits: Limits, metrics: Metrics) -> None:
        self._appender = appender
        self._replica = replica
        self._hub = hub
        self.limits = limits
        self._metrics = metrics
        self._writers: dict[UUID, Writer] = {}
        self._ready: dict[UUID, Writer] = {}
        self._bytes = 0
        self._wake = asyncio.Event()
        # When the oldest of the events now pending came.
        self._oldest: float | None = None
        self._pace = Pace(limits.flush_gap_s)
        self.on_fenced: Callable[[], None] = lambda: None
        # Told of each stream that will not be written any more, and of each that waits for longer than `unsaved_s`.
        self.on_lost: Callable[[UUID], None] = lambda _: None
        self.on_unsaved: Callable[[UUID], None] = lambda _: None
        # Set by a fence; whoever makes the replica a new incarnation clears it.
        self.fenced = False
        # A flush has failed and is tried again.
        self.waiting = False

    @property
    def full(self) -> bool:
        return self._bytes > self.limits.total_bytes

    def owns(self, stream_id: UUID) -> bool:
        """Whether this process writes the stream, so that its readers here hear of every event from the lane."""
        return stream_id in self._writers

    def last_id(self, stream_id: UUID) -> int | None:
        """The last committed id of a stream that this process writes, while it has not ended."""
        writer = self._writers.get(stream_id)
        return None if writer is None or writer._ended else writer.last_id

    def open(self, stream_id: UUID, *, last_id: int) -> Writer:
        """The writer of a stream whose row names this replica as its owner. `close` must follow."""
        writer = self._writers[stream_id] = Writer(self, stream_id, last_id, self._replica.id)
        return writer

    def close(self, writer: Writer) -> None:
        if self._writers.get(writer.stream_id) is writer:
            del self._writers[writer.stream_id]
            self._ready.pop(writer.stream_id, None)
            if not writer._ended:
                self._hub.let_go(writer.stream_id)
            if isinstance(writer._failure, StreamLost):
                # No event will tell its readers; the table does.
                self._hub.stir(writer.stream_id)
        self._bytes -= writer._fail(Fenced("closed"))

    # -- the lane

    async def run(self) -> None:
        """Flush for ever. Cancelling it in mid flush is safe: the statement commits or not, and ids are not reused."""
        try:
            while True:
                await self._wake.wait()
                await self._pace.wait()
                await self.flush()
        finally:
            self._appender.disconnect()

    def fence(self, fenced: Fenced) -> None:
        """This replica was declared dead: nothing more of what it has is written."""
        log.error("replica_fenced", replica=str(self._replica.id))
        for writer in self._writers.values():
            self._bytes -= writer._fail(fenced)
        self._ready.clear()
        self.fenced = True
        self.on_fenced()

    async def flush(self) -> None:
        """Commit what is pending now, up to one batch, however often the connection breaks on the way."""
        self._wake.clear()
        writers, events = self._take()
        if not events:
            return
        started, oldest = perf_counter(), self._oldest
        self._oldest = None
        await self._commit(writers, events)
        self._metrics.flush_seconds.observe(perf_counter() - started)
        self._metrics.added_latency.observe(perf_counter() - (oldest or started))
        self._metrics.flush_events.observe(len(events))
        self._pace.flushed(len(events))
        if self._ready:
            self._wake.set()

    def _arrived(self, writer: Writer, size: int) -> None:
        self._bytes += size
        if self._oldest is None:
            self._oldest = perf_counter()
        self._ready[writer.stream_id] = writer
        self._wake.set()

    def _resume(self, writer: Writer) -> None:
        if writer._pending:
            self._ready[writer.stream_id] = writer
            self._wake.set()

    def _take(self) -> tuple[list[Writer], Events]:
        writers: list[Writer] = []
        events: Events = []
        while self._ready and len(events) < self.limits.flush_events:
            writer = self._ready.pop(next(iter(self._ready)))
            if taken := writer._take(self.limits.flush_events - len(events)):
                writers.append(writer)
                events += taken
        return writers, events

    async def _commit(self, writers: list[Writer], events: Events) -> None:
        try:
            await self._append(events)
        except _BAD_EVENTS as error:
            await self._bisect(writers, events, error)
        except Fenced as fenced:
            self.fence(fenced)
        else:
            for writer in writers:
                self._committed(writer)

    def _committed(self, writer: Writer) -> None:
        # A writer closed meanwhile (its run was cancelled) has dropped what it had; the rows stay, as they must.
        if taken := writer._pending[: writer._taken]:
            first = writer._last + 1
            self._bytes -= writer._acknowledge()
            self._publish(writer.stream_id, first, taken)
            self._resume(writer)

    def _publish(self, stream_id: UUID, first: int, payloads: Sequence[str]) -> None:
        self._metrics.events_stored += len(payloads)
        if _VERBOSE.isEnabledFor(logging.DEBUG):
            _tell(stream_id, first, payloads)
        self._hub.publish(stream_id, first, payloads)

    async def _bisect(self, writers: list[Writer], events: Events, error: Exception) -> None:
        """One stream's bad payload must not stop the others: halve the batch by streams until it stands alone."""
        if len(writers) == 1:
            self._lose(writers[0], error)
            return
        middle = len(writers) // 2
        for half in (writers[:middle], writers[middle:]):
            mine = {writer.stream_id for writer in half}
            await self._commit(half, [event for event in events if event[0] in mine])

    def _lose(self, writer: Writer, error: Exception) -> None:
        log.error("stream_lost", streaming_session_id=str(writer.stream_id), reason=str(error))
        self._ready.pop(writer.stream_id, None)
        self._bytes -= writer._fail(StreamLost(str(error)))
        self.on_lost(writer.stream_id)

    async def _append(self, events: Events) -> None:
        """Append under the fence, for as long as it takes; the same ids each time, so that nothing doubles (D9)."""
        again, pause, began = False, 0.02, monotonic()
        while True:
            try:
                if not self._appender.connected:
                    lost = await self._connect()
                    events = [event for event in events if event[0] not in lost]
                await self._appender.append(events, again=again)
                self.waiting = False
                return
            except _REFUSED:
                raise
            except Exception as error:  # noqa: BLE001
                # Whatever else a flush raises means that this connection cannot be trusted any more; asyncpg raises
                # more kinds than a list here could keep up with.
                log.warning("log_waiting", reason=why(error), events=len(events))
                if not isinstance(error, asyncpg.DiskFullError):  # a full disk is no reason to reconnect
                    self._appender.disconnect()
                again = self.waiting = True
                if monotonic() - began > self.limits.unsaved_s:
                    self._report_unsaved()
                await asyncio.sleep(pause)
                pause = min(pause * 2, 1.0)

    async def _connect(self) -> set[UUID]:
        """Returns the streams that go no further here: what is committed of them is not there any more (D8)."""
        writers = {writer.stream_id: writer for writer in self._writers.values() if writer._failure is None}
        lost = await self._appender.connect({stream_id: writer.last_id for stream_id, writer in writers.items()})
        for stream_id, writer in writers.items():
            if stream_id in lost:
                self._lose(writer, StreamLost(f"event {writer.last_id} was committed and is not in the table"))
        return lost

    def _report_unsaved(self) -> None:
        for writer in list(self._writers.values()):
            if writer._pending:
                self.on_unsaved(writer.stream_id)


def _tell(stream_id: UUID, first: int, payloads: Sequence[str]) -> None:
    for event_id, payload in enumerate(payloads, first):
        log.debug("event_emitted", streaming_session_id=str(stream_id), id=event_id, event_kind=kind_of(payload))
