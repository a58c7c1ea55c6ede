"""Erasing a user: every table that has something of theirs, a bounded piece at a time, until nothing is left.

The one place that deletes from tables of other modules: what belongs to a user is said here once, in the order in which
it goes. Whoever is killed on the way leaves the row in `erasures`, and the next pass goes on.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from time import monotonic
from urllib.parse import quote
from uuid import UUID

import orjson
import structlog

from app.access.audit import Actor, fingerprint, note
from app.conversations.index import OWN
from app.errors import NotFound
from app.flows.stopping import Stopping
from app.flows.waiting import Waiting
from app.postgres import Pool, retry_conflicts
from app.streams.replicas import Fenced
from app.wall import Reach, within

log = structlog.get_logger(__name__)

# Rows of one statement; pictures are large. Blocks of a table that has no index by user.
_PIECE, _PICTURES, _BLOCKS = 1_000, 20, 1_000
# Who goes on writing meanwhile keeps what comes behind the last pass.
_PASSES = 5
# Users of one pass of the job, and seconds.
_USERS, _JOB_S = 20, 60.0
# Of a pass, for stopping what runs: the rest goes on beside it.
_STOPPING_S = 5.0

_BEGIN = "insert into erasures (user_id) values ($1) on conflict do nothing returning 1"
_OPEN = "select user_id from erasures order by tried_at limit $1"
# What still runs after so long began after it was asked for: it is a new user's.
_TRY = """
update erasures set tried_at = parley_now() where user_id = $1
returning tried_at, passes, walk, block, found, created_at < parley_now() - interval '10 minutes'
"""
_RAN = "update erasures set passes = 0, found = found + 1 where user_id = $1"
_PLACE = "update erasures set found = found + $3, walk = $4, block = $5 where user_id = $1 and passes = $2"
_PASSED = """
update erasures set passes = passes + 1, walk = '', block = 0, found = 0 where user_id = $1 and passes = $2
"""
# Who was the last to try comes to the end: it knows of everything that was there when it was asked.
_END = "delete from erasures where user_id = $1 and tried_at = $2"
_RUNNING = "select streaming_session_id from conversation_sessions where user_id = $1 and status = 'active'"
_WAITING = "select session_id, message_id from queued_messages where user_id = $1 limit $2"

# By an index that begins with the user: again until nothing is left. Statements return how many rows they were about.
_ROWS = """
with piece as (select ctid from {table} where user_id = $1 and {only} limit {most}),
gone as (delete from {table} where user_id = $1 and {only} and ctid = any(array(select ctid from piece)) returning 1)
select count(*) from gone
"""
# What it has cost stays known, and of nobody.
_LEDGER = f"""
with piece as (select ctid from usage_ledger where user_id = $1 limit {_PIECE}),
gone as (
    update usage_ledger set user_id = '', chat_id = ''
    where user_id = $1 and ctid = any(array(select ctid from piece)) returning 1)
select count(*) from gone
"""
_DAILY = f"""
with piece as (select ctid from user_usage_daily where user_id = $1 limit {_PIECE}),
gone as (
    delete from user_usage_daily where user_id = $1 and ctid = any(array(select ctid from piece)) returning *),
kept as (
    insert into user_usage_daily as d (user_id, day, chatbot_id, model, calls, failed, prompt_tokens,
        completion_tokens, duration_ms)
    select '', day, chatbot_id, model, calls, failed, prompt_tokens, completion_tokens, duration_ms
    from gone order by 2, 3, 4
    on conflict (user_id, day, chatbot_id, model) do update set calls = d.calls + excluded.calls,
        failed = d.failed + excluded.failed, prompt_tokens = d.prompt_tokens + excluded.prompt_tokens,
        completion_tokens = d.completion_tokens + excluded.completion_tokens,
        duration_ms = d.duration_ms + excluded.duration_ms, updated_at = now())
select count(*) from gone
"""
_INDEX = f"""
with piece as (select id from conversations where source = '{OWN}' and username = $1 limit {_PIECE}),
gone as (delete from conversations where id = any(array(select id from piece)) returning id),
words as (delete from conversation_words w using gone where w.conversation = gone.id),
counted as (
    insert into conversation_counts as n (source, slot, conversations)
    select '{OWN}', 0, -count(*) from gone having count(*) > 0
    on conflict (source, slot) do update set conversations = n.conversations + excluded.conversations)
