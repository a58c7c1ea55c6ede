"""Topics: who follows one hears of each change after its commit, on any replica, and of many at once only once."""

import asyncio
from uuid import UUID, uuid4

import pytest

from app.commits import note
from app.streams.topics import _LATELY, Topics
from tests.proxy import proxy_to_postgres
from tests.streams.engine import Engine, engine
from tests.streams.peers import Peer, peer, peers, until


class Follower:
    """How often it was woken."""

    def __init__(self, topics: Topics, topic: UUID) -> None:
        self.woken = 0
        topics.follow(topic, self._wake)

    def _wake(self) -> None:
        self.woken += 1


async def test_changes_are_told_after_their_commit_and_others_never(database: str) -> None:
    topics, topic = Topics(pace_s=0), uuid4()
    follower = Follower(topics, topic)
    async with engine(database, lane=False) as parts:
        parts.replica.on_commit = topics.change
        async with parts.replica.transaction():
            note(topic, 1)
            note(uuid4(), 1)
            assert not topics.wanted.is_set()
        assert topics.wanted.is_set()
        await topics.tell_once()
        assert follower.woken == 1
        with pytest.raises(ZeroDivisionError):
            await _fail(parts, topic)
        async with parts.replica.transaction():
            note(uuid4(), 1)
        await topics.tell_once()
        assert follower.woken == 1


async def _fail(parts: Engine, topic: UUID) -> None:
    async with parts.replica.transaction():
        note(topic, 2)
        raise ZeroDivisionError


async def test_the_first_change_is_told_at_once_and_those_that_follow_together() -> None:
    topics, topic = Topics(pace_s=0.05), uuid4()
    follower = Follower(topics, topic)
    topics.change({topic: 1})
    telling = asyncio.ensure_future(topics.tell_once())
    await until(lambda: follower.woken == 1)
    assert not telling.done()
    for position in range(2, 9):
        topics.change({topic: position})
    await telling
    assert follower.woken == 1
    await topics.tell_once()
    assert (follower.woken, topics.lately[topic]) == (2, 8)
    topics.leave(topic)
    topics.change({uuid4(): 1 for _ in range(_LATELY + 10)})
    await topics.tell_once()
    assert (follower.woken, len(topics.lately)) == (2, _LATELY)


async def _change(one: Peer, topic: UUID) -> None:
    one.topics.change({topic: 1})
    await one.topics.tell_once()


async def test_a_change_is_heard_of_where_somebody_follows(database: str) -> None:
    async with peers(database, 3) as (writing, reading, third):
        topic = uuid4()
        follower, here = Follower(reading.topics, topic), Follower(writing.topics, topic)
        await until(lambda: set(writing.bus._interests.channels) == {topic})
        await _change(writing, topic)
        await until(lambda: follower.woken == 1)
        assert here.woken == 1
        await _change(third, topic)
        await until(lambda: (follower.woken, here.woken) == (2, 2))
        await _change(writing, uuid4())
        await _change(writing, topic)
        await until(lambda: follower.woken == 3)


async def test_a_change_that_crosses_the_interest_is_answered(database: str) -> None:
    async with peers(database, 1) as (writing,), peer(database, running=False) as reading:
        await reading.bus.probe_once()
        topic = uuid4()
        follower = Follower(reading.topics, topic)
        await _change(writing, topic)
        await reading.bus.announce_once()
        await until(lambda: follower.woken == 1)
        reading.bus._listener.disconnect()
        reading.bus._speaker.disconnect()


async def test_who_was_deaf_for_a_while_looks_afterwards(database: str) -> None:
    async with (
        peers(database, 1) as (writing,),
        proxy_to_postgres(database) as (proxy, dsn),
        peer(database, listen=dsn) as reading,
    ):
        topic = uuid4()
        follower = Follower(reading.topics, topic)
        await until(lambda: topic in writing.bus._interests.channels)
        proxy.close()
        await until(lambda: "listener" in reading.failing)
        await _change(writing, topic)
        assert follower.woken == 0
        proxy.open()
        await until(lambda: follower.woken > 0)
        await until(lambda: not reading.failing)
