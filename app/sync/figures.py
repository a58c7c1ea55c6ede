"""What exchanges come to: a line in the log for each, metrics without users, and a row for each user and hour."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import structlog
from starlette.requests import ClientDisconnect

from app.errors import ParleyError
from app.expiry import Rows
from app.postgres import AWAY, Pool
from app.sync.exchange import Answer, Did
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# Users whose figures wait to be written; of more, only the metrics know.
MOST_USERS = 10_000

# Not of names that somebody made up, nor of a user who was erased meanwhile.
_SAVE = """
insert into sync_hours as h (user_id, hour, exchanges, refused, mutations, rows_written, conflicts, resyncs, bytes_up,
    bytes_down, duration_ms)
select u.user_id, date_trunc('hour', parley_now()), u.exchanges, u.refused, u.mutations, u.written, u.conflicts,
    u.resyncs, u.up, u.down, u.ms
from unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[],
    $8::bigint[], $9::bigint[], $10::float8[])
    as u(user_id, exchanges, refused, mutations, written, conflicts, resyncs, up, down, ms)
where exists (select from sync_head where user_id = u.user_id)
order by 1
on conflict (user_id, hour) do update set exchanges = h.exchanges + excluded.exchanges,
    refused = h.refused + excluded.refused, mutations = h.mutations + excluded.mutations,
    rows_written = h.rows_written + excluded.rows_written, conflicts = h.conflicts + excluded.conflicts,
    resyncs = h.resyncs + excluded.resyncs, bytes_up = h.bytes_up + excluded.bytes_up,
    bytes_down = h.bytes_down + excluded.bytes_down, duration_ms = h.duration_ms + excluded.duration_ms
"""


@dataclass(slots=True)
class Exchange:
    """One, while it is under way. Whoever serves it fills in what becomes known: whose it is, sizes in bytes."""

    user_id: str | None = None
    client: str = ""
    up: int = 0
    down: int = 0
    answer: Answer | None = None


@dataclass(slots=True)
class _Sums:
    exchanges: int = 0
    refused: int = 0
    mutations: int = 0
    written: int = 0
    conflicts: int = 0
    resyncs: int = 0
    up: int = 0
    down: int = 0
    ms: float = 0

    def add(self, other: "_Sums") -> None:
        for name in _Sums.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Figures:
    """Of one replica. What was not written yet goes with a replica that is killed: a minute's figures at most."""

    def __init__(self, pool: Pool, metrics: Metrics) -> None:
        self._pool = pool
        self._metrics = metrics
        # Looked up once: most exchanges end well and have nothing to do.
        self._done = metrics.sync_exchanges.labels("done")
        self._up, self._down = metrics.sync_bytes.labels("up"), metrics.sync_bytes.labels("down")
        self._sums: dict[str, _Sums] = {}

    @contextmanager
    def exchange(self) -> Generator[Exchange, None, None]:
        """Watch one, however it ends."""
        one, began, outcome = Exchange(), perf_counter(), "crashed"
        try:
            yield one
            outcome = "done"
        except ParleyError as refused:
            outcome = refused.code
            raise
        except AWAY:
            outcome = "database_unavailable"
            raise
        except (ClientDisconnect, asyncio.CancelledError):
            outcome = "disconnected"
            raise
        finally:
            self._note(one, outcome, perf_counter() - began)

    def _note(self, one: Exchange, outcome: str, seconds: float) -> None:
        self._count(one, outcome, seconds)
        told: dict[str, Any] = {"outcome": outcome, "ms": round(seconds * 1000, 1), "up": one.up, "down": one.down}
        if (answer := one.answer) is not None:
            told |= {**answer.did.told(), "chats": len(answer.chats), "messages": len(answer.messages)}
            told |= {"bootstrap": answer.resync or "new"} if answer.bootstrap else {}
        log.info("chats_synchronised", client=one.client, **told)
        if one.user_id is not None:
            self._add(one, outcome, seconds)

    def _count(self, one: Exchange, outcome: str, seconds: float) -> None:
        metrics = self._metrics
        (self._done if outcome == "done" else metrics.sync_exchanges.labels(outcome)).inc()
        metrics.sync_seconds.observe(seconds)
        self._up.inc(one.up)
        self._down.inc(one.down)
        if (answer := one.answer) is None:
            return
        metrics.sync_mutations.observe(answer.did.mutations)
        metrics.sync_rows.observe(answer.did.rows)
        if answer.bootstrap:
            metrics.sync_bootstraps.labels(answer.resync or "new").inc()
        if answer.did.mutations:
            self._count_push(answer.did)

    def _count_push(self, did: Did) -> None:
        for status, count in did.conflicts.items():
            self._metrics.sync_conflicts.labels(status).inc(count)
        self._metrics.sync_failed.labels("brought").inc(did.failed)
        self._metrics.sync_failed.labels("mended").inc(did.mended)

    def _add(self, one: Exchange, outcome: str, seconds: float) -> None:
        assert one.user_id is not None
        if one.user_id not in self._sums and len(self._sums) >= MOST_USERS:
            return
        sums = self._sums.setdefault(one.user_id, _Sums())
        sums.exchanges += 1
        sums.refused += outcome != "done"
        sums.up += one.up
        sums.down += one.down
        sums.ms += seconds * 1000
        if (answer := one.answer) is not None:
            sums.mutations += answer.did.mutations
            sums.written += answer.did.rows
            sums.conflicts += sum(answer.did.conflicts.values())
            sums.resyncs += answer.resync is not None

    async def run_once(self) -> None:
        """Write what has come together, into the hour that it is now by the database's clock."""
        if not (sums := self._sums):
            return
        self._sums = {}
        lines = [(user_id, *(getattr(one, name) for name in _Sums.__slots__)) for user_id, one in sums.items()]
        try:
            await self._pool.execute(_SAVE, *map(list, zip(*lines, strict=True)))
        except BaseException:
            for user_id, one in sums.items():
                self._sums.setdefault(user_id, _Sums()).add(one)
            raise


def hours_expiring(keep_s: float) -> Rows:
    return Rows("sync_hours", "hour", keep_s)
