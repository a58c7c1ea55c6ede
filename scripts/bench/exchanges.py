"""Exchanges of one device in this process, weighed: bytes, rows, WAL and CPU; and a naive full-history upsert."""

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from app.postgres import Connection, Pool, open_pool
from app.streams.replicas import Replica
from app.sync import endpoints
from app.sync.changes import Changes
from app.sync.merge import stamp_at
from app.text import parse_object, validated
from app.wall import Reach, Wall, within

# Tables of the index of conversations begin like this.
INDEX = "conversation"
ALONE, NOTHING, MESSAGE = "yardstick: a message alone", "nothing new", "one message"
NAIVE = "naive: the whole history"
_WORDS = "Where shall we go in spring, when it rains in the north and the south is full of people?"
# Messages of the chat that is written to.
_LONG = 1_000
# Exchanges of a turn. Costs are medians of turns, one kind after the other, so that what else runs on the machine
# disturbs all of them alike.
_TURN = 25
_ALONE = """
insert into messages (user_id, id, chat_id, role, content, position) values ('alone', $1, 'c', 'user', $2, $3)
"""
_ROWS = """
select relname, n_tup_ins + n_tup_upd + n_tup_del as rows from pg_stat_user_tables
"""
# Of one server process; PostgreSQL 18 tells it.
_WAL = "select wal_bytes from pg_stat_get_backend_wal($1)"
_TELL_COUNTERS = "select pg_stat_force_next_flush()"
_HISTORY = """
insert into naive (user_id, id, chat_id, role, content, position)
select $1, m.id, $2, m.role, m.content, m.position
from unnest($3::text[], $4::text[], $5::text[], $6::int[]) as m(id, role, content, position)
on conflict (user_id, id) do update set chat_id = excluded.chat_id, role = excluded.role, content = excluded.content,
    position = excluded.position, updated_at = now()
"""
_TITLE = "update chats set title = $3, updated_at = now() where user_id = $1 and id = $2"

Json = dict[str, Any]


@dataclass(slots=True)
class Cost:
    """Of one exchange: bytes, rows by table, bytes of WAL, and µs of CPU."""

    up: int = 0
    text: int = 0
    down: int = 0
    rows: Mapping[str, float] = field(default_factory=dict)
    wal: float = 0
    python: float = 0
    server: float = 0

    @property
    def cpu(self) -> float:
        return self.python + self.server


@dataclass(slots=True)
class Phone:
    """A device that says one thing at a time. Ids are as long as a UUID."""

    changes: Changes
    user: str
    client: str = "phone-7d1e"
    cursor: str | None = None
    mid: int = 0

    async def exchange(self, *ops: Json) -> tuple[bytes, bytes]:
        """The bodies of the request and of its answer."""
        body = self.body(*ops)
        return body, await self.served(body)

    def body(self, *ops: Json) -> bytes:
        push = [{"mid": self.mid + 1, "ops": ops}] if ops else []
        return orjson.dumps({"client": self.client, "cursor": self.cursor} | ({"push": push} if push else {}))

    async def served(self, body: bytes) -> bytes:
        """The body of the answer, after which the device is where that says."""
        asked = endpoints._asked(validated(endpoints.SyncChats, parse_object(body)))
        with within(Reach(self.user)):
            answer = await self.changes.exchange(self.user, asked)
        told = orjson.dumps(endpoints.told_of(answer, str))
        self.mid, self.cursor = answer.acked, str(answer.cursor)
        return told

    async def everything(self) -> list[bytes]:
        """Page after page."""
        pages = [(await self.exchange())[1]]
        while b'"more":true' in pages[-1][-40:]:
            pages.append((await self.exchange())[1])
        return pages


def message(number: int, chat: str) -> Json:
    role, content = "assistant" if number % 2 else "user", f"{_WORDS} {number:08}"
    name = str(UUID(int=number))
    return {"op": "msg.add", "id": name, "chat_id": chat, "role": role, "content": content, "stamp": _stamp(number)}


