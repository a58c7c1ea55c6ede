"""The runs under way on this replica: started, stopped, and ended whatever happens.

Bounded by `max_runs`; each run by its deadline, its plan, the length of an answer and the log's buffers.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from uuid import UUID

import structlog

from app.errors import Misconfigured, Unavailable
from app.flows.call import Call, Means
from app.flows.config import Choice, Flow
from app.flows.ending import Ending
from app.flows.execution import Execution
from app.flows.past import Past
from app.flows.run import LOG_LOST, Failure, Progress, Result, Run
from app.streams.appending import StreamLost
from app.streams.log import Log, Writer
from app.streams.replicas import Fenced
from app.streams.stream import Stream

log = structlog.get_logger(__name__)

# How long what a released answer has said may take to be saved when the server stops, in seconds.
_RELEASE_S = 1.0
# And how long the rest may then take to give up whatever it waits for: a database that hangs, for one.
_GIVE_UP_S = 0.5

_UNSAVED = Failure("log_unavailable", "The answer could not be saved in time: the database was away.", retryable=True)
_LATE = Failure("run_timeout", "The answer took longer than a run may take.", retryable=True)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Runs at once, and the longest run in seconds."""

    max_runs: int = 2000
    run_s: float = 300


class Runner:
    """The answers under way on this replica."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        event_log: Log,
        *,
        ending: Ending,
        means: Means,
        bounds: Bounds,
    ) -> None:
        self._tasks = tasks
        self._log = event_log
        self._ending = ending
        self._means = means
        self._bounds = bounds
        self._running: dict[UUID, asyncio.Task[None]] = {}
        self._executions: dict[UUID, Execution] = {}
        self._closed = False
        self.on_end: Callable[[Stream], Awaitable[object]] = _nothing
        event_log.on_fenced = self._cancel_all
        event_log.on_lost = lambda stream_id: self._end(stream_id, LOG_LOST)
        event_log.on_unsaved = lambda stream_id: self._end(stream_id, _UNSAVED)

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def room(self) -> int:
        """How many runs more there may be."""
        return max(0, self._bounds.max_runs - len(self._running))

    def admit(self, flow: Flow) -> None:
        """Raises Unavailable when this replica or every provider of the flow is full; asked before a row is written."""
        if not self.room:
            raise Unavailable("overloaded", "Too many answers are under way; try again soon.", retry_after=2)
        if all(self._full(choice) for choice in flow.choices):
            raise Unavailable("upstream_busy", "The AI provider is at capacity; try again soon.", retry_after=1)

    def _full(self, choice: Choice) -> bool:
        try:
            return self._means.providers.get(choice.endpoint).full
        except Misconfigured:  # the run tells it, with an error_id
            return False

    def start(self, run: Run, past: Past | None = None) -> None:
        """Run a stream whose accepting, or claiming, transaction has committed; with its `past` if it has begun.

        Nothing happens where the server has stopped meanwhile: the stream is durable, and its next owner runs it.
        """
        stream = run.stream
        if self._closed or stream.id in self._running:
            return
        writer = self._log.open(stream.id, last_id=past.last_id if past else 1)

        async def save(answer: Progress) -> None:
            await self._ending.save_answer(stream, writer, answer)

        execution = self._executions[stream.id] = Execution(run, writer, means=self._means, save=save, past=past)
        for kind, data in past.unsaid if past else ():
            writer.append(kind, data)
        task = self._tasks.create_task(self._run(run, writer, execution), name=f"run {stream.id}")
        self._running[stream.id] = task
        self._means.metrics.active_streams.set(len(self._running))
        task.add_done_callback(lambda _: self._done(writer))

    def stop(self, stream_id: UUID, why: Failure, flow: str | None = None) -> list[Call]:
        """End a run, or one flow of it, if it is under way here; the calls that are ended by it."""
        execution = self._executions.get(stream_id)
        return [] if execution is None else execution.stop(why, flow)

    def _end(self, stream_id: UUID, why: Failure) -> None:
        self.stop(stream_id, why)

    @property
    def under_way(self) -> set[UUID]:
        """The streams of all runs here."""
        return set(self._running)

    def runs(self, stream_id: UUID) -> bool:
        return stream_id in self._executions

    def user_of(self, stream_id: UUID) -> str | None:
        """Whose answer it is, of a run here."""
        execution = self._executions.get(stream_id)
        return None if execution is None else execution.user_id

    def abandonable(self) -> dict[UUID, float]:
        """The runs here that shall stop when nobody has read them for so many seconds."""
        runs = {stream_id: execution.abandon_s for stream_id, execution in self._executions.items()}
        return {stream_id: seconds for stream_id, seconds in runs.items() if seconds is not None}

    async def ended(self, stream_id: UUID, within_s: float) -> None:
        """Wait until a run here has written its end, or for so long."""
        if (task := self._running.get(stream_id)) is not None:
            await asyncio.wait([task], timeout=within_s)

    async def drain(self, grace_s: float) -> None:
        """Let answers finish for `grace_s`, then stop the rest without an end and save what they have said.

        Whoever owns them next begins them again; nothing is started here any more.
        """
        await self._settle(grace_s)
        self._closed = True
        self._cancel_all()
        await self._settle(_RELEASE_S)
        self._cancel_all()
        await self._settle(_GIVE_UP_S)

    async def _settle(self, timeout_s: float) -> None:
        """Wait until nothing runs, for so long at most; what was accepted on the way has its time, too."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        while self._running and until > loop.time():
            await asyncio.wait(self._running.values(), timeout=until - loop.time())

    def _done(self, writer: Writer) -> None:
        del self._running[writer.stream_id], self._executions[writer.stream_id]
        self._log.close(writer)
        self._means.metrics.active_streams.set(len(self._running))

    def _cancel_all(self) -> None:
        for task in self._running.values():
            task.cancel()

    async def _run(self, run: Run, writer: Writer, execution: Execution) -> None:
        stream = run.stream
        late = asyncio.get_running_loop().call_later(self._bounds.run_s, execution.stop, _LATE)
        bound = {"streaming_session_id": str(stream.id), "request_id": run.request_id}
        with structlog.contextvars.bound_contextvars(**bound):
            log.info("processing_started", chatbot=stream.chatbot_id, flow=stream.flow_type)
            try:
                result = await execution.perform()
                await self._ending.conclude(stream, writer, result)
                _report_end(result, writer)
                self._log.close(writer)
                await self.on_end(stream)
            except Fenced:
                log.warning("run_lost", reason="Fenced")
            except StreamLost:
                log.warning("run_lost", reason="StreamLost")
                await self._lose(stream, writer, execution.answer)
            except asyncio.CancelledError:
                await self._let_go(writer)
            except Exception:  # around one run: its end is left unwritten, and the takeover tries again
                log.exception("run_crashed")
                self._ending.leave(stream)
            finally:
                late.cancel()

    async def _let_go(self, writer: Writer) -> None:
        """Stopped from outside, its providers' connections closed: drained, or not ours any more."""
        log.warning("run_abandoned")
        if self._closed:
            with contextlib.suppress(Fenced, StreamLost):
                await writer.saved()

    async def _lose(self, stream: Stream, writer: Writer, answer: Progress) -> None:
        """End a stream that the log has lost; its readers are told with 410."""
        answer.failure = LOG_LOST
        try:
            await self._ending.lose(stream, writer.last_id, answer)
        except Fenced:
            log.warning("run_lost", reason="Fenced")
        else:
            self._log.close(writer)
            await self.on_end(stream)


async def _nothing(_: Stream) -> None:
    """Nobody waits for the end of a run."""


def _report_end(result: Result, writer: Writer) -> None:
    log.info(
        "stream_completed",
        status=result.status,
        error_code=result.failure.code if result.failure else None,
        events=writer.last_id,
        first_token_ms=result.answer.first_token_ms,
        duration_ms=result.answer.duration_ms,
        **result.usage_json(),
    )
