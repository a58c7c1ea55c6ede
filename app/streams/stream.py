"""The stream of one answer as a row: begun when a message is accepted, ended once, claimed when its owner died."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from time import monotonic
from typing import Any
from uuid import UUID

import asyncpg
import structlog

from app.expiry import Rows
from app.postgres import AWAY, CONFLICT, Connection, Pool, prompt_connection, why
from app.statement import Part, fetch_together
from app.streams.appending import StreamLost, insert_event
from app.streams.event import TERMINAL, Kind, Status, encode
from app.streams.log import Writer
from app.streams.replicas import Replica

log = structlog.get_logger(__name__)

# A new stream's id (RFC 9562, version 7) as an SQL expression over `random_part()`. Its milliseconds come from the
# database's clock: the stream lies in one day partition for life, and replicas whose clocks differ agree which one.
NEW_ID = "(lpad(to_hex((extract(epoch from parley_now()) * 1000)::bigint), 12, '0') || {random_part})::uuid"

# The caller's transaction takes the fence.
_BEGIN = """
stream as (
    insert into streaming_sessions
        (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, replica_id, abandon_s, request)
    values ($1, $2, $3, $4, $5, $6, 'active', $7, $9, $10)),
first_event as (
    insert into streaming_events (stream_id, id, payload) values ($1, 1, $8))
"""
_BEGIN_QUEUED = """
stream as (
    update streaming_sessions
    set status = 'active', chatbot_version = $5, flow_type = $6, replica_id = $7, abandon_s = $9, request = $10
    where id = $1 and user_id = $2 and session_id = $3 and chatbot_id = $4 and status = 'queued' returning id),
first_event as (
    insert into streaming_events (stream_id, id, payload) select id, 1, $8 from stream)
"""
_ENQUEUE = f"""
insert into streaming_sessions (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status)
values ({NEW_ID.format(random_part="$1")}, $2, $3, $4, $5, $6, 'queued')
returning id
"""
_RESERVE = "update streaming_sessions set quota_day = $2, quota_subjects = $3, quota_tokens = $4 where id = $1"
_RESERVED = "quota_day, quota_subjects, quota_tokens"
_HELD = f"select {_RESERVED} from streaming_sessions where id = $1 and quota_day is not null"
_END_QUEUED = f"""
with s as (
    update streaming_sessions set status = $2, last_event_id = 1, ended_at = now()
    where id = $1 and status = 'queued' returning id, {_RESERVED}),
     e as (insert into streaming_events (stream_id, id, payload) select id, 1, $3 from s)
select {_RESERVED} from s
"""
# '{}' stands for the whole run and is never narrowed down again. No chatbot has more flows than are kept here.
_ASK_TO_STOP = """
update streaming_sessions set cancel_flows = case
    when $2::text is null or cancel_flows = '{}' then '{}'
    when $2 = any(cancel_flows) or cardinality(cancel_flows) >= 50 then cancel_flows
    else array_append(coalesce(cancel_flows, '{}'), $2) end
where id = $1 and status = 'active' and ($3::text is null or user_id = $3)
"""
_ASKED_TO_STOP = """
select id, cancel_flows from streaming_sessions
where replica_id = $1 and cancel_flows is not null and status in ('queued', 'active') limit $2
"""
_NOTE_READERS = """
update streaming_sessions set read_at = now()
where id = any($1::uuid[]) and status = 'active' and abandon_s is not null and replica_id <> $2
"""
_UNREAD = """
select id from streaming_sessions
where id = any($1::uuid[]) and (read_at is null or read_at < now() - make_interval(secs => abandon_s))
"""
_END = f"""
update streaming_sessions set status = $2, last_event_id = $3, ended_at = now(), request = null
where id = $1 and status in ('queued', 'active')
returning {_RESERVED}
"""
# No event: the log cannot take one. Its end lies beyond every id that anybody was given, so all readers get 410.
_LOSE = f"""
update streaming_sessions set status = 'failed', ended_at = now(), request = null,
    last_event_id = greatest($2, (select max(id) from streaming_events where stream_id = $1)) + 1
