"""Pushes of one user that are taken together: each is told, and writes, what it would have alone."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import asyncpg
import orjson
import pytest
from structlog.contextvars import bound_contextvars

from app.chats import store
from app.chats.chat import MessageStatus
from app.errors import Conflict, ParleyError, Unavailable
from app.postgres import Connection
from app.sync import pages, pushes
from app.sync.changes import Changes
from app.sync.cursor import Cursor
from app.sync.exchange import Answer, Asked, Mutation
from app.sync.merge import AddMessage, DeleteChat, DeleteMessage, Op, PutChat, stamp_at
from app.sync.pushes import Push
from app.wall import Reach, within
from tests.conversations.counted import agreed
from tests.sync.storm import storm

_NOW = 1_700_000_000_000
_CHATS = """
select id, title, parent_chat_id, branch_from_message_id, stamp, client, is_deleted, seq, origin, "timestamp"
from chats where user_id = $1 order by id
"""
_MESSAGES = """
select id, chat_id, role, content, status, stamp, is_deleted, seq, origin, position, "timestamp"
from messages where user_id = $1 order by id
"""
_VERSIONS = "select chat_id, stamp, client, title from chat_versions where user_id = $1 order by 1, 2, 3"
_HEAD = "select seq, clients from sync_head where user_id = $1"
_DAYS = "select messages, questions from conversation_days where username = $1"
_GONE = "select actor, detail from audit where action = 'chat.delete' and target = $1 order by id"
_LOCKED = "select seq from sync_head where user_id = $1 for update"
_WAITING = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"


class Counted(Changes):
    """Knows how many pushes each transaction had."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sizes: list[int] = []

    async def _together(
        self, user_id: str, take: Callable[[], Sequence[Push]]
    ) -> Sequence[tuple[Push, Answer | Conflict]]:
        told = await super()._together(user_id, take)
        self.sizes.append(len(told))
        return told


@dataclass(slots=True)
class Phone:
    """What a device says; whether it is heard is another thing."""

    client: str
    failed: bool = False
    cursor: Cursor | None = None
    mid: int = 0
    said: list[Mutation] = field(default_factory=list)

    def pushes(self, chance: Random, number: int) -> list[Asked]:
        """One, or several at once: the next ones, the same again, with a gap, of a device that nobody knows."""
        if chance.random() < 0.1:
            return [Asked("unknown", self.cursor, [Mutation(7, [_op(chance, number, self)])])]
        if self.said and chance.random() < 0.1:
            return [Asked(self.client, self.cursor, chance.sample(self.said, 1), self.failed)]
        if chance.random() < 0.1:
            return [Asked(self.client, self.cursor, [Mutation(self.mid + 2, [DeleteMessage("m0")])])]
        many = range(chance.choice([1, 1, 1, 2]))
        self.said = [Mutation(self.mid + 1 + n, [_op(chance, number + n, self)]) for n in many]
        self.mid += len(self.said)
        kind, cursor = chance.random(), self.cursor
        if kind < 0.03:
            cursor = None
        elif kind < 0.13 and cursor:
            cursor = replace(cursor, seq=max(0, cursor.seq - 5))
        elif kind < 0.15 and cursor:
            cursor = replace(cursor, epoch="0" * 12)
        asked = Asked(self.client, cursor, self.said, self.failed, pull=kind < 0.95)
        if chance.random() < 0.2:
            return [asked, asked]
        if len(self.said) == 2 and chance.random() < 0.5:
            return [replace(asked, push=[mutation]) for mutation in self.said]
        return [asked]


def _op(chance: Random, number: int, by: Phone) -> Op:
    chat, stamp, kind = f"c{chance.randrange(6)}", stamp_at(_NOW + number + chance.randrange(40)), chance.random()
    if kind < 0.75:
        name = f"m{number}" if chance.random() < 0.7 else f"m{chance.randrange(6)}"
        status: MessageStatus = "failed" if by.failed and chance.random() < 0.3 else "complete"
        return AddMessage(name, chat, "user", f"The words of {number}", stamp, status=status)
    if kind < 0.85:
        return PutChat(chat, f"Title {number}", stamp)
    return DeleteChat(chat, stamp) if kind < 0.9 else DeleteMessage(f"m{chance.randrange(number + 1)}")


@asynccontextmanager
async def gateway(dsn: str) -> AsyncGenerator[tuple[Counted, asyncpg.Pool]]:
    async with storm(dsn, Counted) as weather:
        changes = weather.gateways[0]
        assert isinstance(changes, Counted)
        yield changes, weather.database


async def push(changes: Changes, user: str, asked: Asked) -> Answer | ParleyError:
    with within(Reach(user)), bound_contextvars(principal=asked.client):
        try:
            return await changes.exchange(user, asked)
        except (Conflict, Unavailable) as refused:
            return refused


