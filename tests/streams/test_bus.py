"""The bus: readers on other replicas hear of every event at once, and a bus that loses anything costs them nothing."""

import asyncio
import random
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from app.postgres import Connection
from app.streams import signals
from app.streams.bus import _RANGES, NotifyBus, PollBus, Times
from app.streams.log import Writer
from app.streams.signals import Message
from tests.proxy import Proxy, proxy_to_postgres
from tests.streams.engine import Engine
from tests.streams.peers import QUIET, Peer, peer, peers, until
from tests.streams.test_log import say

# Readers do not poll in these tests, so whatever arrives came by the bus; each waits for this long at most.
PATIENCE_S = 10


class Reader:
    """A reader of any replica, and what it got."""

    def __init__(self, parts: Engine, stream_id: UUID, cursor: int = 0) -> None:
        self.cursor = cursor
        self.got: list[int] = []
        self.said: list[str] = []
        self.task = asyncio.ensure_future(self._follow(parts, stream_id))

    async def _follow(self, parts: Engine, stream_id: UUID) -> None:
        async for batch in parts.tail.follow(stream_id, self.cursor, 600):
            self.got += range(batch.first, batch.last + 1)
            self.said += re.findall(r"<\d+>", batch.frames.decode())

    async def has(self, last: int) -> None:
        await until(lambda: bool(self.got) and self.got[-1] >= last)

    async def ends(self, last: int) -> None:
        await asyncio.wait_for(asyncio.shield(self.task), PATIENCE_S)
        assert self.got == list(range(self.cursor + 1, last + 1))

    async def leaves(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


async def wanted(writing: Peer, writer: Writer) -> None:
    """Wait until a replica knows that another one follows its stream."""
    await until(lambda: writer.stream_id in writing.bus._interests.channels)


def sent(one: Peer) -> float:
    value = one.parts.metrics.registry.get_sample_value("parley_bus_notifications_total", {"direction": "sent"})
    return value or 0


# -- what was committed there


async def test_a_reader_elsewhere_gets_every_event_as_it_is_committed(database: str) -> None:
    async with peers(database, 3) as (writing, reading, also):
        writer = await writing.parts.writer()
        readers = [Reader(one.parts, writer.stream_id, cursor) for one in (reading, also, reading) for cursor in (0, 1)]
        await wanted(writing, writer)
        for last in range(2, 30):
            say(writer, 1)
            for reader in readers:
                await reader.has(last)
        await writing.parts.streams.conclude(writer, "message", {"flow": "main"}, work=_nothing)
        for reader in readers:
            await reader.has(30)
        await writing.parts.end(writer)
        for reader in readers:
            await reader.ends(31)


async def test_all_readers_of_a_replica_are_served_by_one_read(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writers = [await writing.parts.writer() for _ in range(5)]
        readers = [Reader(reading.parts, writer.stream_id) for writer in writers for _ in range(4)]
        for writer, reader in zip(writers, readers[::4], strict=True):
            await wanted(writing, writer)
            await reader.has(1)
        await asyncio.gather(*(reader.has(1) for reader in readers))
        pages = _counted(reading.parts)
        for last in (8, 15, 22):
            for writer in writers:
                for n in range(last - 6, last + 1):
                    writer.append("token", {"token": f"<{n}>", "markers": {}, "flow": "main"})
            for reader in readers:
                await reader.has(last)
        assert pages == [], "no reader has read a page of its own"
        for reader in readers:
            assert reader.said == [f"<{n}>" for n in range(2, 23)]


async def test_a_reader_that_has_looked_by_itself_leaves_the_others_what_they_lack(database: str) -> None:
    async with peers(database, 1) as (writing,), peer(database, running=False) as reading:
        await reading.bus.probe_once()
        writer = await writing.parts.writer()
        early = [Reader(reading.parts, writer.stream_id) for _ in range(2)]
        await asyncio.gather(*(reader.has(1) for reader in early))
        say(writer, 3)
        await writer.saved()
        late = [Reader(reading.parts, writer.stream_id, cursor) for cursor in (0, 3)]
        await asyncio.gather(*(reader.has(4) for reader in late))
        pages = _counted(reading.parts)
        say(writer, 2)
        await writer.saved()
        for last in (3, 6):
            reading.bus._hear(f"wake {writer.stream_id.hex}:{last}")
            await reading.bus.read_once()
            for reader in early:
                await reader.has(last)
        assert pages == []
        for reader in (*early, *late):
            await reader.has(6)
            assert reader.got == list(range(reader.cursor + 1, 7))
            await reader.leaves()
        reading.bus._listener.disconnect()
        reading.bus._speaker.disconnect()


async def test_a_reader_far_behind_reads_the_table_by_itself(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        await reader.has(1)
        assert list(reading.bus._ranges({writer.stream_id: 257})) == [(writer.stream_id, 1, 257)]
        assert list(reading.bus._ranges({writer.stream_id: 258})) == []
        say(writer, 3000)
        await reader.has(3001)
        await writing.parts.end(writer)
        await reader.ends(3002)


async def test_what_was_committed_before_the_interest_was_known_is_answered(database: str) -> None:
    async with peers(database, 1) as (writing,), peer(database, running=False) as reading:
        await reading.bus.probe_once()
        writer, ended = await writing.parts.writer(), await writing.parts.writer()
        readers = [Reader(reading.parts, one.stream_id) for one in (writer, ended)]
        await asyncio.gather(*(reader.has(1) for reader in readers))
        say(writer, 1)
        await writer.saved()
        await writing.parts.end(ended)
        writing.parts.log.close(ended)
        await reading.bus.announce_once()
        await until(lambda: len(reading.bus._heard) == 2)
        await reading.bus.read_once()
        await readers[0].has(2)
        await readers[1].ends(2)
        await readers[0].leaves()
        reading.bus._listener.disconnect()
        reading.bus._speaker.disconnect()


async def test_what_is_committed_outside_of_the_lane_travels_too(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        async with writing.parts.replica.transaction() as connection:
            waiting = await writing.parts.streams.enqueue(connection, "u", "s", "c", 1, "main")
        reader = Reader(reading.parts, waiting.id)
        await until(lambda: waiting.id in writing.bus._interests.channels)
        async with writing.parts.replica.transaction() as connection:
            await writing.parts.streams.end_queued(connection, waiting.id, "cancelled", {})
        writing.parts.hub.stir(waiting.id)
        await reader.ends(1)


async def test_a_stream_that_goes_on_elsewhere_is_heard_from_there(database: str) -> None:
    """Its readers on the replica that has lost it, and those that followed it from a third one."""
    async with peers(database, 3) as (first, second, third):
        writer = await first.parts.writer()
        readers = [Reader(one.parts, writer.stream_id) for one in (first, second, third)]
        await wanted(first, writer)
        say(writer, 2)
        for reader in readers:
            await reader.has(3)
        await first.parts.replica.retire()
        (orphan,) = await second.parts.streams.claim(10, owners=3)
        first.parts.log.close(writer)
        successor = second.parts.log.open(orphan.stream.id, last_id=3)
        await until(lambda: len(second.bus._interests.channels.get(writer.stream_id, {})) == 2)
        say(successor, 2)
        for reader in readers:
            await reader.has(5)
        await second.parts.end(successor)
        for reader in readers:
            await reader.ends(6)


async def test_the_long_poll_is_woken_too(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writer = await writing.parts.writer()
        polling = asyncio.ensure_future(reading.parts.tail.wait(writer.stream_id, 1, 60))
        await wanted(writing, writer)
        say(writer, 2)
        assert len(await asyncio.wait_for(polling, PATIENCE_S)) == 2


# -- interests


async def test_nobody_is_told_of_what_nobody_follows(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        before = sent(writing)
        writer = await writing.parts.writer()
        here = Reader(writing.parts, writer.stream_id)
        say(writer, 50)
        await writing.parts.end(writer)
        await here.ends(52)
        assert sent(writing) == before
        assert not reading.bus._interests.channels, "what one writes itself one does not ask for"


async def test_interests_are_repeated_while_there_are_readers_and_then_forgotten(database: str) -> None:
    times = Times(gather=0.001, repeat=0.05, forget=0.3, probe=600, echo=5, again=0.01)
    async with peers(database, 2, times=times) as (writing, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        until_then = writing.bus._interests.channels[writer.stream_id].copy()
        await until(lambda: writing.bus._interests.channels[writer.stream_id] != until_then)
        await reader.leaves()
        await until(lambda: not writing.bus._interests.channels)
        before = sent(writing)
        say(writer, 3)
        await writer.saved()
        assert sent(writing) == before


async def test_a_new_replica_asks_what_the_others_follow(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        async with peer(database) as newcomer:
            await wanted(newcomer, writer)
        await reader.leaves()


# -- the connections


async def _terminate(database: str, *connections: Connection | None) -> None:
    """Have the server end them."""
    look = await asyncpg.connect(database)
    for connection in connections:
        assert connection is not None
        assert await look.fetchval("select pg_terminate_backend($1)", connection.get_server_pid())
    await look.close()


@pytest.mark.parametrize("which", ["listening", "speaking"])
async def test_d4_connections_that_the_server_ends_are_opened_anew(database: str, which: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        await reader.has(1)
        listening, speaking = reading.bus._listener._connection, writing.bus._speaker._connection
        if which == "listening":
            await _terminate(database, listening)
            await until(lambda: reading.bus._listener._connection not in (listening, None), within_s=3)
        else:
            await _terminate(database, speaking)
            await until(lambda: speaking is not None and speaking.is_closed())
        for last in range(2, 10):
            say(writer, 1)
            await reader.has(last)
        await writing.parts.end(writer)
        await reader.ends(10)


@asynccontextmanager
async def _behind_a_proxy(database: str, times: Times) -> AsyncGenerator[tuple[Proxy, Peer], None]:
    """A replica whose bus, and nothing else of it, reaches the database through a proxy."""
    async with proxy_to_postgres(database) as (proxy, dsn), peer(database, listen=dsn, times=times) as reading:
        yield proxy, reading


async def test_what_was_committed_while_nobody_listened_is_read_afterwards(database: str) -> None:
    async with peers(database, 1) as (writing,), _behind_a_proxy(database, QUIET) as (proxy, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        await reader.has(1)
        proxy.close()
        await until(lambda: "listener" in reading.failing)
        say(writer, 3)
        await writer.saved()
        assert reader.got == [1]
        proxy.open()
        await reader.has(4)
        await until(lambda: not reading.failing)
        await reader.leaves()


async def test_what_could_not_be_told_is_told_later(database: str) -> None:
    async with _behind_a_proxy(database, QUIET) as (proxy, writing), peer(database) as reading:
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        await reader.has(1)
        proxy.close()
        say(writer, 3)
        await until(lambda: "notifying" in writing.failing)
        assert reader.got == [1]
        proxy.open()
        await reader.has(4)
        await reader.leaves()
        await until(lambda: not writing.failing)


async def test_d5_a_listener_that_hears_nothing_is_found_out(database: str) -> None:
    times = Times(gather=0.001, repeat=600, forget=1800, probe=0.1, echo=0.2, again=0.01)
    async with peers(database, 1) as (writing,), _behind_a_proxy(database, times) as (proxy, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        await reader.has(1)
        proxy.stall(answers_only=True)
        await until(lambda: "listener" in reading.failing)
        assert reading.bus.state()["listening"] is False
        assert not reading.bus._listener.connected, "it is not trusted any more"
        say(writer, 3)
        await writer.saved()
        reading.parts.hub.look_around(reading.parts.log.owns)
        reading.parts.hub.look_around(reading.parts.log.owns)
        await reader.has(4)
        proxy.open()
        await until(lambda: not reading.failing)
        say(writer, 1)
        await reader.has(5)
        await reader.leaves()


async def test_replicas_poke_each_other_but_not_themselves(database: str) -> None:
    async with peers(database, 2) as (one, other):
        one.bus.poke("stop")
        await asyncio.wait_for(other.bus.stop.wait(), PATIENCE_S)
        assert not other.bus.gone.is_set()
        await one.bus.tell_gone()
        await asyncio.wait_for(other.bus.gone.wait(), PATIENCE_S)
        # Its own echo comes behind its own pokes.
        await one.bus.probe_once()
        assert [one.bus.stop.is_set(), one.bus.gone.is_set()] == [False, False]


async def test_strangers_notifications_do_no_harm(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await wanted(writing, writer)
        await reader.has(1)
        stranger = await asyncpg.connect(database)
        mine = signals.channel_of(reading.bus._id)
        nobodys = uuid4()
        reading.bus._hear(f"wake {nobodys.hex}:5")
        assert nobodys not in reading.bus._heard, "what nobody follows is not kept"
        for channel, payload in [
            (mine, "wake"),
            (mine, "rubbish"),
            (mine, f"wake {writer.stream_id.hex}:77"),
            (mine, f"wake {writer.stream_id.hex}:99999999999999999999"),
            (mine, f"wake {writer.stream_id.hex}:-5"),
            (mine, f"wake {uuid4().hex}:5"),
            (mine, "echo 12345"),
            (signals.COMMON, f"want {uuid4().hex} {writer.stream_id.hex}"),
        ]:
            await stranger.execute("select pg_notify($1, $2)", channel, payload)
        await stranger.close()
        for last in range(2, 6):
            say(writer, 1)
            await reader.has(last)
        await writing.parts.end(writer)
        await reader.ends(6)


async def test_without_a_bus_nothing_is_said() -> None:
    bus = PollBus()
    await bus.run()
    bus.poke("stop")
    await bus.tell_gone()
    assert bus.state() == {"kind": "poll"}
    assert [bus.stop.is_set(), bus.gone.is_set()] == [False, False]


# -- any loss


class LossyBus(NotifyBus):
    """Loses, delays and doubles what it says and hears."""

    chance = random.Random(0)

    async def _say(self, messages: list[Message]) -> None:
        kept = [message for message in messages if "echo" in message[1] or self.chance.random() < 0.6]
        await super()._say(kept)

    def _hear(self, payload: str) -> None:
        if payload.startswith("echo"):
            return super()._hear(payload)
        for _ in range(self.chance.choice((0, 1, 1, 2))):
            asyncio.get_running_loop().call_later(self.chance.choice((0, 0, 0.005)), super()._hear, payload)
        return None


@pytest.mark.parametrize("seed", range(8))
async def test_a_bus_that_loses_anything_costs_no_event(database: str, seed: int) -> None:
    LossyBus.chance = chance = random.Random(seed)
    times = Times(gather=0.001, repeat=0.02, forget=0.05, probe=0.05, echo=5, again=0.01)
    async with (
        peer(database, times=times, bus_type=LossyBus) as writing,
        peer(database, times=times, bus_type=LossyBus) as reading,
    ):
        writers = [await writing.parts.writer() for _ in range(3)]
        lasts = [1] * len(writers)
        readers: list[tuple[int, Reader]] = []
        for _ in range(60):
            which = chance.randrange(len(writers))
            count = chance.choice((1, 1, 3, 20, 300))
            say(writers[which], count)
            lasts[which] += count
            if chance.random() < 0.3:
                cursor = chance.randint(0, writers[which].last_id)
                readers.append((which, Reader(reading.parts, writers[which].stream_id, cursor)))
            if chance.random() < 0.1:
                reading.parts.hub.look_around(reading.parts.log.owns)
            await asyncio.sleep(chance.choice((0, 0, 0.001, 0.01)))
        for writer in writers:
            await writing.parts.end(writer)
        async with asyncio.timeout(PATIENCE_S):
            while not all(reader.task.done() for _, reader in readers):
                reading.parts.hub.look_around(reading.parts.log.owns)
                await asyncio.sleep(0.02)
        for which, reader in readers:
            await reader.ends(lasts[which] + 1)


# -- the read


async def test_the_read_for_others_takes_the_index(database: str) -> None:
    """Also where the partitions are nearly empty, and known to be: plans are kept, and partitions grow."""
    async with peer(database) as one:
        writers = [await one.parts.writer() for _ in range(40)]
        for writer in writers:
            say(writer, 5)
            await writer.saved()
        await one.parts.pool.execute("drop table " + ",".join(await _partitions(one, but=2)))
        for statement in ("select", "analyze streaming_events"):
            await one.parts.pool.execute(statement)
            streams = [writer.stream_id for writer in writers]
            plan = await one.bus._listener.fetch(f"explain {_RANGES}", streams, [1] * 40, [5] * 40)
            text = "\n".join(row[0] for row in plan)
            assert "Seq Scan" not in text
            assert "Join" not in text
            assert "Index Cond: ((stream_id = r.s) AND (id > r.a) AND (id <= r.z))" in text


async def _partitions(one: Peer, *, but: int) -> list[str]:
    """All but so many: today's is the second, after yesterday's."""
    rows = await one.parts.pool.fetch(
        "select inhrelid::regclass::text as name from pg_inherits"
        " where inhparent = 'streaming_events'::regclass order by 1"
    )
    return [row["name"] for row in rows[but:]]


async def test_events_that_are_not_there_send_the_reader_to_the_table(database: str) -> None:
    async with peers(database, 2) as (writing, reading):
        writer = await writing.parts.writer()
        reader = Reader(reading.parts, writer.stream_id)
        await reader.has(1)
        async with asyncio.timeout(10):
            while True:
                # The bus itself may be reading with this connection just now, or have lost it to us.
                with suppress(asyncpg.InterfaceError, ConnectionResetError):
                    await reading.bus._deliver([(writer.stream_id, 1, 9)])
                    break
                await asyncio.sleep(0)
        say(writer, 2)
        await reader.has(3)
        await reader.leaves()


def _counted(parts: Engine) -> list[int]:
    """The cursors from which readers read pages of the table, from now on."""
    cursors: list[int] = []
    read = parts.tail.read

    async def counted(stream_id: UUID, cursor: int, limit: int) -> list[str]:
        cursors.append(cursor)
        return await read(stream_id, cursor, limit)

    parts.tail.read = counted  # type: ignore[method-assign]
    return cursors


async def _nothing(_: Any) -> None:
    return None
