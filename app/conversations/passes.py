"""Passes over all sources: what the job, the command and a webhook run, and what operators are told of them."""

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from time import monotonic

import asyncpg
import structlog

from app.conversations import source_state
from app.conversations.batch import Bounds, Found, Progress
from app.conversations.discovery import Discovery
from app.conversations.foreign import Foreign
from app.conversations.forgetting import forget_stale
from app.conversations.source_state import Outcome, Told
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.conversations.sources.source import Source, all_sources
from app.errors import ParleyError
from app.postgres import AWAY, CONFLICT, Pool
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# Sources that are read at once, and how long the job goes on while any of them has more, in seconds.
_AT_ONCE = 2
_JOB_S = 120
# As many failures in a row are an operator's business.
_FAILURES = 3
_LAST_PASSES = 100
# Any two numbers will do as long as no other lock of ours uses the first one.
_LOCK = 0x7061_7273
_TRY = f"select pg_try_advisory_lock({_LOCK}, hashtext($1))"
_FREE = f"select pg_advisory_unlock({_LOCK}, hashtext($1))"
_IS_THERE = "select is_there from conversation_index"
_OLD_RECEIPTS = """
delete from webhook_receipts where id = any(array(
    select id from webhook_receipts where received_at < parley_now() - interval '1 hour' limit 10000))
"""


@dataclass(frozen=True, slots=True)
class Result:
    """Of one pass over a source. `is_busy`: somebody else is at it."""

    source: str
    found: Found
    seconds: float = 0
    error_code: str | None = None
    error: str | None = None
    is_busy: bool = False

    @property
    def has_more(self) -> bool:
        return not (self.found.is_complete or self.found.is_stuck or self.error_code or self.is_busy)


