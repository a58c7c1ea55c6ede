"""Users with several devices at two gateways, and all that can go wrong between them; and what must hold then."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from random import Random
from time import time
from uuid import UUID, uuid4

import asyncpg

from app.chats import store, usage
from app.chats.chat import MessageStatus
from app.chats.usage import Entry
from app.conversations import index, recount
from app.errors import Conflict
from app.postgres import Connection, open_pool, retry_conflicts
from app.streams.replicas import Replica
from app.sync import changes, compaction, looks, rows
from app.sync.changes import Changes
from app.sync.exchange import Answer, Asked, Head
from app.sync.merge import AddMessage, Chat, DeleteChat, DeleteMessage, Message, Op, PutChat, State, fork
from app.sync.pushes import Push
from app.wall import Reach, Wall, within
from tests.sync.device import Device, shown

_HOUR_MS = 3_600_000
_ROWS = "select * from {} where user_id = $1"
_DELETED = """
select c.id as chat, m.id, m.content from chats c left join messages m on m.user_id = c.user_id and m.chat_id = c.id
where c.user_id = $1 and c.is_deleted
"""
# Whose ids are still taken: what is said under one that is deleted now is not heard.
_LEFT = """
select m.id from messages m join chats c on c.user_id = m.user_id and c.id = m.chat_id
where c.user_id = $1 and c.is_purged and m.is_deleted
"""
_PURGED = "select id from chats where user_id = $1 and is_purged"
_FAILED = "select id, content from messages where user_id = $1 and status = 'failed' and not is_deleted"
_SPENT = """
select stream_id, sum(prompt_tokens + completion_tokens)::int as tokens from usage_ledger
where user_id = $1 group by stream_id
"""
# So few messages at once that it often stops half way.
_COMPACTION, _CLEANING = compaction.DeletedChats(0, piece=3), compaction.FailedMessages(0)
# Exchanges until everybody must have everything.
_ENOUGH = 40


class Plain(Changes):
    """A control: numbers from a sequence, and nobody waits for anybody."""

    source = "nextval('control')"

    async def _at_once(
        self, connection: Connection, user_id: str, pushes: Sequence[Push]
    ) -> tuple[Head, rows.Found | None]:
        return await self._locked(connection, user_id), None

    async def _locked(self, connection: Connection, user_id: str) -> Head:
        await connection.execute(changes._MAKE, user_id)
        head = await looks.head_now(connection, user_id)
        assert head is not None
        head.seq = await connection.fetchval(f"select {self.source}")
        await asyncio.sleep(0.005 * Random().random())
        return head


class Timestamps(Plain):
    """A control: changes are numbered by the time."""

    source = "(extract(epoch from clock_timestamp()) * 1000000)::bigint"


@dataclass(slots=True)
class Storm:
    """Two gateways over one database."""

    gateways: list[Changes]
    database: asyncpg.Pool

    async def run(self, seed: int, *, rounds: int = 12) -> list[str]:
        """A run of two users; returns what did not hold."""
        users = [User(self, f"u{seed}-{name}", Random(f"{seed} {name}")) for name in ("ann", "bob")]
        await asyncio.gather(*(user.live(rounds) for user in users))
        return [f"seed {seed}: {wrong}" for user in users for wrong in await user.wrong()]


@asynccontextmanager
async def storm(dsn: str, kind: type[Changes] = Changes) -> AsyncGenerator[Storm, None]:
    async with AsyncExitStack() as stack:
        gateways = []
        for _ in range(2):
            pool = await open_pool(dsn, 4)
            stack.callback(pool.terminate)
            wall = await stack.enter_async_context(Wall(pool, demand="require").open(dsn, 4))
            async with pool.acquire() as connection:
                await wall.look_for_role(connection)
            replica = Replica(pool)
            await replica.register()
            replica.refusal = None
            gateways.append(kind(replica, wall))
        database = await open_pool(dsn, 2)
        stack.callback(database.terminate)
        yield Storm(gateways, database)


@dataclass(slots=True)
class User:
    """One user's devices, what they said that was acknowledged, and what came late."""

    storm: Storm
    name: str
    chance: Random
    devices: list[Device] = field(default_factory=list)
    acknowledged: list[Op] = field(default_factory=list)
    deleted: set[str] = field(default_factory=set)
    late: list[Asked] = field(default_factory=list)
    # What answers have cost, by run.
    spent: dict[UUID, int] = field(default_factory=dict)
    # What went with its chat: words, and ids of what was deleted before.
    compacted: set[str] = field(default_factory=set)
    words: int = 0

    async def live(self, rounds: int) -> None:
        skews = (0, -_HOUR_MS, 6 * _HOUR_MS, 30_000)
        self.devices = [Device(skew_ms=self.chance.choice(skews), failed=n == 2) for n in range(3)]
        for _ in range(rounds):
            await asyncio.gather(*(self._act(device) for device in self.devices), self._serve(), self._compact())
        self.chance.shuffle(self.late)
        for asked in self.late:
            await self._send(asked)
        for _ in range(_ENOUGH):
            for device in self.devices:
                await self._exchange(device)
            if all(not device.outbox for device in self.devices):
                break
        for device in self.devices:  # once more, as the last ones to push were not heard by the first
            for _ in range(_ENOUGH):
                if not await self._exchange(device):
                    break

    async def _act(self, device: Device) -> None:
        chance = self.chance.random()
        if chance < 0.03:
            device.wipe()
        elif chance < 0.1:  # it asks for everything
            device.cursor = None
        for _ in range(self.chance.randrange(3)):
            device.say(*self._ops(device))
        if self.chance.random() < 0.3:  # offline
            return
        if self.chance.random() < 0.15:  # the request is lost, or comes some time
            self.late.append(device.ask())
            return
        if self.chance.random() < 0.15:  # the answer is lost
            await self._send(device.ask())
            return
        if self.late and self.chance.random() < 0.3:
            await self._send(self.chance.choice(self.late))
        if self.chance.random() < 0.1:  # what is sent now comes another time, much later
            self.late.append(device.ask())
        await self._exchange(device)

    def _ops(self, device: Device) -> list[Op]:
        now, seen, chance = round(time() * 1000), device.view(), self.chance
        self.words += 1
        chat = f"c{chance.randrange(4)}"
        kind = chance.random()
        if kind < 0.55:
            # Ids are drawn from few, so that several devices say different things under one.
            message = f"m{chance.randrange(10_000) if chance.random() < 0.8 else chance.randrange(10)}"
            status: MessageStatus = "failed" if device.failed and chance.random() < 0.3 else "complete"
            text = f"{self.name} {self.words}"
            return [AddMessage(message, chat, "user", text, device.stamp(now), status=status)]
        if kind < 0.75:
            return [PutChat(chat, f"{self.name} {self.words}", device.stamp(now), chance.choice([None, "c0"]))]
        if kind < 0.85:
            return [DeleteChat(chat, device.stamp(now))]
        if seen.messages and kind < 0.93:
            gone = chance.choice(sorted(seen.messages))
            self.deleted.add(gone)
            return [DeleteMessage(gone)]
        branch = f"b{self.words}"
        return [
            PutChat(branch, f"{self.name} {self.words}", device.stamp(now), chat),
            AddMessage(f"{branch}-m", branch, "user", f"{self.name} {self.words}", device.stamp(now)),
        ]

    async def _send(self, asked: Asked) -> Answer | None:
        with within(Reach(self.name)):
            try:
                return await self.chance.choice(self.storm.gateways).exchange(self.name, asked)
            except Conflict:
                return None

    async def _exchange(self, device: Device) -> bool:
        """Whether there is more to do."""
        asked = device.ask()
        answer = await self._send(asked)
        if answer is None:
            device.begin_anew()
            return True
        self.acknowledged += device.take(answer)
        return answer.more or bool(device.outbox)

    async def _serve(self) -> None:
        """A run saves a question, an answer and what it has cost; each of them twice."""
        if self.chance.random() < 0.5:
            return
        self.words += 1
        chat, name, text = f"c{self.chance.randrange(4)}", f"run-{self.words}", f"{self.name} {self.words}"
        status: MessageStatus = "failed" if self.chance.random() < 0.2 else "complete"
        cost = Entry(
            *(uuid4(), "main", 1, self.name, "bot", "demo", "small", "completed", None),
            *(self.words, 1, 1, 1, datetime.now(UTC), ""),
        )
        self.spent[cost.stream_id] = self.words + 1
        for _ in range(2):
            await retry_conflicts(lambda: self._run(chat, name, text, status, cost))

    async def _run(self, chat: str, name: str, text: str, status: MessageStatus, cost: Entry) -> None:
        async with self.storm.database.acquire() as connection:
            with suppress(Conflict):
                async with connection.transaction():
                    await _ask(connection, self.name, chat, f"{name}-q", text)
            async with connection.transaction():
                await _answer(connection, self.name, chat, f"{name}-a", text, status)
            await usage.record(connection, [cost])

    async def _compact(self) -> None:
        """Chats that were deleted a moment ago become empty, messages that failed go."""
        if self.chance.random() < 0.6:
            return
        async with self.storm.database.acquire() as connection, connection.transaction():
            if not await compaction.held(connection, self.name):
                return
            deleted = await connection.fetch(_DELETED, self.name)
            await _COMPACTION.compact(connection, self.name, [row["chat"] for row in deleted])
            purged = {row["id"] for row in await connection.fetch(_PURGED, self.name)}
            self.compacted |= {row["content"] or row["id"] for row in deleted if row["chat"] in purged}
            self.compacted |= {row["id"] for row in await connection.fetch(_LEFT, self.name)}
            failed = await connection.fetch(_FAILED, self.name)
            await _CLEANING.remove(connection, self.name, [row["id"] for row in failed])

    async def wrong(self) -> list[str]:
        """What does not hold; nothing, where everything does."""
        server = await self._stored()
        found = [f"an outbox of {self.name} is not empty" for device in self.devices if device.outbox]
        found += [
            f"{self.name}: a device differs: {_difference(shown(device.view()), shown(_for(device, server)))}"
            for device in self.devices
            if shown(device.view()) != shown(_for(device, server))
        ]
        spent = {row["stream_id"]: row["tokens"] for row in await self.storm.database.fetch(_SPENT, self.name)}
        found += [f"{self.name} has spent {spent}, not {self.spent}"] if spent != self.spent else []
        found += [f"{self.name}: lost {op}" for op in self.acknowledged if self._is_lost(op, server)]
        texts = [message.content for device in self.devices for message in device.base.messages.values()]
        found += [f"{self.name} sees {text}" for text in texts if text and not text.startswith(f"{self.name} ")]
        return found

    def _is_lost(self, op: Op, server: State) -> bool:
        if not isinstance(op, AddMessage) or self.compacted & {op.content, op.id, fork(op)}:
            return False
        if op.status == "failed":  # whatever comes of it is more than that
            return False
        stored = [server.messages.get(op.id), server.messages.get(fork(op))]
        if any(one is not None and one.content == op.content for one in stored):
            return False
        return not any(one is not None and one.is_deleted for one in stored)

    async def _stored(self) -> State:
        chats = await self.storm.database.fetch(_ROWS.format("chats"), self.name)
        messages = await self.storm.database.fetch(_ROWS.format("messages"), self.name)
        return State(
            {row["id"]: Chat(**{name: row[name] for name in Chat.__slots__}) for row in chats},
            {row["id"]: Message(**{name: row[name] for name in Message.__slots__}) for row in messages},
        )