async def test_together_is_as_one_after_the_other(database: str) -> None:
    async with gateway(database) as (changes, look):
        for seed in range(10):
            print(len(changes.sizes), [n for n in changes.sizes if n > 1])
            await _compared(changes, look, Random(seed), f"together-{seed}", f"apart-{seed}")
        assert max(changes.sizes) > 5
        connection = await asyncpg.connect(database)
        await agreed(connection)
        await connection.close()


async def test_what_is_too_much_to_be_read_for_all_is_read_for_each(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "_HALF", 3)
    async with gateway(database) as (changes, look):
        await _compared(changes, look, Random(1), "together", "apart")
        assert changes.sizes.count(1) > 100


async def _compared(changes: Changes, look: asyncpg.Pool, chance: Random, together: str, apart: str) -> None:
    phones = [Phone(f"phone-{n}", failed=n == 1) for n in range(8)]
    epochs = {name: await _begun(changes, look, name) for name in (together, apart)}
    for round_ in range(10):
        asked = [(phone, one) for n, phone in enumerate(phones) for one in phone.pushes(chance, round_ * 100 + n * 10)]
        chance.shuffle(asked)
        at_once = await asyncio.gather(*(push(changes, together, _of(epochs[together], one)) for _, one in asked))
        alone = [await push(changes, apart, _of(epochs[apart], one)) for _, one in asked]
        known = (await _devices(look, apart))[1]
        assert await _devices(look, together) == await _devices(look, apart)
        for (phone, one), ours, theirs in zip(asked, at_once, alone, strict=True):
            assert _told(ours) == _told(theirs), one
            if isinstance(ours, Answer) and one.pull and one.client == phone.client:
                phone.cursor = ours.cursor
            phone.mid = known.get(phone.client, {"mid": 0})["mid"]
    for query in (_CHATS, _MESSAGES, _VERSIONS, _DAYS, _GONE):
        assert await look.fetch(query, together) == await look.fetch(query, apart)


async def _begun(changes: Changes, look: asyncpg.Pool, user: str) -> str:
    await push(changes, user, Asked("first", None, [Mutation(1, [PutChat("c0", "Trip", stamp_at(_NOW))])]))
    epoch: str = await look.fetchval("select epoch from sync_head where user_id = $1", user)
    return epoch


def _of(epoch: str, asked: Asked) -> Asked:
    """The same of a user with another epoch."""
    if asked.cursor is None or asked.cursor.epoch == "0" * 12:
        return asked
    return replace(asked, cursor=replace(asked.cursor, epoch=epoch))


def _told(answer: Answer | ParleyError) -> object:
    if isinstance(answer, ParleyError):
        return answer.code, answer.extra
    cursor = answer.cursor and str(answer.cursor).split(".", 1)[1]
    rows = {one.id: one for one in answer.chats}, {one.id: one for one in answer.messages}
    return replace(answer, cursor=None, server_time=0, chats=(), messages=()), cursor, rows


async def _devices(look: asyncpg.Pool, user: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """The counter, and what is known of devices but for when that was."""
    head = await look.fetchrow(_HEAD, user)
    assert head is not None
    return head["seq"], {name: {**one, "at": 0} for name, one in orjson.loads(head["clients"]).items()}


def add(client: str, name: str, *, mid: int = 1, stamp: str = stamp_at(_NOW)) -> Asked:
    return Asked(client, Cursor("", 0), [Mutation(mid, [AddMessage(name, "c0", "user", name, stamp)])], pull=False)


@asynccontextmanager
async def held(look: asyncpg.Pool, user: str) -> AsyncGenerator[Connection]:
    """Nobody else writes the user's chats in this block."""
    async with look.acquire() as connection, connection.transaction():
        await connection.execute(_LOCKED, user)
        yield connection


async def until_locked_out(look: asyncpg.Pool) -> None:
    async with asyncio.timeout(10):
        while not await look.fetchval(_WAITING):
            await asyncio.sleep(0.01)


async def _names(look: asyncpg.Pool, user: str) -> set[str]:
    return {row["id"] for row in await look.fetch(_MESSAGES, user)}


async def test_who_gives_up_takes_nobody_along(database: str) -> None:
    async with gateway(database) as (changes, look):
        await _begun(changes, look, "ann")
        async with held(look, "ann"):
            tasks = [asyncio.create_task(push(changes, "ann", add(f"phone-{n}", f"m{n}"))) for n in range(5)]
            await until_locked_out(look)
            for number in (0, 2):  # one that writes, and one that waits
                tasks[number].cancel()
            await asyncio.wait([tasks[0], tasks[2]])
            await until_locked_out(look)
        told = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(one, Answer) for one in told] == [False, True, False, True, True]
        assert await _names(look, "ann") == {"m1", "m3", "m4"}
        # The device whose words were taken back says them again.
        assert isinstance(await push(changes, "ann", add("phone-0", "m0")), Answer)
        assert changes._pushes._lines == {}


