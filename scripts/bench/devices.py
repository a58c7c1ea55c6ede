"""The devices, in a process of its own: one tells another, many of a user push at once, a new one asks for everything.

python -m scripts.bench.devices < JOB > FIGURES      (both JSON)
"""

import asyncio
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from random import Random
from uuid import UUID

import orjson
import uvloop

from scripts.bench.exchanges import Json, message, title
from scripts.bench.processes import cpu_s

_HOST = "127.0.0.1"
_CHAT = str(UUID(int=7))
# Of one user that all push at once, as many at each gateway.
_AT_ONCE = 8
_NUDGES = "/api/chat/sync/events"
_HOW = "how it hears of it"


@dataclass(frozen=True, slots=True)
class Job:
    """`ports` and `pids` of two gateways, and the first process of their database. `old` has everything already."""

    ports: tuple[int, int]
    pids: tuple[int, int]
    postgres: int
    old: str
    messages: int
    seconds: float

    def encoded(self) -> bytes:
        return orjson.dumps(asdict(self))


@dataclass(slots=True)
class Device:
    """One of a user's, with a connection to a gateway that it keeps."""

    user: str
    client: str
    reader: StreamReader
    writer: StreamWriter
    cursor: str | None = None
    mid: int = 0

    async def exchange(self, *ops: Json) -> Json:
        push = [{"mid": self.mid + 1, "ops": ops}] if ops else []
        body = {"client": self.client, "cursor": self.cursor, "push": push, "user_id": self.user}
        told: Json = orjson.loads(await self._post(orjson.dumps(body)))
        self.mid, self.cursor = told["acked"], told["cursor"]
        return told

    async def _post(self, body: bytes) -> bytes:
        head = f"POST /api/chat/sync HTTP/1.1\r\nHost: {_HOST}\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)
        said = (await self.reader.readuntil(b"\r\n\r\n")).lower()
        size = int(said.partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = await self.reader.readexactly(size)
        if b" 200 " not in said[:20]:
            raise RuntimeError(answer.decode())
        return answer

    async def everything(self) -> int:
        """Pull until there is no more; how many messages came."""
        messages = 0
        while True:
            told = await self.exchange()
            messages += len(told["messages"])
            if not told["more"]:
                return messages


@asynccontextmanager
async def device(port: int, user: str, client: str) -> AsyncIterator[Device]:
    reader, writer = await asyncio.open_connection(_HOST, port, limit=1 << 24)
    try:
        yield Device(user, client, reader, writer)
    finally:
        writer.close()


async def run(job: Job) -> Json:
    return {**await _propagated(job), **await _hot(job), **await _begun(job)}


# -- one tells another


async def _propagated(job: Job) -> Json:
    """From a push at one gateway to the answer at the other that has its message."""
    chance, took = Random(1), []
    async with device(job.ports[0], "two", "one") as one, device(job.ports[1], "two", "other") as other:
        await one.exchange(title(1, _CHAT))
        await other.everything()
        async with _news(job.ports[1], "two") as news:
            for number in range(1, job.messages + 1):
                began = time.perf_counter()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(one.exchange(message(number, _CHAT)))
                    while not (await news.told(other))["messages"]:
                        pass
                    took.append(time.perf_counter() - began)
                await asyncio.sleep(0.02 * chance.random())
    return {_HOW: news.how, **_quantiles("second device has a message", took)}


@dataclass(slots=True)
class _News:
    """What a device waits for before it pulls: a nudge; without nudges it pulls again at once."""

    changed: asyncio.Event | None = None

    @property
    def how(self) -> str:
        return "pulling again and again" if self.changed is None else "nudges"

    async def told(self, by: Device) -> Json:
        if self.changed is not None:
            await self.changed.wait()
            self.changed.clear()
        return await by.exchange()


@asynccontextmanager
async def _news(port: int, user: str) -> AsyncIterator[_News]:
    reader, writer = await asyncio.open_connection(_HOST, port)
    writer.write(
        f"GET {_NUDGES}?user_id={user} HTTP/1.1\r\nHost: {_HOST}\r\nAccept: text/event-stream\r\n\r\n".encode()
    )
    is_there = b" 200 " in await reader.readuntil(b"\r\n\r\n")
    news = _News(asyncio.Event() if is_there else None)
    async with asyncio.TaskGroup() as tasks:
        listening = tasks.create_task(_listen(reader, news))
        try:
            yield news
        finally:
            listening.cancel()
            writer.close()


async def _listen(reader: StreamReader, news: _News) -> None:
    while news.changed is not None and (line := await reader.readline()):
        if line.startswith(b"event: changed"):
            news.changed.set()


# -- one hot user


async def _hot(job: Job) -> Json:
    """All devices of one user push one message after the other and hear of the others'."""
    took: list[float] = []
    before, began = _spent(job), time.perf_counter()
    await asyncio.gather(*(_pushing(job, number, took) for number in range(_AT_ONCE)))
    seconds = time.perf_counter() - began
    python, server = (after - at for after, at in zip(_spent(job), before, strict=True))
    return {
        f"one user, {_AT_ONCE} devices at once, pushes per second": len(took) / seconds,
        **_quantiles("a push of theirs", took),
        "a push of theirs, CPU of the gateways, µs": python / len(took) * 1e6,
        "a push of theirs, CPU of PostgreSQL, µs": server / len(took) * 1e6,
    }


async def _pushing(job: Job, number: int, took: list[float]) -> None:
    async with device(job.ports[number % 2], "hot", f"device-{number}") as mine:
        await mine.everything()
        until, said = time.perf_counter() + job.seconds, number << 32
        while (began := time.perf_counter()) < until:
            said += 1
            await mine.exchange(message(said, _CHAT))
            took.append(time.perf_counter() - began)


def _spent(job: Job) -> tuple[float, float]:
    return sum(map(cpu_s, job.pids)), cpu_s(job.postgres)


# -- a new device


async def _begun(job: Job) -> Json:
    took, messages = [], 0
    for number in range(5):
        async with device(job.ports[number % 2], job.old, f"new-{number}") as new:
            began = time.perf_counter()
            messages = await new.everything()
            took.append(time.perf_counter() - began)
    return {f"bootstrap of {messages:,} messages, p50, s": sorted(took)[2]}


def _quantiles(name: str, took: Sequence[float]) -> Json:
    ranked = sorted(took)
    return {f"{name}, p{share}, ms": ranked[len(ranked) * share // 100] * 1e3 for share in (50, 99)}


def main() -> None:
    figures = uvloop.run(run(Job(**orjson.loads(sys.stdin.buffer.read()))))
    # Not sys.stdout: under PYTHONUNBUFFERED its write may take a part of this only.
    with open(1, "wb", closefd=False) as out:
        out.write(orjson.dumps(figures))


if __name__ == "__main__":
    main()
