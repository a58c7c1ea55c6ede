"""Everything that writers of a table can do while it is discovered by two engines, and what must be true afterwards."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import asyncpg

from app.conversations import source_state
from app.conversations.batch import Bounds
from app.conversations.discovery import Discovery
from app.conversations.foreign import Foreign
from app.conversations.foreign_drift import ForeignDrift
from app.conversations.rounds import Place
from app.postgres import AWAY, Pool, open_pool
from tests.conversations.plain import MADE, MADE_OF_UUIDS, OF_UUIDS, Plain, as_indexed, indexed, recounted

# How keys are made: by a sequence, by one of which each connection draws twenty at once, or by nobody.
Kind = Literal["serial", "cached", "uuids"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_WRITERS, _TRANSACTIONS = 8, 25
_CHANGE = "update chat set n = 1 where id = (select id from chat limit 1 offset $1 for update skip locked)"
_INSERT = "insert into chat (session, text) values ($1, $2)"


@dataclass
class Storm:
    """`ours` and `theirs` are DSNs of two databases."""

    ours: str
    theirs: str
    seed: int
    kind: Kind = "serial"
    lost: int = 0
    prepared: int = 0
    # Of the table, where it is another one than the kind has; and whether the index is compared with it all the time.
    special: Plain | None = None
    is_compared: bool = False
    compared: int = 0
    drift: int = 0

    @property
    def shape(self) -> Plain:
        return self.special or (OF_UUIDS if self.kind == "uuids" else Plain())

    async def rage(self) -> None:
        """Make the table, write, discover, kill; then discover what is left."""
        async with _connection(self.theirs) as made:
            await made.execute(MADE_OF_UUIDS if self.kind == "uuids" else MADE)
            if self.kind == "cached":
                await made.execute("alter sequence chat_id_seq cache 20")
        async with AsyncExitStack() as stack:
            pools = [await stack.enter_async_context(_pool(self.ours)) for _ in range(2)]
            admin = await stack.enter_async_context(_connection(self.theirs))
            calm = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                for number, pool in enumerate(pools):
                    tasks.create_task(self._discover(pool, Random(f"{self.seed} engine {number}"), calm))
                if self.is_compared:
                    tasks.create_task(self._compare(pools[1], calm))
                killer = tasks.create_task(self._kill(admin, Random(f"{self.seed} killer")))
                writers = [tasks.create_task(self._write(number)) for number in range(_WRITERS)]
                await asyncio.wait(writers)
                killer.cancel()
                await asyncio.wait([killer])
                await self._finish_prepared(admin)
                calm.set()
            engine = Discovery(pools[0], Bounds(grace_s=0, standby_grace_s=0))
            for _ in range(3):
                foreign = Foreign(admin, self.shape)
                while not (await engine.discover("plain", foreign)).is_complete:
                    pass

    async def agrees(self) -> bool:
        """Whether the index says what a count over the whole table says."""
        async with _connection(self.ours) as ours, _connection(self.theirs) as theirs:
            return await indexed(ours) == as_indexed(await recounted(theirs, self.shape))

    async def state(self) -> source_state.State:
        async with _connection(self.ours) as ours:
            return await source_state.load(ours, "plain")

    async def _discover(self, pool: Pool, chance: Random, calm: asyncio.Event) -> None:
        while not calm.is_set():
            bounds = Bounds(
                sessions=chance.choice([1, 3, 500]), rows=chance.choice([5, 50, 500]), grace_s=0, standby_grace_s=0
            )
            with suppress(*AWAY, asyncpg.PostgresError):
                async with _connection(self.theirs) as connection:
                    for _ in range(chance.randrange(1, 20)):
                        await Discovery(pool, bounds).discover("plain", Foreign(connection, self.shape))
                        await asyncio.sleep(chance.random() * 0.005)

    async def _compare(self, pool: Pool, calm: asyncio.Event) -> None:
        place: Place = {}
        while not calm.is_set():
            with suppress(*AWAY, asyncpg.PostgresError):
                async with _connection(self.theirs) as connection:
                    drift = ForeignDrift(pool, "plain", Foreign(connection, self.shape))
                    piece = await drift.piece(place, until=0)
                    place, self.compared = piece.place or {}, self.compared + piece.compared
                    self.drift += piece.drift
                await asyncio.sleep(0.002)

    async def _write(self, number: int) -> None:
        chance = Random(f"{self.seed} writer {number}")
        connection: asyncpg.Connection | None = None
        for count in range(_TRANSACTIONS):
            try:
                if connection is None or connection.is_closed():
                    connection = await asyncpg.connect(self.theirs, timeout=5)
                await self._transaction(connection, chance, f"{number}_{count}")
            except AWAY:
                self.lost += 1
                connection = None
        if connection is not None:
            connection.terminate()

    async def _transaction(self, connection: asyncpg.Connection, chance: Random, name: str) -> None:
        end = chance.choices(["commit", "rollback", "prepare"], [12, 3, 2])[0]
        await connection.execute("begin")
        for row in range(chance.randrange(1, 5)):
            saved = chance.random() < 0.3
            if saved:
                await connection.execute("savepoint s")
            session = chance.choice([None, "hot", f"s{chance.randrange(30)}"])
            if chance.random() < 0.2:
                # A change is no new row; rows lie elsewhere afterwards.
                await connection.execute(
                    "update chat set n = 1 where id = (select id from chat limit 1 offset $1)", row
                )
            if self.shape.key.is_serial and chance.random() < 0.1:
                # Drawn long before it is used, but under the lock.
                await connection.execute("update chat set text = text where false")
                drawn = await connection.fetchval("select nextval('chat_id_seq')")
                await asyncio.sleep(chance.random() * 0.02)
                await connection.execute("insert into chat (id, session, text) values ($1, $2, 'x')", drawn, session)
            else:
                await connection.execute(_INSERT, session, f"{name} {row}")
            if saved and chance.random() < 0.4:
                await connection.execute("rollback to savepoint s")
            await asyncio.sleep(0.15 if chance.random() < 0.02 else chance.random() * 0.004)
        if end == "prepare":
            self.prepared += 1
            await connection.execute(f"prepare transaction '{name}'")
        else:
            await connection.execute(end)

    async def _kill(self, admin: asyncpg.Connection, chance: Random) -> None:
        while True:
            await asyncio.sleep(0.1)
            row = await admin.fetchrow(
                "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
                " and backend_type = 'client backend' and datname = any($1) order by md5(pid::text || $2) limit 1",
                [_name(self.theirs), _name(self.ours)],
                str(chance.random()),
            )
            assert row is None or row[0] is not None
            if chance.random() < 0.5:
                await self._finish_prepared(admin, one=True)

    async def _finish_prepared(self, admin: asyncpg.Connection, *, one: bool = False) -> None:
        every = "select gid from pg_prepared_xacts where database = current_database() order by md5(gid)"
        for row in await admin.fetch(f"{every} limit 1" if one else every):
            how = "commit" if sum(row["gid"].encode()) % 4 else "rollback"
            await admin.execute(f"{how} prepared '{row['gid']}'")


def _name(dsn: str) -> str:
    return dsn.partition("?")[0].rpartition("/")[2]


@asynccontextmanager
async def _connection(dsn: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(dsn, timeout=5, command_timeout=20)
    try:
        yield connection
    finally:
        connection.terminate()


@asynccontextmanager
async def _pool(dsn: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(dsn, 3)
    try:
        yield pool
    finally:
        pool.terminate()
