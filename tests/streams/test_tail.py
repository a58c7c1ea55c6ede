"""Readers: every event after the cursor once and in order, wherever they start, however far they fall behind."""

import asyncio
from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from app.errors import BadRequest, Gone, NotFound
from app.streams.hub import Hub
from app.streams.tail import Tail
from app.wall import Wall
from tests.streams.engine import Engine, engine
from tests.streams.test_log import say
from tests.wire import wire_to_postgres


async def test_a_reader_resumes_at_every_position(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 7)
        await parts.end(writer)
        for cursor in range(9):
            assert await parts.read(writer.stream_id, cursor) == list(range(cursor + 1, 10))


async def test_a_reader_catches_up_and_follows_without_a_seam(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 300)
        readers = [asyncio.ensure_future(parts.read(writer.stream_id, cursor)) for cursor in (0, 1, 150)]
        for _ in range(30):
            say(writer, 11)
            await asyncio.sleep(0.001)
        await parts.end(writer)
        for cursor, reader in zip((0, 1, 150), readers, strict=True):
            assert await reader == list(range(cursor + 1, 633))


async def test_a_slow_reader_goes_back_to_the_table_instead_of_queueing(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        got: list[int] = []
        async for batch in parts.tail.follow(writer.stream_id, 0, 60):
            got += range(batch.first, batch.last + 1)
            if batch.ended:
                break
            (subscription,) = parts.hub._subscriptions[writer.stream_id]
            if len(got) < 2000:
                say(writer, 500)
                await writer.saved()
                assert len(subscription._batches) == 0 or subscription._events <= 256
            else:
                await parts.end(writer)
        assert got == list(range(1, got[-1] + 1))
        assert len(got) > 2000


class PausingTail(Tail):
    """The real reader, paused between the table's answer and its use."""

    def __init__(self, parts: Engine) -> None:
        super().__init__(Wall(parts.pool), parts.hub, parts.log)
        self.paused, self.go_on = asyncio.Event(), asyncio.Event()

    async def read(self, stream_id: UUID, cursor: int, limit: int) -> list[str]:
        payloads = await super().read(stream_id, cursor, limit)
        self.paused.set()
        await self.go_on.wait()
        return payloads


async def test_what_is_published_while_the_table_is_read_is_not_missed(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        parts.tail = PausingTail(parts)
        reader = asyncio.ensure_future(parts.read(writer.stream_id))
        await parts.tail.paused.wait()
        say(writer, 2)
        await parts.end(writer)
        parts.tail.go_on.set()
        assert await asyncio.wait_for(reader, 5) == [1, 2, 3, 4]


@pytest.mark.parametrize(("first", "count"), [(1, 3), (3, 2), (4, 1), (2, 1), (1, 1)])
async def test_a_batch_that_is_not_the_next_one_is_read_from_the_table(database: str, first: int, count: int) -> None:
    """Whatever reaches a reader from elsewhere, doubled, in part or too early, it delivers 1..n once."""
    async with engine(database, lane=False) as parts:
        writer = await parts.writer()
        reader = asyncio.ensure_future(parts.read(writer.stream_id))
        await until(lambda: parts.hub.readers == 1 and not _behind(parts, writer.stream_id))
        payloads = [f'{{"event":"token","data":{n}}}' for n in range(1, 5)]
        await parts.pool.execute(
            "insert into streaming_events select $1, n, ($2::text[])[n] from generate_series(2, 4) n",
            writer.stream_id,
            payloads,
        )
        parts.hub.publish(writer.stream_id, first, payloads[first - 1 : first - 1 + count])
        end = '{"event":"stream_end","data":{}}'
        await parts.pool.execute("insert into streaming_events values ($1, 5, $2)", writer.stream_id, end)
        parts.hub.publish(writer.stream_id, 5, [end])
        assert await asyncio.wait_for(reader, 5) == [1, 2, 3, 4, 5]


def _behind(parts: Engine, stream_id: UUID) -> bool:
    return any(subscription.behind for subscription in parts.hub._subscriptions[stream_id])


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


async def test_p11_events_that_nobody_published_are_found_by_looking_around(database: str) -> None:
    async with engine(database) as owner, engine(database) as other:
        writer = await owner.writer()
        reader = asyncio.ensure_future(other.read(writer.stream_id))
        say(writer, 5)
        await owner.end(writer)
        while not reader.done():
            other.hub.look_around(other.log.owns)
            await asyncio.sleep(0.005)
        assert await reader == list(range(1, 8))


async def test_a_reader_lives_through_a_database_that_is_away(database: str) -> None:
    async with wire_to_postgres(database) as (wire, dsn), engine(database) as owner, engine(dsn) as other:
        writer = await owner.writer()
        reader = asyncio.ensure_future(other.read(writer.stream_id))
        for _ in range(10):
            say(writer, 3)
            wire.cut()
            other.hub.look_around(other.log.owns)
            await asyncio.sleep(0.01)
        await owner.end(writer)
        while not reader.done():
            other.hub.look_around(other.log.owns)
            await asyncio.sleep(0.005)
        assert await reader == list(range(1, 33))


async def test_g4_cursors_beyond_the_end_and_unknown_streams(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        assert (await parts.tail.state(writer.stream_id, 1, owner=None)).tail == 1
        with pytest.raises(BadRequest):
            await parts.tail.state(writer.stream_id, 2, owner=None)
        await parts.end(writer)
        assert (await parts.tail.state(writer.stream_id, 2, owner=None)).ended
        with pytest.raises(BadRequest):
            await parts.tail.state(writer.stream_id, 3, owner=None)
        with pytest.raises(NotFound):
            await parts.tail.state(uuid4(), owner=None)


@pytest.mark.parametrize("cleaned", ["id <= 3", "true"])
async def test_cleaned_events_are_told_never_skipped(database: str, cleaned: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 5)
        await parts.end(writer)
        parts.log.close(writer)
        await parts.pool.execute(f"delete from streaming_events where {cleaned}")
        state = await parts.tail.state(writer.stream_id, 1, owner=None)
        with pytest.raises(Gone):
            await parts.tail.read_known(writer.stream_id, 1, 100, state)
        with pytest.raises(Gone):
            await parts.read(writer.stream_id, 1)


async def test_a_reader_leaves_when_the_server_closes_or_it_is_too_old(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        reader = asyncio.ensure_future(parts.read(writer.stream_id))
        old = [batch async for batch in parts.tail.follow(writer.stream_id, 0, 0)]
        assert old == []
        await asyncio.sleep(0)
        parts.hub.close()
        assert await reader in ([1], [])
        assert parts.hub.readers == 0


async def test_a_reader_that_has_everything_already_is_not_kept(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        await parts.end(writer)
        parts.log.close(writer)
        assert await asyncio.wait_for(parts.read(writer.stream_id, 2), 5) == []


async def test_readers_leave_nothing_behind(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        reader = asyncio.ensure_future(parts.read(writer.stream_id))
        while not parts.hub.readers:
            await asyncio.sleep(0)
        reader.cancel()
        await asyncio.wait([reader])
        assert parts.hub.readers == 0
        assert not parts.hub._subscriptions


async def test_the_long_poll_answers_at_the_first_event_or_in_time(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        assert await parts.tail.wait(writer.stream_id, 1, 0.01) == []
        waiting = asyncio.ensure_future(parts.tail.wait(writer.stream_id, 1, 30))
        while not parts.hub.readers:
            await asyncio.sleep(0)
        say(writer, 1)
        assert len(await waiting) == 1
        assert parts.hub.readers == 0


async def test_no_poke_is_lost_before_during_and_after_a_wait() -> None:
    subscription = Hub(max_events=10, max_bytes=1000).subscribe(uuid4())
    subscription.poke()
    await subscription.wait()
    waiting = asyncio.ensure_future(subscription.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    subscription.poke()
    subscription.poke()
    await waiting
    given_up = asyncio.ensure_future(subscription.wait())
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.wait([given_up])
    subscription.poke()
    await subscription.wait()


def test_a_subscription_never_holds_more_than_its_bounds() -> None:
    hub = Hub(max_events=10, max_bytes=10_000)
    stream_id = uuid4()
    subscription = hub.subscribe(stream_id)
    subscription.behind = False
    payload = '{"event":"token","data":{}}'
    hub.publish(stream_id, 1, [payload] * 10)
    assert not subscription.behind
    hub.publish(stream_id, 11, [payload])
    assert subscription.behind
    assert subscription.take() is None
    subscription.behind = False
    hub.publish(stream_id, 12, ['{"event":"token","data":"' + "x" * 10_000 + '"}'])
    assert subscription.behind


async def test_a_replica_that_was_declared_dead_does_not_contradict_its_successor(database: str) -> None:
    """It has not noticed yet: a reader that comes from the successor is further than it knows."""
    async with engine(database) as zombie, engine(database) as heir:
        writer = await zombie.writer()
        await zombie.replica.retire()
        await heir.streams.claim(50, owners=3)
        successor = heir.log.open(writer.stream_id, last_id=writer.last_id)
        successor.append("token", {"token": "x", "markers": {}, "flow": "main"})
        last = await successor.saved()
        assert zombie.log.last_id(writer.stream_id) == last - 1
        assert (await zombie.tail.state(writer.stream_id, last, owner=None)).tail == last