def title(number: int, chat: str) -> Json:
    return {"op": "chat.put", "id": chat, "title": f"Title {number}", "stamp": _stamp(number)}


def _stamp(number: int) -> str:
    return stamp_at(1_700_000_000_000 + number)


@asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[tuple[Changes, Pool]]:
    """The exchange as a gateway has it, behind the second wall, with one connection; and another one to look."""
    pool, look = await open_pool(dsn, 2), await open_pool(dsn, 1)
    async with Wall(pool, demand="require").open(dsn, 1) as wall:
        async with pool.acquire() as connection:
            await wall.look_for_role(connection)
        replica = Replica(pool)
        await replica.register()
        replica.refusal = None
        yield Changes(replica, wall), look
    pool.terminate()
    look.terminate()


@dataclass(frozen=True, slots=True)
class Kind:
    """What is said again and again: a body and how much of it is text, and the body of its answer. `server` is the
    process of the database.
    """

    body: Callable[[], tuple[bytes, int]]
    served: Callable[[bytes], Awaitable[bytes]]
    tell_counters: Callable[[], Awaitable[object]]
    server: int


async def costs(dsn: str, *, turns: int) -> dict[str, Cost]:
    """Of each kind of exchange, in turns, beside what one might do without synchronising."""
    chat = str(UUID(int=1))
    await fill(dsn, "ann", _LONG, chat)
    async with opened(dsn) as (changes, look):
        await look.execute("create table naive (like messages including all)")
        alone, naive = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
        kinds = {
            ALONE: _plain(alone, *_alone(alone)),
            **await _exchanges(changes, chat),
            NAIVE: _plain(naive, *_naive(naive, chat)),
        }
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for turn in range(turns + 1):
            for name, kind in kinds.items():
                if name != NAIVE or turn % 5 == 0:
                    spent[name].append(await _turn(kind))
        found = {name: await _weighed(kind, look) for name, kind in kinds.items()}
        for name, cost in found.items():  # the first turn is to warm up
            cost.python, cost.server = (median(column) for column in zip(*spent[name][-turns:], strict=True))
        await alone.close()
        await naive.close()
    return found


async def _exchanges(changes: Changes, chat: str) -> dict[str, Kind]:
    number = iter(range(_LONG + 1, 10_000_000))
    kinds: dict[str, Callable[[], list[Json]]] = {
        NOTHING: list,
        MESSAGE: lambda: [message(next(number), chat)],
        "one message in a new chat": lambda: [message(n := next(number), str(UUID(int=n)))],
        "a title": lambda: [title(next(number), chat)],
    }
    device = Phone(changes, "ann")
    await device.everything()
    return {name: await _exchange(device, make) for name, make in kinds.items()}


async def _exchange(device: Phone, make: Callable[[], list[Json]]) -> Kind:
    def body() -> tuple[bytes, int]:
        ops = make()
        return device.body(*ops), sum(len(op.get("content", "").encode()) for op in ops)

    async def tell_counters() -> None:
        with within(Reach(device.user)):
            async with device.changes._wall.connection() as connection:
                await connection.execute(_TELL_COUNTERS)

    return Kind(body, device.served, tell_counters, await _pid(device.changes))


def _plain(
    connection: Connection, body: Callable[[], tuple[bytes, int]], served: Callable[[bytes], Awaitable[bytes]]
) -> Kind:
    return Kind(body, served, lambda: connection.execute(_TELL_COUNTERS), connection.get_server_pid())


async def fill(dsn: str, user: str, many: int, chat: str | None = None) -> None:
    """So many messages of a user, by a device that is not asked again; a hundred in a chat unless one is named."""
    async with opened(dsn) as (changes, _):
        device = Phone(changes, user, client="filler")
        for first in range(1, many + 1, 100):
            numbers = range(first, min(first + 100, many + 1))
            await device.exchange(*(message(number, chat or str(UUID(int=first))) for number in numbers))