select count(*) from gone
"""


def _rows(table: str, only: str = "true", most: int = _PIECE) -> str:
    return _ROWS.format(table=table, only=only, most=most)


_INDEXED: Sequence[str] = (
    _rows("messages"),
    _rows("chats"),
    _rows("chat_versions"),
    _rows("conversation_sessions", "status = 'idle'"),
    _rows("images", most=_PICTURES),
    # The sums after what they are made of.
    _LEDGER,
    _DAILY,
    _INDEX,
    _rows("chat_claims"),
    _rows("chat_claims").replace("user_id = $1", "from_user_id = $1"),
    _rows("sync_head"),
    # After that row nobody begins to write words, and whoever has begun is waited for here.
    _rows("message_word_users").replace("user_id = $1", "username = $1"),
    _rows("message_words").replace("user_id = $1", "username = $1"),
    # After what it is written for.
    _rows("sync_hours"),
)

# Through the whole table, so many blocks at a time: nothing else needs an index by user there. $1: the user, $2 and $3:
# the blocks, $4: how error rows name the user.
_HERE = "ctid >= $2::tid and ctid < $3::tid"
_NAMED = """
(exists (select from unnest($4::text[]) n(name) where strpos(context, n.name) > 0) or exists (
    select from streaming_sessions s where s.id = e.stream_id and s.user_id = $1))
"""
_ERRORS = f"delete from error_logs e where {_HERE} and {_NAMED}"
_WALKS: Mapping[str, str] = {
    # First of all: later nobody knows whose stream an error was about.
    "error_logs": _ERRORS,
    "idempotency_keys": f"""
        delete from idempotency_keys where {_HERE} and $4::text[] is not null
            and (principal = 'user:' || $1 || ' ' || $1
                or principal not like 'user:%' and substr(principal, strpos(principal, ' ') + 1) = $1)
        """,
    "quota_usage": f"delete from quota_usage where {_HERE} and subject = 'user:' || $1 and $4::text[] is not null",
    # Where a comparison of the index stands just now: it begins anew.
    "conversation_rounds": f"""
        update conversation_rounds set place = '{{}}' where {_HERE} and source = '{OWN}' and $4::text[] is not null
            and strpos(place::text, to_json($1::text)::text) > 0
        """,
    # How much was said on a day stays known.
    "conversation_days": f"""
        with gone as (
            delete from conversation_days
            where {_HERE} and username = $1 and source = '{OWN}' and $4::text[] is not null returning *)
        insert into conversation_days as d (day, source, username, chatbot_id, model, messages, questions, tokens,
            duration_ms)
        select day, source, '', chatbot_id, model, messages, questions, tokens, duration_ms from gone order by 1, 4, 5
        on conflict (day, source, username, chatbot_id, model) do update set
            messages = d.messages + excluded.messages, questions = d.questions + excluded.questions,
            tokens = d.tokens + excluded.tokens, duration_ms = d.duration_ms + excluded.duration_ms
        """,
    # What administrators did is kept, under a fingerprint of the name.
    "audit": f"""
        update audit set actor = case when actor = 'user:' || $1 then ($4::text[])[1] else actor end,
            target = case when target = $1 then ($4::text[])[1] else target end,
            detail = case when action = 'chat.delete' and target = $1 then '' else detail end
        where {_HERE} and (actor = 'user:' || $1 or target = $1)
        """,
}
_LAST = "streaming_sessions"
_PLACES = (*_WALKS, _LAST)
_STREAMS = """
select id from streaming_sessions where ctid >= $2::tid and ctid < $3::tid and user_id = $1
    and status not in ('queued', 'active')
