"""The one exchange: what a device pushes is applied, and what it has not seen is read, in one transaction.

Everything here happens under the user's row of `sync_head` or after a look at it: commits come in the order of `seq`.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TypeVar

import orjson

from app.access.audit import asker
from app.chats.head import moved
from app.errors import Conflict, Unavailable
from app.postgres import Connection, retry_conflicts
from app.streams.replicas import Fenced, Replica
from app.sync import looks, rows
from app.sync.answers import answer, answers, is_plain, no_news, stand, start
from app.sync.devices import acked_of, noted, remember
from app.sync.exchange import Answer, Asked, Head, Mutation, Pushed
from app.sync.merge import Op, State
from app.sync.mutations import Done, Work, note_gone, save
from app.sync.pushes import Push, Pushes
from app.wall import Wall

T = TypeVar("T")
# Operations under one number: a page ends between two numbers, so all rows of one have to fit into it.
MOST_OPS = 100

# Users whose pushes met others last time, and so need the lock first.
_MOST_CROWDED = 1_000
_MAKE = "insert into sync_head (user_id) values ($1) on conflict do nothing"
_NOTE = "update sync_head set clients = $2 where user_id = $1"
_MOVE = "update sync_head set seq = $2 where user_id = $1"
# What was there before devices were, and what replicas of the version before have written since.
_ADOPT = """
with new as (
    select id, row_number() over (order by created_at, position) as n from messages where user_id = $1 and seq = 0),
adopted as (
    update messages m set seq = $2 + new.n,
        stamp = lpad(to_hex((extract(epoch from m.created_at) * 1000)::bigint), 12, '0') || '-0000'
    from new where m.user_id = $1 and m.id = new.id returning 1)
select count(*) from adopted
"""
_ADOPT_CHATS = """
with new as (select id, row_number() over (order by created_at) as n from chats where user_id = $1 and seq = 0),
adopted as (
    update chats c set seq = $2 + new.n from new where c.user_id = $1 and c.id = new.id returning 1)
select count(*) from adopted
"""


# What the gateway does to chats: told under the lock, with the server's time in milliseconds.
OpsOf = Callable[[Connection, int], Awaitable[Sequence[Op]]]


@dataclass(frozen=True, slots=True)
class Written:
    """What the gateway's own operations were about, as it is now, and the ids of what they changed."""

    state: State
    chats: Collection[str]
    messages: Collection[str]


class Changes:
    """Of all users, on one replica."""

    def __init__(self, replica: Replica, wall: Wall) -> None:
        self._replica = replica
        self._wall = wall
        self._pushes = Pushes(self._write)
        self._crowded: set[str] = set()

    async def exchange(self, user_id: str, asked: Asked) -> Answer:
        """Apply, then read. Raises Conflict for a gap or an unknown device, Unavailable where nothing can be written.

        Any number of times with the same effect.
        """
        if asked.push:
            self._replica.admit()
            return await self._pushes.write(user_id, asked)
        if (answer := await self._read(user_id, asked)) is not None:
            return answer
        return await _until_written(lambda: self._begin(user_id, asked))

    async def write(
        self, user_id: str, ops_of: OpsOf, *, dated: bool = False, failed: bool = False, noted: bool = True
    ) -> Written:
        """What somebody without a device does, in one transaction: merged like any push and sent to every device.

        `ops_of` is asked under the lock, once for each try. With `dated`, messages came when their stamps say, and not
        now; `noted`: chats that go are noted in the audit. Raises what it raises, and Unavailable as `exchange`.
        """
        self._replica.admit()
        return await _until_written(lambda: self._do(user_id, ops_of, dated=dated, failed=failed, noted=noted))

    async def note(self, user_id: str, client: str, *, told: int | None, has: int | None) -> None:
        """Up to where a device was told, and has shown to have it, for those that do not keep it; None: no news."""
        given = {name: seq for name, seq in (("told", told), ("has", has)) if seq is not None}
        async with self._wall.connection() as connection:
            head = await looks.head_now(connection, user_id)
        if head is None or noted(head, client, given):
            await _until_written(lambda: self._note(user_id, client, given))

    async def _note(self, user_id: str, client: str, given: Mapping[str, int]) -> None:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            if noted(head, client, given):
                await connection.execute(_NOTE, user_id, orjson.dumps(head.clients).decode())

    async def _read(self, user_id: str, asked: Asked) -> Answer | None:
        """The answer to who pushes nothing; None where something has to be written for it: before a bootstrap."""
        row = await self._wall.fetchrow(looks.HEAD, user_id)
        if row is None or start(head := looks.whole_head(row), asked)[1] == 0:
            return None
        pushed = stand(head, asked, Pushed())
        if (nothing := no_news(head, asked, pushed)) is not None:
            return nothing
        async with self._wall.connection() as connection:
            return await answer(connection, user_id, head, asked, pushed)

    async def _begin(self, user_id: str, asked: Asked) -> Answer:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            await looks.one(connection, user_id, asked, head)
            if start(head, asked)[1] == 0:
                await _adopt(connection, user_id, head)
            return await answer(connection, user_id, head, asked, stand(head, asked, Pushed()))

    async def _write(self, user_id: str, take: Callable[[], Sequence[Push]]) -> None:
        """Of those that wait for the lock together with the first as many as one transaction may have."""
        for push, outcome in await _until_written(lambda: self._together(user_id, take)):
            push.outcome = outcome  # it is committed

    async def _together(
        self, user_id: str, take: Callable[[], Sequence[Push]]
    ) -> Sequence[tuple[Push, Answer | Conflict]]:
        async with self._replica.transaction(wall=self._wall) as connection:
            head, found = await self._at_once(connection, user_id, take())
            pushes, shared = _alike(head, take()), None
            if len(pushes) > 1:
                found, shared = await looks.several(connection, user_id, [push.asked for push in pushes], head)
            elif found is None:
                found = await looks.one(connection, user_id, pushes[0].asked, head)
            applied = _applied(head, found, pushes if shared else pushes[:1])
            done = [one for one in applied if isinstance(one, Done)]
            await _save(connection, user_id, head, done)
            told = iter(await answers(connection, user_id, head, done, shared))
            outcomes = [one if isinstance(one, Conflict) else next(told) for one in applied]
            return list(zip(pushes, outcomes, strict=False))

    async def _do(self, user_id: str, ops_of: OpsOf, *, dated: bool, failed: bool, noted: bool) -> Written:
        async with self._replica.transaction(wall=self._wall) as connection:
            head = await self._locked(connection, user_id)
            ops = await ops_of(connection, head.now_ms)
            work = Work(Asked(failed=failed), head, await rows.load(connection, user_id, ops))
            for first in range(0, len(ops), MOST_OPS):
                work.apply(Mutation(0, ops[first : first + MOST_OPS]))
            if work.marks:
                await save(connection, user_id, [work], dated=dated)
                if noted and (gone := work.gone()):
                    await note_gone(connection, user_id, gone, asker())
            return Written(work.found.state, work.marks.chats.keys(), work.marks.messages.keys())

    async def _at_once(
        self, connection: Connection, user_id: str, pushes: Sequence[Push]
    ) -> tuple[Head, rows.Found | None]:
        """The lock, and what one push has to know if it meets nobody: it did not last time, and does not now."""
        asked, was_crowded = pushes[0].asked, user_id in self._crowded
        self._crowded.discard(user_id)
        looked = None
        if len(pushes) == 1 and not was_crowded and not rows.deleted(looks.ops_of([asked])):
            looked = await looks.at_once(connection, user_id, asked)
            if looked is not None and looked[1] is not None:
                return looked
        if len(self._crowded) < _MOST_CROWDED and (looked or len(pushes) > 1):
            self._crowded.add(user_id)
        return looked or (await self._locked(connection, user_id), None)

    async def _locked(self, connection: Connection, user_id: str) -> Head:
        row = await connection.fetchrow(looks.LOCK, user_id)
        if row is None:
            await connection.execute(_MAKE, user_id)
            row = await connection.fetchrow(looks.LOCK, user_id)
        assert row is not None
        return looks.head_of(row)


