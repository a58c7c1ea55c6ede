"""The statements that write events: batches under the fence, each once however often it is tried, and never behind a
gap.
"""

from collections.abc import Mapping
from typing import Any
from uuid import UUID

import asyncpg

from app.postgres import Connection, open_connection
from app.streams.replicas import Fenced, Replica

# One autocommit statement appends a whole flush. The share lock makes a takeover wait for it. It inserts all of the
# batch, or nothing where this replica is fenced.
_INSERT_ALL = """
insert into streaming_events (stream_id, id, payload)
select u.s, u.i, u.p from o, unnest($1::uuid[], $2::int[], $3::text[]) as u(s, i, p)
"""
_APPEND = f"with o as materialized (select 1 from replicas where id = $4 and alive for share) {_INSERT_ALL}"
_NOTHING = "INSERT 0 0"
# Tried again after a lost COMMIT answer: two counts tell "fenced" from "the batch was there already".
_APPEND_AGAIN = f"""
with o as materialized (select 1 from replicas where id = $4 and alive for share),
     ins as ({_INSERT_ALL} on conflict do nothing returning 1)
select (select count(*) from o) as owners, (select count(*) from ins) as inserted
"""
_STORED = """
select e.stream_id, e.id, e.payload from unnest($1::uuid[], $2::int[]) as u(s, i)
join streaming_events e on e.stream_id = u.s and e.id = u.i
"""
# The event before it must be there: a server that has lost commits (fail-over) would else get a gap.
_INSERT = """
insert into streaming_events (stream_id, id, payload) select $1, $2::int, $3
where $2::int = 1 or exists (select from streaming_events where stream_id = $1 and id = $2::int - 1)
"""
# Streams whose last event here was acknowledged, and is not there. A standby may only be late.
_LOST = """
select u.s from unnest($1::uuid[], $2::int[]) as u(s, i)
where u.i > 0 and not pg_is_in_recovery()
    and not exists (select from streaming_events e where e.stream_id = u.s and e.id = u.i)
"""

# Stream, id and payload of each.
Events = list[tuple[UUID, int, str]]


class StreamLost(Exception):
    """The log refuses this stream: its payload cannot be stored, its next id holds something else, or it has lost
    events that were committed."""


class Appender:
    """The connection over which this process appends what all its streams have to say."""

    def __init__(self, dsn: str, replica: Replica) -> None:
        self._dsn = dsn
        self._replica = replica
        self._connection: Connection | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._connection.is_closed()

    async def connect(self, ends: Mapping[UUID, int]) -> set[UUID]:
        """A new connection; of streams with their last ids those that the server behind it has lost events of (D8).

        Nothing may follow on an event that is not there: its readers would be given something else under its id, or
        wait for ever.
        """
        connection = await open_connection(self._dsn, timeout_s=2)
        try:
            lost = {row["s"] for row in await connection.fetch(_LOST, [*ends], [*ends.values()])}
        except BaseException:
            connection.terminate()
            raise
        self._connection = connection
        return lost

    async def append(self, events: Events, *, again: bool) -> None:
        """All of them or none; `again` where they may be there already. Raises Fenced, or StreamLost, asyncpg's errors
        for bad data, and whatever a broken connection raises.
        """
        if not events:
            return
        assert self._connection is not None
        streams, ids, payloads = map(list, zip(*events, strict=True))
        # A server that hangs is noticed by the connection's command_timeout.
        values = streams, ids, payloads, self._replica.id
        if again:
            await self._append_again(self._connection, values, events)
        elif await self._connection.execute(_APPEND, *values) == _NOTHING:
            raise Fenced(str(self._replica.id))

    async def _append_again(self, connection: Connection, values: tuple[Any, ...], events: Events) -> None:
        row = await connection.fetchrow(_APPEND_AGAIN, *values)
        assert row is not None
        if not row["owners"]:
            raise Fenced(str(self._replica.id))
        if row["inserted"] != len(events):
            await self._verify(connection, events)

    async def _verify(self, connection: Connection, events: Events) -> None:
        rows = await connection.fetch(_STORED, [e[0] for e in events], [e[1] for e in events])
        if {tuple(row) for row in rows} != set(events):
            raise StreamLost("an id of this stream holds another event")

    def disconnect(self) -> None:
        """Give the connection up; whoever appends next opens another."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


async def insert_event(connection: Connection, stream_id: UUID, event_id: int, payload: str) -> None:
    """One event inside the caller's fenced transaction. Raises StreamLost where the id is taken or does not follow."""
    try:
        inserted = await connection.execute(_INSERT, stream_id, event_id, payload)
    except asyncpg.UniqueViolationError:
        raise StreamLost("the next id of this stream holds another event") from None
    if inserted == _NOTHING:
        raise StreamLost(f"event {event_id - 1} was committed and is not in the table")