async def test_what_is_written_while_a_push_waits_is_seen_by_it(database: str) -> None:
    async with gateway(database) as (changes, look):
        await _begun(changes, look, "ann")
        async with held(look, "ann") as other:
            task = asyncio.create_task(push(changes, "ann", add("phone", "m")))
            await until_locked_out(look)
            await store.save_question(other, user_id="ann", chat_id="c0", message_id="m", content="Another one's words")
        told = await task
        assert isinstance(told, Answer)
        assert [one["status"] for result in told.results for one in result["ops"]] == ["forked"]
        stored = await look.fetch("select content, position from messages where user_id = 'ann' order by position")
        assert [tuple(row) for row in stored] == [("Another one's words", 1), ("m", 2)]


async def test_what_one_alone_is_refused_for_concerns_no_other(database: str) -> None:
    async with gateway(database) as (changes, look):
        await _begun(changes, look, "ann")
        broken = add("phone-2", "m2", stamp="no stamp")
        asked = [add("phone-0", "m0"), add("phone-1", "m1", mid=7), broken, add("phone-3", "m3")]
        told = await asyncio.gather(*(push(changes, "ann", one) for one in asked), return_exceptions=True)
        assert [type(one) for one in told] == [Answer, Conflict, ValueError, Answer]
        assert await _names(look, "ann") == {"m0", "m3"}


async def test_a_lost_replica_is_told_to_all(database: str) -> None:
    async with gateway(database) as (changes, look):
        await _begun(changes, look, "ann")
        await look.execute("update replicas set alive = false")
        told = await asyncio.gather(*(push(changes, "ann", add(f"phone-{n}", f"m{n}")) for n in range(4)))
        assert {one.code for one in told if isinstance(one, Unavailable)} == {"replica_lost"}
        assert len(told) == 4
        assert await _names(look, "ann") == set()
        await look.execute("update replicas set alive = true")
        assert isinstance(await push(changes, "ann", add("phone-1", "m1")), Answer)


async def test_who_may_reach_less_goes_with_nobody_else(database: str) -> None:
    async with gateway(database) as (changes, look):
        await _begun(changes, look, "ann")
        changes.sizes.clear()
        async with held(look, "ann"):
            tasks = [asyncio.create_task(push(changes, "ann", add(f"phone-{n}", f"m{n}"))) for n in range(3)]
            tasks += [asyncio.create_task(changes.exchange("ann", add(f"key-{n}", f"k{n}"))) for n in range(3)]
            await until_locked_out(look)
        assert all(isinstance(one, Answer) for one in await asyncio.gather(*tasks))
        assert sorted(changes.sizes) == [3, 3]


async def test_more_than_may_wait_are_told_to_come_again(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushes, "MOST_WAITING", 3)
    async with gateway(database) as (changes, look):
        await _begun(changes, look, "ann")
        told = await asyncio.gather(*(push(changes, "ann", add(f"phone-{n}", f"m{n}")) for n in range(5)))
        assert [getattr(one, "code", "") for one in told] == ["", "", "", "overloaded", "overloaded"]
        assert await _names(look, "ann") == {"m0", "m1", "m2"}


def test_as_much_as_one_push_may_have_is_taken_together() -> None:
    def large(n: int) -> Push:
        return _waiting(AddMessage(f"m{n}", "c", "user", "x" * 600_000, stamp_at(_NOW)))

    def many(n: int) -> Push:
        return _waiting(*(DeleteMessage(f"m{n} {op}") for op in range(60)))

    def small(n: int) -> Push:
        return _waiting(AddMessage(f"m{n}", "c", "user", "x", stamp_at(_NOW)))

    for of, most in ((large, 1), (many, 1), (small, 32)):
        assert len(pushes._together([of(n) for n in range(40)])) == most
    assert len(pushes._together([many(0), small(1), large(2), small(3), large(4)])) == 4


def test_who_names_what_another_one_writes_is_not_taken_along() -> None:
    said = AddMessage("m", "c", "user", "x", stamp_at(_NOW))
    titled, gone = PutChat("c", "Trip", stamp_at(_NOW)), DeleteMessage("m")
    for first, second in ((said, said), (said, gone), (gone, said), (titled, said), (titled, titled)):
        assert len(pushes._together([_waiting(first), _waiting(second)])) == 1
    assert len(pushes._together([_waiting(said), _waiting(titled)])) == 2


def _waiting(*ops: Op) -> Push:
    return Push(Asked("phone", None, [Mutation(1, ops)]))