where id = $1 and status in ('queued', 'active')
returning {_RESERVED}
"""
_IS_OVER = "select status not in ('queued', 'active') from streaming_sessions where id = $1"
# Nobody lives who runs it, or it is in doubt. With $4 only what cannot be begun again and is merely to be ended.
_IS_ORPHAN = """
s.status = 'active'
and (not exists (select from replicas r where r.id = s.replica_id and r.alive) or s.id = any($3::uuid[]))
and (not $4 or s.cancel_flows = '{}' or s.request is null or s.attempt >= $5)
"""
# Runs after the fencing of dead owners has committed: in one statement its snapshot would be older than that. Each
# living replica takes its share, so that several take over what one has left.
_CLAIM = f"""
with o as materialized (select 1 from replicas where id = $1 and alive for share),
     share as materialized (
        select least($2, ceil(count(*)::float8 / (select greatest(count(*), 1) from replicas where alive))) as most
        from streaming_sessions s where {_IS_ORPHAN}),
     orphans as (
        select s.id from streaming_sessions s where {_IS_ORPHAN} and exists (select from o)
        order by s.id limit (select most::int from share) for update of s skip locked)
update streaming_sessions s set replica_id = $1, attempt = s.attempt + 1
from orphans where s.id = orphans.id
returning s.id, s.user_id, s.session_id, s.chatbot_id, s.chatbot_version, s.flow_type, s.attempt, s.cancel_flows,
          s.request
"""
_LET_GO = """
update streaming_sessions s set attempt = s.attempt - 1
where s.replica_id = $1 and s.status = 'active' and exists (select from replicas where id = $1 and alive for share)
"""
_OURS = "select id from streaming_sessions where replica_id = $1 and status = 'active' and id <> all($2::uuid[])"
_AGE = """
select extract(epoch from clock_timestamp() - created_at)::float8 from streaming_events where stream_id = $1 and id = 1
"""
_PAYLOAD = "select payload from streaming_events where stream_id = $1 and id = $2"

# How long a stream in doubt is left alone before it is claimed, and how long one that cannot be found is looked for
# (its accept may never have committed), in seconds.
_LEFT_ALONE_S = 5
_LOOKED_FOR_S = 60

Work = Callable[[Connection], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Stream:
    """What a run has to know of its stream."""

    id: UUID
    user_id: str
    session_id: str
    chatbot_id: str
    chatbot_version: int
    flow_type: str


@dataclass(frozen=True, slots=True)
class Orphan:
    """A claimed stream: this replica owns it now and nobody else will write it any more.

    `attempt` counts its owners. `stop` names the flows that somebody wanted to stop; none: the whole run; None:
    nothing. `request` is what it was begun with, where that was kept; `age_s` by the database's clock.
    """

    stream: Stream
    attempt: int
    stop: Sequence[str] | None
    request: str | None
    age_s: float


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a stream holds of quotas until it ends: so many tokens, and one message, of each subject on that day."""

    day: date
    subjects: Sequence[str]
    tokens: Sequence[int]


Settle = Callable[[Connection, UUID, Reservation], Awaitable[None]]


async def _unsettled(*_: object) -> None:
    """Nobody keeps quotas."""


class _Over(Exception):
    """The stream has ended already, or there is no such stream any more."""