@dataclass(slots=True, kw_only=True)
class Passes:
    """`failing` is shared with the health check: sources that fail again and again are in it."""

    pool: Pool
    bounds: Bounds
    metrics: Metrics
    failing: set[str]
    _outcomes: defaultdict[str, deque[bool]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_LAST_PASSES))
    )

    # Of passes that webhooks wait for, by source.
    _busy: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    _begun: Counter[str] = field(default_factory=Counter)
    _last: dict[str, Result] = field(default_factory=dict)

    async def run_once(self) -> int:
        """The job: over every source, those first that have waited longest, again while they have more; rows read."""
        await self.pool.execute(_OLD_RECEIPTS)
        if not await self.pool.fetchval(_IS_THERE):
            return 0
        await self.forget()
        until, rows, turn = monotonic() + _JOB_S, 0, asyncio.Semaphore(_AT_ONCE)

        async def over(source: Source) -> None:
            nonlocal rows
            more = True
            while more and monotonic() < until:
                async with turn:
                    result = await self.run(source)
                rows, more = rows + result.found.rows, result.has_more

        async with asyncio.TaskGroup() as tasks:
            for source in await self._by_waiting():
                tasks.create_task(over(source))
        await self.tell()
        return rows

    async def forget(self) -> None:
        """Take out what the index holds of sources that are no more what they were. To be called before passes."""
        async with self.pool.acquire() as connection:
            for source, conversations in (await forget_stale(connection)).items():
                log.info("source_forgotten", source=source, conversations=conversations)

    async def _by_waiting(self) -> Sequence[Source]:
        async with self.pool.acquire() as connection:
            sources = {source.id: source for source in await all_sources(connection) if source.enabled}
        waiting = sorted(await source_state.told(self.pool), key=_lag, reverse=True)
        return [sources[one.source] for one in waiting if one.source in sources]

    async def run(
        self, source: Source, *, seconds: float | None = None, alone: bool = True, progress: Progress | None = None
    ) -> Result:
        """One pass, in bounded time. What a source does wrong is in the result, and recorded. `alone`: not beside
        another one, which would do no harm.
        """
        began, found = monotonic(), Found()

        def note(so_far: Found) -> None:
            nonlocal found
            found = so_far
            if progress is not None:
                progress(so_far)

        async with self.turn(source.id, alone=alone) as is_mine:
            if not is_mine:
                return Result(source.id, found, is_busy=True)
            bounds = self.bounds if seconds is None else replace(self.bounds, seconds=seconds)
            code, error = await self._pass(source, bounds, note)
            result = Result(source.id, found, monotonic() - began, code, error)
            await self._record(result)
        return result

    async def at_once(self, source: Source, *, seconds: float) -> Result:
        """A pass that begins after this call. One at a time over a source: whoever waited shares the next one."""
        asked = self._begun[source.id]
        async with self._busy[source.id]:
            if self._begun[source.id] == asked:
                self._begun[source.id] += 1
                self._last[source.id] = await self.run(source, seconds=seconds, alone=False)
            return self._last[source.id]

    @asynccontextmanager
    async def turn(self, source: str, *, alone: bool) -> AsyncGenerator[bool, None]:
        """A lock that a killed process frees. Whoever loses it does no harm: states are compared and swapped."""
        if not alone:
            yield True
            return
        async with self.pool.acquire() as connection:
            if not await connection.fetchval(_TRY, source):
                yield False
                return
            try:
                yield True
            finally:
                # A connection that has died has freed it.
                with suppress(*AWAY):
                    await connection.execute(_FREE, source)

    async def _pass(self, source: Source, bounds: Bounds, progress: Progress) -> tuple[str | None, str | None]:
        """The code and the sentence of what went wrong."""
        try:
            connection = await open_source(source.dsn)
            try:
                foreign = Foreign(connection, await recognise(connection, source))
                engine = Discovery(self.pool, bounds)
                progress(await engine.discover(source.id, foreign, progress))
            finally:
                connection.terminate()
        except Exception as error:  # noqa: BLE001  one pass over one source; the others have theirs
            return what_of(error)
        return None, None

    async def _record(self, result: Result) -> None:
        found = result.found
        outcome = Outcome(
            *(found.rows, found.sessions, result.seconds, found.is_complete and result.error_code is None),
            *(result.error_code, result.error),
        )
        async with self.pool.acquire() as connection:
            await source_state.record(connection, result.source, outcome)
        self._count(result)
        if result.error_code:
            log.warning("discovery_failed", source=result.source, code=result.error_code, detail=result.error)
        elif found.rows:
            log.info(
                "discovery_done",
                source=result.source,
                new=found.created,
                changed=found.sessions - found.created,
                rows=found.rows,
                skipped=found.skipped.total(),
                errors=0,
                seconds=round(result.seconds, 3),
                is_complete=found.is_complete,
            )

    def _count(self, result: Result) -> None:
        source, found, metrics = result.source, result.found, self.metrics
        metrics.discovery_seconds.labels(source).set(result.seconds)
        metrics.discovery_rows.labels(source).inc(found.rows)
        metrics.discovery_sessions.labels(source).inc(found.sessions)
        metrics.discovery_created.labels(source).inc(found.created)
        for reason, count in found.skipped.items():
            metrics.discovery_skipped.labels(source, reason).inc(count)
        outcomes = self._outcomes[source]
        outcomes.append(result.error_code is not None)
        metrics.discovery_error_rate.labels(source).set(sum(outcomes) / len(outcomes))

    async def tell(self) -> None:
        """What the table says, whichever replica ran the passes: to metrics and to the health check."""
        for one in await source_state.told(self.pool):
            wrong = one.is_enabled and complaint(one) is not None
            (self.failing.add if wrong else self.failing.discard)(f"source {one.source}")
            metrics = self.metrics
            metrics.discovery_conversations.labels(one.source, one.client).set(one.conversation_count)
            metrics.discovery_failures.labels(one.source).set(one.consecutive_failures)
            if one.lag_seconds is not None:
                metrics.discovery_lag.labels(one.source).set(one.lag_seconds)
            if one.last_discovered_at is not None:
                metrics.discovery_last.labels(one.source).set(one.last_discovered_at.timestamp())


def _lag(told: Told) -> float:
    return float("inf") if told.lag_seconds is None else told.lag_seconds


def complaint(told: Told) -> str | None:
    """What is wrong with a source, in a sentence."""
    if told.consecutive_failures > _FAILURES:
        return f"has failed {told.consecutive_failures} times in a row: {told.last_error}"
    return None


def what_of(error: Exception) -> tuple[str, str]:
    """A stable code and a sentence without anything of the rows."""
    match error:
        case ParleyError():
            return error.code, error.detail
        case asyncpg.LockNotAvailableError():
            return "source_locked", "Somebody holds a lock on the table."
        case asyncpg.QueryCanceledError():
            return "source_slow", "A statement took too long, or was cancelled."
        case asyncpg.UndefinedTableError() | asyncpg.UndefinedColumnError():
            return "source_changed", "The table has gone or changed while it was read."
        case asyncpg.InsufficientPrivilegeError():
            return "source_table", "The table may not be read."
        case _ if isinstance(error, (*AWAY, *CONFLICT)):
            return "source_database", f"A database is away: {type(error).__name__}."
        case asyncpg.PostgresError():
            return "source_failed", f"The database refuses: {type(error).__name__}."
        case _:
            log.error("discovery_crashed", exc_info=error)
            return "internal_error", f"A bug: {type(error).__name__}."
