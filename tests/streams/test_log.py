"""The lane: ids without gaps, nothing before its commit, nothing twice, nothing after a fence."""

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest

from app.errors import Unavailable
from app.streams.appending import StreamLost
from app.streams.log import Limits, Writer
from app.streams.partitions import first_id
from app.streams.replicas import Fenced
from app.streams.stream import Orphan
from tests.streams.engine import Engine, engine
from tests.wire import wire_to_postgres


def say(writer: Writer, count: int) -> None:
    for _ in range(count):
        writer.append("token", {"token": "x", "markers": {}, "flow": "main"})


async def test_ids_follow_the_order_of_appends_without_gaps(database: str) -> None:
    async with engine(database) as parts:
        writers = [await parts.writer() for _ in range(3)]
        for count in (1, 7, 30):
            for writer in writers:
                say(writer, count)
            await asyncio.sleep(0)
        assert [await writer.saved() for writer in writers] == [39, 39, 39]
        for writer in writers:
            assert await parts.stored(writer.stream_id) == list(range(1, 40))


async def test_readers_hear_of_events_after_their_commit_only(database: str) -> None:
    async with engine(database, lane=False) as parts:
        writer = await parts.writer()
        subscription = parts.hub.subscribe(writer.stream_id)
        subscription.behind = False
        say(writer, 2)
        assert subscription.take() is None
        await parts.log.flush()
        batch = subscription.take()
        assert batch is not None
        assert (batch.first, batch.last) == (2, 3)
        assert await parts.stored(writer.stream_id) == [1, 2, 3]


async def test_frames_are_built_once_and_shared(database: str) -> None:
    async with engine(database, lane=False) as parts:
        writer = await parts.writer()
        readers = [parts.hub.subscribe(writer.stream_id) for _ in range(3)]
        for reader in readers:
            reader.behind = False
        say(writer, 1)
        await parts.log.flush()
        batches = [reader.take() for reader in readers]
        assert batches[0] is not None
        assert all(batch is batches[0] for batch in batches)


async def test_a_flush_carries_a_bounded_number_of_events(database: str) -> None:
    async with engine(database, limits=Limits(flush_events=10), lane=False) as parts:
        writer = await parts.writer()
        say(writer, 25)
        for last in (11, 21, 26, 26):
            await parts.log.flush()
            assert writer.last_id == last


async def test_a_stream_without_a_partition_is_lost_alone(database: str) -> None:
    async with engine(database, lane=False) as parts:
        good = await parts.writer()
        far = UUID(int=first_id(datetime.now(UTC) + timedelta(days=300)).int + uuid4().int % 2**80)
        bad = parts.log.open(far, last_id=0)
        say(bad, 1)
        say(good, 3)
        await parts.log.flush()
        assert good.last_id == 4
        with pytest.raises(StreamLost):
            say(bad, 1)


async def test_d9_a_commit_whose_answer_was_lost_is_not_doubled(database: str) -> None:
    async with wire_to_postgres(database) as (wire, dsn), engine(database, log_dsn=dsn) as parts:
        writer = await parts.writer()
        say(writer, 1)
        await writer.saved()
        wire.answers.clear()
        say(writer, 5)
        while len(await parts.stored(writer.stream_id)) < 7:
            await asyncio.sleep(0.01)
        say(writer, 5)
        wire.answers.set()
        wire.cut()
        assert await writer.saved() == 12
        assert await parts.stored(writer.stream_id) == list(range(1, 13))


async def test_connections_broken_again_and_again_leave_no_gap(database: str) -> None:
    async with wire_to_postgres(database) as (wire, dsn), engine(database, log_dsn=dsn) as parts:
        writer = await parts.writer()
        for round_ in range(20):
            say(writer, 5)
            if round_ % 3 == 0:
                wire.cut()
            await asyncio.sleep(0.002 * (round_ % 4))
        assert await writer.saved() == 101
        assert await parts.stored(writer.stream_id) == list(range(1, 102))


async def test_d8_a_stream_that_the_server_has_lost_events_of_is_written_no_more(database: str) -> None:
    async with wire_to_postgres(database) as (wire, dsn), engine(database, log_dsn=dsn) as parts:
        kept, busy, silent = [await parts.writer() for _ in range(3)]
        for writer in (kept, busy, silent):
            say(writer, 5)
            await writer.saved()
        lost: list[UUID] = []
        parts.log.on_lost = lost.append
        for writer in (busy, silent):
            await parts.pool.execute("delete from streaming_events where stream_id = $1 and id > 4", writer.stream_id)
        wire.cut()
        say(busy, 1)
        say(kept, 1)
        assert await kept.saved() == 7
        assert sorted(lost) == sorted([busy.stream_id, silent.stream_id]), "also the one that had nothing to say"
        for writer in (busy, silent):
            with pytest.raises(StreamLost):
                say(writer, 1)
            assert await parts.stored(writer.stream_id) == [1, 2, 3, 4]
        assert not parts.log.full