async def _until_written(work: Callable[[], Awaitable[T]]) -> T:
    try:
        return await retry_conflicts(work)
    except Fenced:
        raise Unavailable("replica_lost", "The server is recovering; send it again.", retry_after=2) from None


async def _adopt(connection: Connection, user_id: str, head: Head) -> None:
    before = head.seq
    for statement in (_ADOPT_CHATS, _ADOPT):
        head.seq += await connection.fetchval(statement, user_id, head.seq)
    if head.seq > before:
        await connection.execute(_MOVE, user_id, head.seq)
        moved(user_id, head.seq)


# -- pushing


def _alike(head: Head, pushes: Sequence[Push]) -> Sequence[Push]:
    """The first, and those behind it if none of them begins anew."""
    if len(pushes) == 1:
        return pushes
    return list(takewhile(lambda push: is_plain(head, push.asked), pushes)) or pushes[:1]


def _applied(head: Head, found: rows.Found, pushes: Sequence[Push]) -> list[Done | Conflict]:
    """What becomes of them, up to one that names what another one has written: it waits for the next transaction.

    So what is stored before and after this one is all that any of them may see.
    """
    applied: list[Done | Conflict] = []
    written: set[str] = set()
    for push in pushes:
        if written and not written.isdisjoint(rows.touchable(looks.ops_of([push.asked]), found.state)):
            break
        try:
            one = _push(head, found, push)
        except Conflict as refused:
            applied.append(refused)
        else:
            applied.append(one)
            written |= one.work.marks.names()
    return applied


def _push(head: Head, found: rows.Found, push: Push) -> Done:
    asked = push.asked
    acked = acked_of(head, asked)
    work = Work(asked, head, found)
    for mutation in asked.push:
        if mutation.mid <= acked:
            work.repeat(mutation)
        else:
            work.apply(mutation)
    pushed = work.told()
    is_new = asked.push[-1].mid > acked
    if is_new:
        remember(head, asked, pushed.results)
        pushed.did = work.did(acked)
    return Done(push, work, stand(head, asked, pushed), is_new)


async def _save(connection: Connection, user_id: str, head: Head, done: Sequence[Done]) -> None:
    """What is new in them, and where one begins anew, what is older than numbers."""
    if works := [one.work for one in done if one.is_new]:
        await save(connection, user_id, works)
    for one in done:
        if gone := one.work.gone():
            await note_gone(connection, user_id, gone, one.push.context.run(asker))
        if one.pushed.until == 0:
            await _adopt(connection, user_id, head)
            stand(head, one.push.asked, one.pushed)
