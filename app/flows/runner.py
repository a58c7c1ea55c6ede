"""Runs answers in the background: reads the provider, appends to the log, ends the stream whatever happens.

Bounded by `max_runs`; each run by its deadline, the length of its answer and the log's buffers.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import perf_counter
from uuid import UUID

import structlog

from app.errors import Misconfigured, ParleyError, Unavailable
from app.flows.attempts import begun
from app.flows.ending import Ending
from app.flows.run import Failure, Progress, Result, Run
from app.providers.provider import Chunk, Effort, Finish, ProviderError, Text, Usage
from app.providers.registry import Providers
from app.streams.log import Log, StreamLost, Writer
from app.streams.replicas import Fenced
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# How long the ends of stopped answers may take to be saved when the server stops.
_END_S = 5

_STOPPED = Failure("replica_stopped", "The server was stopped before the answer was complete.", retryable=True)
_LATE = Failure("run_timeout", "The answer took longer than a run may take.", retryable=True)
_BROKEN = Failure("internal_error", "Something went wrong inside; the error_id names it.")


@dataclass(frozen=True, slots=True)
class Bounds:
    """`answer_bytes` counts UTF-8."""

    max_runs: int = 2000
    run_s: float = 300
    answer_bytes: int = 1 << 20


class Runner:
    """The answers under way on this replica."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        event_log: Log,
        *,
        providers: Providers,
        ending: Ending,
        metrics: Metrics,
        bounds: Bounds,
        effort: Effort,
    ) -> None:
        self._tasks = tasks
        self._log = event_log
        self._providers = providers
        self._ending = ending
        self._metrics = metrics
        self._bounds = bounds
        self._effort = effort
        self._running: dict[UUID, asyncio.Task[None]] = {}
        self._reading: set[asyncio.Task[None]] = set()
        self._stopping = self._closed = False
        event_log.on_fenced = self._cancel_all

    @property
    def active(self) -> int:
        return len(self._running)

    def admit(self) -> None:
        """Raises Unavailable when this replica is full; asked before any row is written."""
        if len(self._running) >= self._bounds.max_runs:
            raise Unavailable("overloaded", "Too many answers are under way; try again soon.", retry_after=2)

    def start(self, run: Run) -> None:
        """Take over a stream whose accepting transaction has committed.

        Raises Unavailable when the server has stopped meanwhile; a successor ends the stream then.
        """
        if self._closed:
            raise Unavailable("draining", "The server is stopping; send it again.", retry_after=1)
        task = self._tasks.create_task(self._run(run), name=f"run {run.stream.id}")
        self._running[run.stream.id] = task
        self._metrics.active_streams.set(len(self._running))
        task.add_done_callback(lambda _: self._done(run.stream.id))

    async def drain(self, grace_s: float) -> None:
        """Let answers finish for `grace_s`, then end the rest as failed with what they have.

        An end that cannot be saved in time is left to the takeover by another replica.
        """
        self._stopping = True
        await self._settle(grace_s)
        for task in self._reading:
            task.cancel()
        await self._settle(_END_S)
        self._closed = True
        self._cancel_all()
        await self._settle(None)

    async def _settle(self, timeout_s: float | None) -> None:
        if self._running:
            await asyncio.wait(self._running.values(), timeout=timeout_s)

    def _done(self, stream_id: UUID) -> None:
        del self._running[stream_id]
        self._metrics.active_streams.set(len(self._running))

    def _cancel_all(self) -> None:
        for task in self._running.values():
            task.cancel()

    async def _run(self, run: Run) -> None:
        bound = {"streaming_session_id": str(run.stream.id), "request_id": run.request_id}
        writer = self._log.open(run.stream.id, last_id=1)
        with structlog.contextvars.bound_contextvars(**bound):
            log.info("processing_started", chatbot=run.stream.chatbot_id, flow=run.stream.flow_type)
            try:
                result = await self._answer(run, writer)
                await self._ending.conclude(run.stream, writer, result)
                _report_end(result, writer)
            except (Fenced, StreamLost) as lost:
                log.warning("run_lost", reason=type(lost).__name__)
            except asyncio.CancelledError:
                log.warning("run_abandoned")
            except Exception:  # around one flow: its end could not be written; the takeover tries again
                log.exception("run_crashed")
                self._ending.leave(run.stream)
            finally:
                self._log.close(writer)

    async def _answer(self, run: Run, writer: Writer) -> Result:
        progress = Progress(run.flow.endpoint.name, run.prompt.model)
        self._reading.add(task := _this_task())
        try:
            failure = await self._outcome(run, writer, progress)
        finally:
            self._reading.discard(task)
        progress.duration_ms = _ms_since(run.started)
        if failure is None:
            writer.append("flow_end", _flow_end(run, progress))
        return Result(progress, failure)

    async def _outcome(self, run: Run, writer: Writer, progress: Progress) -> Failure | None:
        try:
            async with asyncio.timeout(self._bounds.run_s):
                await self._read(run, writer, progress)
            return None
        except ProviderError as error:
            return Failure(error.code, error.detail, error.retryable)
        except Misconfigured as error:
            log.error("flow_misconfigured", detail=error.detail)
            return Failure("flow_misconfigured", "The chatbot's provider is not configured on this server.")
        except ParleyError as error:
            return Failure(error.code, error.detail, retryable=True)
        except TimeoutError:
            return _LATE
        except asyncio.CancelledError:
            return self._cancelled()
        except (Fenced, StreamLost):
            raise
        except Exception:  # around one flow: its bug must not leave the stream without an end
            log.exception("flow_crashed")
            return _BROKEN

    def _cancelled(self) -> Failure:
        if not self._stopping:
            raise asyncio.CancelledError
        _this_task().uncancel()
        return _STOPPED

    async def _read(self, run: Run, writer: Writer, progress: Progress) -> None:
        provider = self._providers.get(run.flow.endpoint)
        flow = run.stream.flow_type
        log.info("parallel_started", flows=[flow])
        writer.append(
            "flow_start", {"flow": flow, "provider": progress.provider, "model": progress.model, "attempt": 1}
        )
        first, rest = await begun(lambda: provider.stream(run.prompt), self._effort)
        async with aclosing(rest):
            self._first_token(run, progress)
            if not self._take(first, flow, writer, progress):
                return
            async for batch in rest:
                if not self._take(batch, flow, writer, progress):
                    return
                if writer.crowded():
                    await writer.room()

    def _first_token(self, run: Run, progress: Progress) -> None:
        progress.first_token_ms = _ms_since(run.started)
        self._metrics.first_token.observe(progress.first_token_ms / 1000)

    def _take(self, batch: Sequence[Chunk], flow: str, writer: Writer, progress: Progress) -> bool:
        """Append a batch; false when the answer is as long as it may be."""
        for chunk in batch:
            match chunk:
                case Text(text):
                    writer.append("token", {"token": text, "markers": {}, "flow": flow})
                    progress.pieces.append(text)
                    progress.size += len(text.encode())
                    if progress.size >= self._bounds.answer_bytes:
                        progress.finish_reason = "length"
                        return False
                case Finish(reason):
                    progress.finish_reason = reason
                case Usage():
                    progress.usage = chunk
        return True


def _this_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


def _flow_end(run: Run, progress: Progress) -> dict[str, object]:
    return {
        "flow": run.stream.flow_type,
        "finish_reason": progress.finish_reason,
        "usage": progress.usage_json(),
        "ttft_ms": progress.first_token_ms,
        "duration_ms": progress.duration_ms,
    }


def _report_end(result: Result, writer: Writer) -> None:
    log.info(
        "stream_completed",
        status=result.status,
        error_code=result.failure.code if result.failure else None,
        events=writer.last_id,
        first_token_ms=result.progress.first_token_ms,
        duration_ms=result.progress.duration_ms,
        **result.progress.usage_json(),
    )


def _ms_since(started: float) -> int:
    return round((perf_counter() - started) * 1000)