async def _pid(changes: Changes) -> int:
    with within(Reach("ann")):
        async with changes._wall.connection() as connection:
            return int(await connection.fetchval("select pg_backend_pid()"))


async def _turn(kind: Kind) -> tuple[float, float]:
    """CPU of Python, from the body to the answer's, and of the server, µs for each."""
    python, server = 0.0, ran_us(kind.server)
    for _ in range(_TURN):
        body, _ = kind.body()
        began = time.process_time()
        await kind.served(body)
        python += time.process_time() - began
    return python / _TURN * 1e6, (ran_us(kind.server) - server) / _TURN


async def _weighed(kind: Kind, look: Pool) -> Cost:
    """All but the CPU."""
    await kind.tell_counters()
    before, start = await _rows(look), await look.fetchval(_WAL, kind.server)
    for _ in range(_TURN):
        up, text = kind.body()
        down = await kind.served(up)
    await kind.tell_counters()
    rows = {name: count / _TURN for name, count in (await _rows(look) - before).items()}
    wal = float(await look.fetchval(_WAL, kind.server) - start)
    return Cost(len(up), text, len(down), rows, wal / _TURN)


def ran_us(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1000


async def _rows(look: Pool) -> Counter[str]:
    return Counter({row["relname"]: row["rows"] for row in await look.fetch(_ROWS)})


Said = tuple[Callable[[], tuple[bytes, int]], Callable[[bytes], Awaitable[bytes]]]


def _alone(connection: Connection) -> Said:
    """The least there is to do: a message with a new id into the table, and nobody is told."""
    numbers = iter(range(10_000_000))

    def body() -> tuple[bytes, int]:
        return orjson.dumps({"id": str(UUID(int=next(numbers))), "content": _WORDS}), len(_WORDS.encode())

    async def served(body: bytes) -> bytes:
        given = orjson.loads(body)
        async with connection.transaction():
            await connection.execute(_ALONE, given["id"], given["content"], UUID(given["id"]).int)
        return b'{"success":true}'

    return body, served


def _naive(connection: Connection, chat: str) -> Said:
    """A front end that sends its whole history at every change, to a server that writes what it is sent."""
    sent = [{"id": str(UUID(int=n)), "role": ("user", "assistant")[n % 2], "content": _WORDS} for n in range(_LONG)]

    def body() -> tuple[bytes, int]:
        sent.append({**sent.pop(), "id": str(UUID(int=time.monotonic_ns()))})
        told = {"conversations": [{"id": chat, "title": "Trip", "messages": sent}]}
        return orjson.dumps(told), len(_WORDS.encode())

    return body, lambda body: _upserted(connection, body)


async def _upserted(connection: Connection, body: bytes) -> bytes:
    (given,) = orjson.loads(body)["conversations"]
    columns = [[one[name] for one in given["messages"]] for name in ("id", "role", "content")]
    async with connection.transaction():
        await connection.execute(_TITLE, "ann", given["id"], given["title"])
        await connection.execute(_HISTORY, "ann", given["id"], *columns, list(range(len(columns[0]))))
    return b'{"success":true}'


async def bootstrap(dsn: str, user: str, *, rounds: int) -> list[dict[str, float]]:
    """Everything of a user, page after page; the first round is not counted."""
    async with opened(dsn) as (changes, _):
        pid = await _pid(changes)
        return [await _everything(Phone(changes, user, client="new"), pid) for _ in range(rounds + 1)][1:]


async def _everything(device: Phone, pid: int) -> dict[str, float]:
    began, python, server = time.perf_counter(), time.process_time(), ran_us(pid)
    pages = await device.everything()
    took = {"seconds": time.perf_counter() - began, "CPU of Python, s": time.process_time() - python}
    messages = sum(page.count(b'"role":') for page in pages)
    size = sum(map(len, pages)) / 1e6
    return {**took, "CPU of PostgreSQL, s": (ran_us(pid) - server) / 1e6, "messages": messages, "MB": size}