"""
_BLOCKS_OF = "select pg_relation_size($1::text::regclass) / current_setting('block_size')::int"
_EVENTS = f"""
with piece as (select stream_id, id from streaming_events where stream_id = $1 order by id limit {_PIECE}),
gone as (delete from streaming_events e using piece where (e.stream_id, e.id) = (piece.stream_id, piece.id) returning 1)
select count(*) from gone
"""
_FIGURES = "delete from conversation_processing_metrics where stream_id = any($1::uuid[])"
_FORGET = "delete from streaming_sessions where id = any($1::uuid[]) and status not in ('queued', 'active')"


class _OutOfTime(Exception):
    """The rest is for the next pass."""


@dataclass(slots=True)
class _Pass:
    """A pass through all tables: which one, where it stands in which table, and how much it has found so far.

    `old`: the erasure was asked for long ago.
    """

    user_id: str
    until: float
    tried_at: datetime
    number: int
    walk: str
    block: int
    found: int
    old: bool


@dataclass(frozen=True, slots=True)
class Erasure:
    """Of users, on one replica. Two at once do no harm: what is gone is gone. Requests wait for one at a time."""

    pool: Pool
    stopping: Stopping
    waiting: Waiting
    _asked: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def erase(self, user_id: str, actor: Actor, *, within_s: float) -> bool:
        """Whether nothing is left of the user; otherwise `run_once` or another call goes on."""
        assert user_id, "nobody in particular cannot be erased"
        async with self.pool.acquire() as connection, connection.transaction():
            if await connection.fetchval(_BEGIN, user_id):
                by = fingerprint(user_id) if actor.id == f"user:{user_id}" else actor.id
                await note(connection, Actor(by, actor.request_id), "user.erase", target=fingerprint(user_id))
        if self._asked.locked():  # walks take connections and time: the job does this one
            return False
        async with self._asked:
            return await self._go_on(user_id, monotonic() + within_s)

    async def run_once(self) -> int:
        """Go on with those that were begun; returns how many users are gone. Bounded in time and users."""
        until, gone = monotonic() + _JOB_S, 0
        for row in await self.pool.fetch(_OPEN, _USERS):
            if monotonic() < until:
                gone += await self._go_on(row["user_id"], until)
        return gone

    async def _go_on(self, user_id: str, until: float) -> bool:
        try:
            # Without the row somebody else has come to the end meanwhile.
            while (row := await self.pool.fetchrow(_TRY, user_id)) is not None:
                one = _Pass(user_id, until, *row)
                if await self._pass(one):
                    await self.pool.execute(_END, user_id, one.tried_at)
                    break
        except (_OutOfTime, Fenced):  # another replica, or this one when it is back, goes on
            return False
        log.info("user_erased", user=fingerprint(user_id))
        return True

    async def _pass(self, one: _Pass) -> bool:
        """Go on to the end of a pass; whether it was the last. Raises _OutOfTime."""
        runs = await self._stop(one) and not one.old
        if runs:
            await self.pool.execute(_RAN, one.user_id)
            one.number, one.found = 0, one.found + 1
        for statement in _INDEXED:
            while piece := await retry_conflicts(partial(self.pool.fetchval, statement, one.user_id)):
                await self._note(one, piece)
        await self._walks(one)
        await self.pool.execute(_PASSED, one.user_id, one.number)
        if runs:
            raise _OutOfTime
        return not one.found or one.number + 1 >= _PASSES

    async def _note(self, one: _Pass, found: int) -> None:
        """Whoever goes on knows what there was, and where this one stood. Raises _OutOfTime."""
        one.found += found
        await self.pool.execute(_PLACE, one.user_id, one.number, found, one.walk, one.block)
        if monotonic() > one.until:
            raise _OutOfTime

    async def _stop(self, one: _Pass) -> bool:
        """What waits, and what runs; whether something still does."""
        user_id, until = one.user_id, min(one.until, monotonic() + _STOPPING_S)
        # Behind the wall as the user, whoever it is that asks.
        with within(Reach(user_id)):
            while waiting := await self.pool.fetch(_WAITING, user_id, _PIECE):
                for row in waiting:
                    if monotonic() > until:
                        return True
                    with suppress(NotFound):  # its turn has come
                        await self.waiting.remove(user_id=user_id, session_id=row[0], message_id=row[1])
            for row in await self.pool.fetch(_RUNNING, user_id):
                if monotonic() > until:
                    return True
                with suppress(NotFound):
                    await self.stopping.stop(row["streaming_session_id"], owner=user_id)
        return bool(await self.pool.fetch(_RUNNING, user_id))

    async def _walks(self, one: _Pass) -> None:
        """From where the pass stands through every table without an index. Raises _OutOfTime."""
        for table in _PLACES[_PLACES.index(one.walk) if one.walk in _PLACES else 0 :]:
            if table != one.walk:
                one.walk, one.block = table, 0
            for start in range(one.block, await self.pool.fetchval(_BLOCKS_OF, table), _BLOCKS):
                found = await self._through(one, table, start)
                one.block = start + _BLOCKS
                await self._note(one, found)

    async def _through(self, one: _Pass, table: str, start: int) -> int:
        values = (one.user_id, (start, 0), (start + _BLOCKS, 0))
        if table == _LAST:
            rows = await self.pool.fetch(_STREAMS, *values)
            await self._forget([row["id"] for row in rows], one.until)
            return len(rows)
        told = await retry_conflicts(partial(self.pool.execute, _WALKS[table], *values, _names(one.user_id)))
        return int(told.rpartition(" ")[2])

    async def _forget(self, streams: Sequence[UUID], until: float) -> None:
        """Events first: without its row nobody would find what is left of a stream."""
        for stream_id in streams:
            while await self.pool.fetchval(_EVENTS, stream_id):
                _require(until)
        await self.pool.execute(_FIGURES, streams)
        await self.pool.execute(_FORGET, streams)


def _require(until: float) -> None:
    if monotonic() > until:
        raise _OutOfTime


def _names(user_id: str) -> list[str]:
    """The fingerprint, and what error rows say of whom they were told: who asked, or at which path."""
    paths = {f'"path":"/api/users/{name}"' for name in (user_id, quote(user_id))}
    return [fingerprint(user_id), f'"principal":{orjson.dumps(f"user:{user_id}").decode()}', *sorted(paths)]