class Streams:
    """The rows of streaming_sessions, as far as this replica owns them.

    `settle` is done once with what a stream has reserved, in the transaction that ends it.
    """

    def __init__(self, pool: Pool, replica: Replica, *, settle: Settle = _unsettled) -> None:
        self._settle = settle
        self._pool = pool
        self._replica = replica
        self._doubtful: dict[UUID, float] = {}

    async def begin(self, connection: Connection, stream: Stream, start: Mapping[str, Any]) -> None:
        """As `begun`, in a statement of its own."""
        await fetch_together(connection, [self.begun(stream, start)], "select")

    def begun(
        self,
        stream: Stream,
        start: Mapping[str, Any],
        *,
        queued: bool = False,
        abandon_s: float | None = None,
        request: str | None = None,
    ) -> Part:
        """Makes an active stream of this replica with its first event `stream_start`.

        Its id must be a `NEW_ID`, or that of a stream that was `queued`; the transaction `Replica.transaction`. With
        `abandon_s`, replicas note for each other that somebody reads it; with `request`, what it needs besides its
        rows, it can be begun again by another one.
        """
        # Until the caller confirms: a COMMIT without an answer may leave a stream that nobody runs.
        self.doubt(stream.id)
        fields = (getattr(stream, field) for field in Stream.__slots__)
        values = (*fields, self._replica.id, encode("stream_start", start), abandon_s, request)
        return Part(_BEGIN_QUEUED if queued else _BEGIN, values)

    async def enqueue(
        self,
        connection: Connection,
        user_id: str,
        session_id: str,
        chatbot_id: str,
        chatbot_version: int,
        flow_type: str,
    ) -> Stream:
        """Make a stream without events that nobody owns, in the caller's transaction."""
        values = (user_id, session_id, chatbot_id, chatbot_version, flow_type)
        return Stream(await connection.fetchval(_ENQUEUE, random_part(), *values), *values)

    async def end_queued(
        self, connection: Connection, stream_id: UUID, status: Status, data: Mapping[str, Any]
    ) -> None:
        """End a stream that never began, with its only event, in the caller's transaction."""
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        payload = encode(TERMINAL, {"status": status, "usage": usage, **data})
        await self._give_back(connection, stream_id, await connection.fetchrow(_END_QUEUED, stream_id, status, payload))

    async def reserve(self, connection: Connection, stream_id: UUID, reservation: Reservation) -> None:
        """Note what a stream holds, in the transaction that makes it, begins it or changes its message."""
        values = (reservation.day, list(reservation.subjects), list(reservation.tokens))
        await connection.execute(_RESERVE, stream_id, *values)

    async def held(self, connection: Connection, stream_id: UUID) -> Reservation | None:
        """What a stream that has not ended holds; None where that is nothing."""
        row = await connection.fetchrow(_HELD, stream_id)
        return Reservation(*row) if row else None

    async def _give_back(self, connection: Connection, stream_id: UUID, ended: asyncpg.Record | None) -> None:
        if ended is not None and ended["quota_day"] is not None:
            await self._settle(connection, stream_id, Reservation(*ended))

    async def ask_to_stop(
        self, connection: Connection | Pool, stream_id: UUID, flow: str | None = None, *, owner: str | None
    ) -> None:
        """Note durably that a run of this user (None: anybody), or a flow of it, shall stop: the replica that runs it
        looks, and so does a takeover.
        """
        await connection.execute(_ASK_TO_STOP, stream_id, flow, owner)

    async def asked_to_stop(self, most: int) -> list[tuple[UUID, list[str]]]:
        """Streams of this replica that somebody wants to stop; no flows means the whole run."""
        rows = await self._pool.fetch(_ASKED_TO_STOP, self._replica.id, most)
        return [(row["id"], row["cancel_flows"]) for row in rows]

    async def note_readers(self, stream_ids: Sequence[UUID]) -> None:
        """Tell the owners of streams that somebody reads them here."""
        await self._pool.execute(_NOTE_READERS, stream_ids, self._replica.id)

    async def unread(self, stream_ids: Sequence[UUID]) -> list[UUID]:
        """Those of them that no other replica has seen a reader of within their time."""
        return [row["id"] for row in await self._pool.fetch(_UNREAD, stream_ids)]

    def doubt(self, stream_id: UUID) -> None:
        """Note a stream that is perhaps ours and that nobody may be running: a later `claim` looks for it."""
        self._doubtful[stream_id] = monotonic()

    def settle(self, stream_id: UUID) -> None:
        """Somebody runs the stream, or it has ended."""
        self._doubtful.pop(stream_id, None)

    async def conclude(
        self, writer: Writer, kind: Kind, data: Mapping[str, Any], *, work: Work, status: Status | None = None
    ) -> None:
        """Append one event in one fenced transaction with `work`, and end the stream where `status` is given.

        Tries for ever while the database is away, with the same id and payload each time; `work` must bear being
        run again in a new transaction. Raises Fenced or StreamLost.
        """
        payload = encode(kind, data)
        async with writer.alone() as event_id:

            async def transaction() -> None:
                async with self._replica.transaction(writer.owner) as connection:
                    await work(connection)
                    ended = None
                    if status is not None:
                        ended = await connection.fetchrow(_END, writer.stream_id, status, event_id)
                    await insert_event(connection, writer.stream_id, event_id, payload)
                    await self._give_back(connection, writer.stream_id, ended)

            await self._until_committed(
                transaction, writer.stream_id, lambda: self._is_stored(writer.stream_id, event_id, payload)
            )
            writer.committed_alone(payload, ended=status is not None)

    async def lose(self, stream_id: UUID, last_id: int, *, work: Work) -> None:
        """End a stream as failed that the log has lost, in one fenced transaction with `work`, without an event.

        `last_id` is the last one that was ever acknowledged. Tries for ever while the database is away; nothing is
        written where the stream had ended already, or its row went with what the server has lost. Raises Fenced.
        """

        async def transaction() -> None:
            with suppress(_Over):
                async with self._replica.transaction() as connection:
                    await work(connection)
                    if (ended := await connection.fetchrow(_LOSE, stream_id, last_id)) is None:
                        raise _Over
                    await self._give_back(connection, stream_id, ended)

        await self._until_committed(transaction, stream_id, lambda: self._is_over(stream_id))

    async def _until_committed(
        self, transaction: Callable[[], Awaitable[None]], stream_id: UUID, is_done: Callable[[], Awaitable[bool]]
    ) -> None:
        pause, doubt = 0.02, False
        while True:
            try:
                if doubt and await is_done():
                    return
                await transaction()
                return
            except CONFLICT:
                log.info("transaction_conflict", streaming_session_id=str(stream_id))
            except AWAY as error:
                log.warning("log_waiting", streaming_session_id=str(stream_id), reason=why(error))
                doubt = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _is_stored(self, stream_id: UUID, event_id: int, payload: str) -> bool:
        stored = await self._pool.fetchval(_PAYLOAD, stream_id, event_id)
        if stored not in (None, payload):
            raise StreamLost("the next id of this stream holds another event")
        return stored is not None

    async def _is_over(self, stream_id: UUID) -> bool:
        return bool(await self._pool.fetchval(_IS_OVER, stream_id))

    async def claim(
        self, most: int, *, owners: int, ends_only: bool = False, under_way: Collection[UUID] = ()
    ) -> list[Orphan]:
        """This replica's share of the unfinished streams whose owner is dead or whose accept was left in doubt.

        They are ours then, `most` of them at most. With `ends_only` those that are not to be begun again: stopped, too
        old for that, or left by `owners` replicas already. What is `under_way` here is in no doubt.
        """
        now = monotonic()
        old = [stream_id for stream_id, since in self._doubtful.items() if since < now - _LEFT_ALONE_S]
        looked_for = [stream_id for stream_id in old if stream_id not in under_way]
        rows = await self._pool.fetch(_CLAIM, self._replica.id, most, looked_for, ends_only, owners)
        for stream_id in looked_for:
            if self._doubtful[stream_id] < now - _LOOKED_FOR_S:
                self.settle(stream_id)
        # In doubt until its end is written: what fails on the way there is tried again by a later pass.
        for row in rows:
            self.doubt(row["id"])
        return [await self._orphan(row) for row in rows]

    async def doubt_all_but(self, under_way: Collection[UUID]) -> None:
        """After a claim that got no answer: what is ours in the table, and is not under way, was claimed by it."""
        for row in await self._pool.fetch(_OURS, self._replica.id, list(under_way)):
            self._doubtful.setdefault(row["id"], monotonic())

    async def _orphan(self, row: asyncpg.Record) -> Orphan:
        stream = Stream(*(row[field] for field in Stream.__slots__))
        age_s = await self._pool.fetchval(_AGE, stream.id)
        return Orphan(stream, row["attempt"], row["cancel_flows"], row["request"], age_s or 0)

    async def let_go(self) -> None:
        """What a drained replica leaves behind was not broken by it: it does not count as an owner of that."""
        async with prompt_connection(self._pool) as connection:
            await connection.execute(_LET_GO, self._replica.id)


def random_part() -> str:
    """The 20 hexadecimal digits of a new id behind its 48 bits of time."""
    digits = secrets.token_hex(10)
    variant = "89ab"[int(digits[3], 16) & 3]
    return f"7{digits[:3]}{variant}{digits[4:19]}"


def streams_expiring(keep_s: float) -> Rows:
    """Streams that ended so long ago: from then on they are unknown (404)."""
    return Rows("streaming_sessions", "ended_at", keep_s, only="ended_at is not null")
