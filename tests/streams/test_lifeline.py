"""A free lock is a suspicion: who is declared dead by it, and who is not."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

import asyncpg

from app.postgres import AWAY
from app.streams.lifeline import Lifeline
from tests.streams.engine import Engine, engine


@dataclass
class Alive:
    """A replica that holds its lock, with a look at it."""

    parts: Engine
    lifeline: Lifeline
    gone: asyncio.Event

    async def lives(self) -> bool:
        lives: bool = await self.parts.pool.fetchval("select alive from replicas where id = $1", self.parts.replica.id)
        return lives

    async def drop_session(self) -> None:
        """As when its process is killed: the server ends the session."""
        connection = self.lifeline._connection
        assert connection is not None
        pid = connection.get_server_pid()
        connection.terminate()
        await self.parts.pool.fetchval("select pg_terminate_backend($1, 2000)", pid)


@asynccontextmanager
async def alive(database: str) -> AsyncGenerator[Alive, None]:
    async with engine(database) as parts:
        gone = asyncio.Event()
        lifeline = Lifeline(database, parts.replica, on_gone=gone.set)
        yield Alive(parts, lifeline, gone)
        lifeline._disconnect()


async def looks(one: Alive, until: Callable[[], bool], *, seconds: float = 2) -> float:
    """Look again and again, as the loop does, until something holds, for so long at most; how long it took."""
    began = monotonic()
    while monotonic() - began < seconds and not until():
        await one.lifeline.run_once()
    return monotonic() - began


async def test_a_dropped_lock_is_a_death_after_a_moment(database: str) -> None:
    async with alive(database) as dead, alive(database) as one:
        await dead.lifeline.run_once()
        await one.lifeline.run_once()
        await dead.drop_session()
        took = await looks(one, one.gone.is_set)
        assert 0.7 <= took < 1.5
        assert not await dead.lives()
        assert await one.lives()


async def test_a_lock_that_was_free_before_we_looked_says_nothing(database: str) -> None:
    """As after a restart of the database, which has ended everybody's session."""
    async with alive(database) as slow, alive(database) as one:
        await slow.lifeline.run_once()
        await one.lifeline.run_once()
        await slow.drop_session()
        await one.drop_session()
        await looks(one, one.gone.is_set)
        assert await slow.lives()
        await slow.lifeline.run_once()
        await one.lifeline.run_once()
        await slow.drop_session()
        await looks(one, one.gone.is_set)
        assert not await slow.lives(), "once it was seen held, it counts again"


async def test_whoever_beats_is_alive_without_a_lock(database: str) -> None:
    async with alive(database) as poor, alive(database) as one:
        await poor.lifeline.run_once()
        await one.lifeline.run_once()
        await poor.drop_session()
        beating = asyncio.ensure_future(_beat_for_ever(poor))
        await looks(one, one.gone.is_set)
        assert await poor.lives()
        beating.cancel()
        await asyncio.wait([beating])
        await looks(one, one.gone.is_set)
        assert not await poor.lives()


async def _beat_for_ever(one: Alive) -> None:
    while True:
        await one.parts.replica.beat()
        await asyncio.sleep(0.1)


async def test_a_lost_session_is_replaced_at_once_and_told_by_a_beat(database: str) -> None:
    async with alive(database) as one, alive(database) as other:
        await one.lifeline.run_once()
        await other.lifeline.run_once()
        connection = one.lifeline._connection
        assert connection is not None
        await other.parts.pool.fetchval("select pg_terminate_backend($1, 2000)", connection.get_server_pid())
        beat = "select beat_at from replica_beats where replica_id = $1"
        before = await other.parts.pool.fetchval(beat, one.parts.replica.id)
        # The first look may find the session gone in mid question.
        with contextlib.suppress(*AWAY, asyncpg.PostgresError):
            await one.lifeline.run_once()
        await one.lifeline.run_once()
        assert await other.parts.pool.fetchval(beat, one.parts.replica.id) > before
        await looks(other, other.gone.is_set, seconds=1)
        assert one.parts.replica.id in other.lifeline._trusted
        assert not other.lifeline._suspects


async def test_a_session_changed_on_the_way_is_noticed(database: str) -> None:
    """By a pooler that has put another server's connection behind ours."""
    async with alive(database) as one:
        await one.lifeline.run_once()
        assert one.lifeline._connection is not None
        await one.lifeline._connection.execute("select pg_advisory_unlock_all()")
        await one.lifeline.run_once()
        await one.lifeline.run_once()
        [own] = await one.parts.replica.look(one.lifeline._connection)
        assert own.held


async def test_a_replica_that_retires_is_missed_at_once(database: str) -> None:
    async with alive(database) as leaving, alive(database) as one:
        await leaving.lifeline.run_once()
        await one.lifeline.run_once()
        await leaving.parts.replica.retire()
        await one.lifeline.run_once()
        assert one.gone.is_set()


async def test_a_new_incarnation_has_a_lock_of_its_own(database: str) -> None:
    async with alive(database) as one, alive(database) as other:
        await one.lifeline.run_once()
        await one.parts.replica.renew()
        await one.lifeline.run_once()
        await other.lifeline.run_once()
        assert one.parts.replica.id in other.lifeline._trusted