async def test_d8_an_end_does_not_follow_on_what_is_not_there(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 3)
        await writer.saved()
        await parts.pool.execute("delete from streaming_events where stream_id = $1 and id = 4", writer.stream_id)
        with pytest.raises(StreamLost):
            await parts.end(writer)
        assert await parts.stored(writer.stream_id) == [1, 2, 3]


async def test_an_id_taken_by_somebody_else_loses_the_stream_instead_of_overwriting(database: str) -> None:
    async with wire_to_postgres(database) as (_, dsn), engine(database, log_dsn=dsn) as parts:
        writer = await parts.writer()
        await parts.pool.execute("insert into streaming_events values ($1, 2, 'theirs')", writer.stream_id)
        say(writer, 1)
        with pytest.raises(StreamLost):
            await writer.saved()
        assert await parts.stored(writer.stream_id) == [1, 2]


async def test_a_repeated_batch_must_find_its_own_events(database: str) -> None:
    async with engine(database, lane=False) as parts:
        stream = await parts.begin()
        await parts.pool.execute("insert into streaming_events values ($1, 2, 'theirs')", stream.id)
        await parts.appender.connect({})
        with pytest.raises(StreamLost):
            await parts.appender.append([(stream.id, 2, "ours"), (stream.id, 3, "ours")], again=True)
        await parts.appender.append([(stream.id, 2, "theirs"), (stream.id, 3, "ours")], again=True)


@pytest.mark.parametrize("again", [False, True])
async def test_a_dead_replica_is_told_so_whether_its_batch_is_there_already_or_not(database: str, again: bool) -> None:
    async with engine(database, lane=False) as parts:
        stream = await parts.begin()
        await parts.appender.connect({})
        await parts.appender.append([(stream.id, 2, "in time")], again=again)
        await parts.pool.execute("update replicas set alive = false")
        for event_id, payload in ((2, "in time"), (3, "too late")):
            with pytest.raises(Fenced):
                await parts.appender.append([(stream.id, event_id, payload)], again=again)
        assert await parts.stored(stream.id) == [1, 2]


async def test_the_lane_holds_back_a_crowded_stream_and_gives_up_in_time(database: str) -> None:
    limits = Limits(stream_bytes=4096, unsaved_s=0.05)
    async with engine(database, limits=limits, lane=False) as parts:
        writer = await parts.writer()
        while not writer.crowded():
            say(writer, 1)
        with pytest.raises(Unavailable, match="could not be saved"):
            await writer.room()
        await parts.log.flush()
        await writer.room()
        assert not writer.crowded()


async def test_all_streams_together_are_bounded_too(database: str) -> None:
    async with engine(database, limits=Limits(total_bytes=1000), lane=False) as parts:
        writers = [await parts.writer() for _ in range(20)]
        for writer in writers:
            say(writer, 1)
        assert all(writer.crowded() for writer in writers)
        await parts.log.flush()
        assert not any(writer.crowded() for writer in writers)
        for writer in writers:
            parts.log.close(writer)
        assert not parts.log.full


async def test_closing_a_writer_with_unsaved_events_gives_their_room_back(database: str) -> None:
    async with engine(database, limits=Limits(total_bytes=100), lane=False) as parts:
        writer = await parts.writer()
        say(writer, 10)
        assert parts.log.full
        parts.log.close(writer)
        assert not parts.log.full


async def test_d11_a_flush_survives_whatever_its_connection_raises(database: str) -> None:
    """A lock wait that ran out, a table that is gone for a moment: tried again, and the lane lives."""
    async with engine(database) as parts:
        writer = await parts.writer()
        await parts.pool.execute("alter table streaming_events rename to away")
        say(writer, 3)
        await asyncio.sleep(0.05)
        await parts.pool.execute("alter table away rename to streaming_events")
        assert await writer.saved() == 4
        assert await parts.stored(writer.stream_id) == [1, 2, 3, 4]


# -- one end


