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
ALONE, MESSAGE, NAIVE = "yardstick: a message alone", "one message", "naive: the whole history"
_WORDS = "Where shall we go in spring, when it rains in the north and the south is full of people?"
# Messages of the chat that is written to.
_LONG = 1_000
# Exchanges of a turn. Costs are medians of turns: what else runs on the machine does not disturb all of them alike.
_TURN = 25
_ALONE = """
insert into messages (user_id, id, chat_id, role, content, position) values ('alone', $1, 'c', 'user', $2, $3)
"""
_ROWS = """
select relname, n_tup_ins + n_tup_upd + n_tup_del as rows from pg_stat_user_tables
"""
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


@dataclass(slots=True)
class Phone:
    """A device that says one thing at a time. Ids are as long as a UUID."""

    changes: Changes
    user: str
    client: str = "phone-7d1e"
    cursor: str | None = None
    mid: int = 0

    async def exchange(self, *ops: Json) -> tuple[bytes, bytes]:
        """The bodies of the request and of its answer, after which the device is where the answer says."""
        push = [{"mid": self.mid + 1, "ops": ops}] if ops else []
        body = orjson.dumps({"client": self.client, "cursor": self.cursor} | ({"push": push} if push else {}))
        asked = endpoints._asked(validated(endpoints.SyncChats, parse_object(body)))
        with within(Reach(self.user)):
            answer = await self.changes.exchange(self.user, asked)
        told = endpoints._json(answer).body
        self.mid, self.cursor = answer.acked, str(answer.cursor)
        return body, bytes(told)

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
        assert wall._behind is not None
        await wall._behind.close()  # its process tells its counters when it ends
    pool.terminate()
    look.terminate()


async def costs(dsn: str, *, turns: int) -> dict[str, Cost]:
    """Each kind of exchange, so many turns of it, beside what one might do without synchronising."""
    chat = str(UUID(int=1))
    await fill(dsn, "ann", _LONG, chat)
    number = iter(range(_LONG + 1, 10_000_000))
    kinds: dict[str, Callable[[], list[Json]]] = {
        "nothing new": list,
        MESSAGE: lambda: [message(next(number), chat)],
        "one message in a new chat": lambda: [message(n := next(number), str(UUID(int=n)))],
        "a title": lambda: [title(next(number), chat)],
    }
    found = {ALONE: await _unsynchronised(dsn, _alone(), turns)}
    found |= {name: await _kind(dsn, make, turns) for name, make in kinds.items()}
    return found | {NAIVE: await _unsynchronised(dsn, _naive(chat), max(turns // 10, 1))}


async def fill(dsn: str, user: str, many: int, chat: str | None = None) -> None:
    """So many messages of a user, by a device that is not asked again; a hundred in a chat unless one is named."""
    async with opened(dsn) as (changes, _):
        device = Phone(changes, user, client="filler")
        for first in range(1, many + 1, 100):
            numbers = range(first, min(first + 100, many + 1))
            await device.exchange(*(message(number, chat or str(UUID(int=first))) for number in numbers))


async def _kind(dsn: str, make: Callable[[], list[Json]], turns: int) -> Cost:
    async with opened(dsn) as (changes, _):
        device = Phone(changes, "ann", client=str(UUID(int=time.monotonic_ns()))[-10:])
        await device.everything()
    before = await _rows(dsn)
    async with opened(dsn) as (device.changes, look):

        async def say() -> tuple[bytes, bytes, int]:
            ops = make()
            return *await device.exchange(*ops), sum(len(op.get("content", "").encode()) for op in ops)

        cost = await _weighed(say, await _pid(device.changes), look, turns)
    cost.rows = _each(before, await _rows(dsn), turns)
    return cost


async def _pid(changes: Changes) -> int:
    with within(Reach("ann")):
        async with changes._wall.connection() as connection:
            return int(await connection.fetchval("select pg_backend_pid()"))


Say = Callable[[], Awaitable[tuple[bytes, bytes, int]]]


async def _weighed(say: Say, pid: int, look: Pool, turns: int) -> Cost:
    for _ in range(_TURN):
        await say()
    spent = [await _turn(say, pid) for _ in range(turns)]
    wal = []
    for _ in range(_TURN):
        before = await _written(look)
        up, down, text = await say()
        wal.append(await _written(look) - before)
    python, server = (median(column) for column in zip(*spent, strict=True))
    return Cost(len(up), text, len(down), {}, median(wal), python, server)


async def _turn(say: Say, pid: int) -> tuple[float, float]:
    python, server = time.process_time(), ran_us(pid)
    for _ in range(_TURN):
        await say()
    return (time.process_time() - python) / _TURN * 1e6, (ran_us(pid) - server) / _TURN


def _each(before: Counter[str], after: Counter[str], turns: int) -> dict[str, float]:
    """Rows of each exchange. What a gateway writes about itself is none of theirs."""
    done = (turns + 2) * _TURN
    counts = {name: (count - before[name]) / done for name, count in after.items() if not name.startswith("replica")}
    return {name: count for name, count in counts.items() if count >= 0.5}


async def _written(look: Pool) -> int:
    return int(await look.fetchval("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


def ran_us(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1000


async def _rows(dsn: str) -> Counter[str]:
    connection = await asyncpg.connect(dsn)
    found = Counter({row["relname"]: row["rows"] for row in await connection.fetch(_ROWS)})
    await connection.close()
    return found


Unsynchronised = Callable[[Connection], Say]


async def _unsynchronised(dsn: str, how: Unsynchronised, turns: int) -> Cost:
    look = await open_pool(dsn, 1)
    await look.execute("create table if not exists naive (like messages including all)")
    before, connection = await _rows(dsn), await asyncpg.connect(dsn)
    cost = await _weighed(how(connection), connection.get_server_pid(), look, turns)
    await connection.close()
    cost.rows = _each(before, await _rows(dsn), turns)
    look.terminate()
    return cost


def _alone() -> Unsynchronised:
    """The least there is to do: a message with a new id into the table, and nobody is told."""
    numbers = iter(range(10_000_000))

    def on(connection: Connection) -> Say:
        async def say() -> tuple[bytes, bytes, int]:
            body = orjson.dumps({"id": str(UUID(int=(number := next(numbers)))), "content": _WORDS})
            given = orjson.loads(body)
            async with connection.transaction():
                await connection.execute(_ALONE, given["id"], given["content"], number)
            return body, b'{"success":true}', len(_WORDS.encode())

        return say

    return on


def _naive(chat: str) -> Unsynchronised:
    """A front end that sends its whole history at every change, to a server that writes what it is sent."""
    sent = [{"id": str(UUID(int=n)), "role": ("user", "assistant")[n % 2], "content": _WORDS} for n in range(_LONG)]

    def on(connection: Connection) -> Say:
        async def say() -> tuple[bytes, bytes, int]:
            sent.append({**sent.pop(), "id": str(UUID(int=time.monotonic_ns()))})
            body = orjson.dumps({"conversations": [{"id": chat, "title": "Trip", "messages": sent}]})
            return body, await _upserted(connection, body), len(_WORDS.encode())

        return say

    return on


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