def _for(device: Device, server: State) -> State:
    """What a device is to have of it."""
    wanted = {name: one for name, one in server.messages.items() if device.failed or one.status != "failed"}
    return replace(server, messages=wanted)


async def _ask(connection: Connection, user: str, chat: str, message: str, text: str) -> None:
    named = index.Chat(user, chat, "bot")
    saved = await store.save_question(
        connection, user_id=user, chat_id=chat, message_id=message, content=text, along=[index.asked(named, text)]
    )
    if saved.brought_at is not None:
        await index.asked_known(connection, named, text, position=saved.position, at=saved.brought_at)
    await index.ended(connection, named, {})
    if saved.came_back:
        await recount.count_within(connection, [(user, chat)])


async def _answer(connection: Connection, user: str, chat: str, message: str, text: str, status: MessageStatus) -> None:
    new = await store.save_answer(
        connection, user_id=user, chat_id=chat, message_id=message, content=text, status=status
    )
    if new and status != "failed":
        await index.answered(connection, index.Chat(user, chat, "bot"), model="small")
        await index.ended(connection, index.Chat(user, chat, "bot"), {})


def _difference(one: dict[str, object], other: dict[str, object]) -> Sequence[object]:
    return [(name, one.get(name), other.get(name)) for name in {*one, *other} if one.get(name) != other.get(name)][:3]