async def test_the_end_comes_last_with_status_in_one_transaction(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 3)
        await parts.end(writer)
        row = await parts.pool.fetchrow("select * from streaming_sessions where id = $1", writer.stream_id)
        assert row is not None
        assert (row["status"], row["last_event_id"]) == ("completed", 5)
        assert await parts.read(writer.stream_id) == [1, 2, 3, 4, 5]


async def test_events_appended_while_somebody_writes_alone_come_after(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 2)

        async def meanwhile(connection: object) -> None:
            say(writer, 2)
            await asyncio.sleep(0.05)

        await parts.streams.conclude(writer, "message", {"message_id": "m", "flow": "main"}, work=meanwhile)
        assert await writer.saved() == 6
        rows = await parts.pool.fetch(
            "select id, payload from streaming_events where stream_id = $1 order by id", writer.stream_id
        )
        assert [row["id"] for row in rows if '"message"' in row["payload"][:20]] == [4]


async def test_d9_an_end_whose_commit_got_no_answer_is_written_once(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        tries = 0

        async def committed_but_broken() -> None:
            nonlocal tries
            tries += 1
            async with parts.replica.transaction() as connection:
                await connection.execute("insert into streaming_events values ($1, 2, $2)", writer.stream_id, payload)
            raise ConnectionResetError

        payload = '{"event":"stream_end"}'
        stored = partial(parts.streams._is_stored, writer.stream_id, 2, payload)
        await parts.streams._until_committed(committed_but_broken, writer.stream_id, stored)
        assert tries == 1
        assert await parts.stored(writer.stream_id) == [1, 2]


# -- the fence


async def test_a_fenced_replica_learns_it_from_its_append_and_writes_nothing(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        say(writer, 1)
        await writer.saved()
        fenced = asyncio.Event()
        parts.log.on_fenced = fenced.set
        await parts.pool.execute("update replicas set alive = false")
        say(writer, 1)
        with pytest.raises(Fenced):
            await writer.saved()
        assert fenced.is_set()
        with pytest.raises(Fenced):
            say(writer, 1)
        assert await parts.stored(writer.stream_id) == [1, 2]


async def test_a_fenced_replica_commits_no_transaction(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        await parts.pool.execute("update replicas set alive = false")
        with pytest.raises(Fenced):
            await parts.end(writer)
        with pytest.raises(Fenced):
            await parts.begin()
        assert await parts.pool.fetchval("select count(*) from streaming_sessions where status <> 'active'") == 0


@pytest.mark.parametrize("round_", range(12))
async def test_adversary_no_append_lands_after_the_fence_has_committed(database: str, round_: int) -> None:
    """Appends at full speed against a takeover at a moment that differs by round (G7)."""
    async with engine(database) as parts, engine(database) as other:
        writers = [await parts.writer() for _ in range(4)]
        appending = asyncio.ensure_future(_append_for_ever(writers))
        await asyncio.sleep(0.002 * round_)
        assert await other.pool.execute("update replicas set alive = false where id = $1", parts.replica.id)
        after_fence = [len(await other.stored(writer.stream_id)) for writer in writers]
        with pytest.raises(Fenced):
            await appending
        for writer, count in zip(writers, after_fence, strict=True):
            assert await other.stored(writer.stream_id) == list(range(1, count + 1))


async def _append_for_ever(writers: list[Writer]) -> None:
    while True:
        for writer in writers:
            say(writer, 1)
        await asyncio.sleep(0)


# -- takeover


async def claim(parts: Engine, most: int = 50, *, ends_only: bool = False) -> list[Orphan]:
    return await parts.streams.claim(most, owners=3, ends_only=ends_only)


async def test_only_streams_of_dead_owners_are_claimed_each_by_one(database: str) -> None:
    async with engine(database) as dead, engine(database) as one, engine(database) as two:
        lost = [await dead.writer() for _ in range(6)]
        for writer in lost:
            say(writer, 2)
            await writer.saved()
        living = await one.writer()
        await dead.replica.retire()
        claimed = await asyncio.gather(claim(one), claim(two))
        assert all(len(part) <= 3 for part in claimed), "each takes its share"
        orphans = [orphan for part in claimed for orphan in part]
        while more := await claim(one):
            orphans += more
        assert len(orphans) == len({orphan.stream.id for orphan in orphans})
        assert {orphan.stream.id for orphan in orphans} == {writer.stream_id for writer in lost}
        assert {orphan.attempt for orphan in orphans} == {2}
        assert living.stream_id not in {orphan.stream.id for orphan in orphans}


async def test_a_replica_without_room_claims_only_what_is_merely_to_be_ended(database: str) -> None:
    async with engine(database) as dead, engine(database) as one:
        begun, stopped, exhausted, old = [await dead.begin() for _ in range(4)]
        update = "update streaming_sessions set {} where id = $1"
        for stream in (begun, stopped, exhausted):
            await one.pool.execute(update.format("request = '{}'"), stream.id)
        await one.streams.ask_to_stop(one.pool, stopped.id, owner=None)
        await one.pool.execute(update.format("attempt = 3"), exhausted.id)
        await dead.replica.retire()
        ends = {orphan.stream.id for orphan in await claim(one, ends_only=True)}
        assert ends == {stopped.id, exhausted.id, old.id}
        assert [orphan.stream.id for orphan in await claim(one)] == [begun.id]


async def test_what_a_drained_replica_leaves_has_had_one_owner_less(database: str) -> None:
    async with engine(database) as drained, engine(database) as one:
        await drained.begin()
        await drained.streams.let_go()
        await drained.replica.retire()
        [orphan] = await claim(one)
        assert orphan.attempt == 1
        assert 0 <= orphan.age_s < 60


async def test_d9_a_claim_whose_answer_was_lost_is_found(database: str) -> None:
    """The stream is this replica's in the table, and nobody runs it."""
    async with engine(database) as parts:
        lost, running = await parts.begin(), await parts.begin()
        parts.streams.settle(lost.id)
        parts.streams.settle(running.id)
        assert await claim(parts) == []
        await parts.streams.doubt_all_but({running.id})
        assert await claim(parts) == [], "it may be on its way"
        parts.streams._doubtful[lost.id] -= 10
        assert [orphan.stream for orphan in await claim(parts)] == [lost]


async def test_a_new_incarnation_saves_nothing_for_a_run_of_the_one_before(database: str) -> None:
    async with engine(database) as parts:
        writer = await parts.writer()
        await parts.replica.retire()
        await parts.replica.renew()
        with pytest.raises(Fenced):
            await parts.end(writer)
        assert await parts.stored(writer.stream_id) == [1]


async def test_only_a_replica_that_has_been_heard_for_a_lease_may_fence(database: str) -> None:
    async with engine(database) as parts:
        replica = parts.replica
        replica._lease_s = 0.3
        assert not replica.may_fence()
        async with asyncio.timeout(5):
            while not replica.may_fence():
                await replica.beat()
        replica._beat_at -= 0.2
        assert not replica.may_fence(), "its own beat is late: those of the others may be, too"
        await replica.beat()
        assert not replica.may_fence()
        replica._beating_since = None
        assert not replica.may_fence()


async def test_silence_is_measured_by_the_databases_clock(database: str) -> None:
    async with engine(database) as silent, engine(database) as one:
        await one.replica.beat()
        assert await one.replica.fence_silent() == []
        await one.pool.execute("update replica_beats set beat_at = beat_at - interval '2 minutes'")
        assert await one.replica.fence_silent() == [silent.replica.id]
        assert await one.replica.fence_silent() == []


async def test_an_accept_left_in_doubt_is_claimed_later(database: str) -> None:
    async with engine(database) as parts:
        stream = await parts.begin()
        assert await claim(parts) == []
        parts.streams._doubtful[stream.id] -= 10
        assert [orphan.stream for orphan in await claim(parts)] == [stream]


async def test_a_confirmed_stream_is_never_claimed_from_its_living_owner(database: str) -> None:
    async with engine(database) as parts, engine(database) as other:
        stream = await parts.begin()
        parts.streams.settle(stream.id)
        assert await claim(parts) == []
        assert await claim(other) == []


async def test_partitions_are_made_once_whoever_asks(database: str) -> None:
    async with engine(database) as one, engine(database) as two:
        from app.streams.partitions import Partitions

        made = await asyncio.gather(
            Partitions(one.pool, days_ahead=9).run_once(), Partitions(two.pool, days_ahead=9).run_once()
        )
        assert len(made[0]) + len(made[1]) == len(set(made[0]) | set(made[1])) == 8


async def test_a_stream_id_is_a_uuid_of_version_7_in_the_databases_time(database: str) -> None:
    async with engine(database) as parts:
        stream = await parts.begin()
        now = await parts.pool.fetchval("select extract(epoch from now()) * 1000")
        assert stream.id.version == 7
        assert stream.id.variant == "specified in RFC 4122"
        assert abs((stream.id.int >> 80) - float(now)) < 5000
