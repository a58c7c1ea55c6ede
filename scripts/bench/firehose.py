"""What an event costs from the append to the socket: one process that writes as fast as it is told, and readers that
only count.

    .venv/bin/python -m scripts.bench.firehose [--rates 5000,20000] [--gaps 2,5,8] [--streams 100] [--elsewhere]

No provider and no flows: the log, its lane, the hub and the server-sent events of one replica, over a PostgreSQL of
its own (with fsync). Events are stored as they are appended, none merged. With `--elsewhere` the readers are on another
replica, which hears of the events by the bus; its Python counts apart. Linux only.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import uvloop

from scripts.bench import processes

if TYPE_CHECKING:  # the process of the readers starts without the gateway
    from starlette.applications import Starlette

    from app.gateway.parts import Parts
    from app.gateway.streaming import Streaming
    from app.streams.log import Writer

_TICK_S = 0.002
# After the last event, before its readers are sent away.
_ON_ITS_WAY_S = 1
_READERS = 5000
_SAID = b'"token":"'
_MARK = b"\nevent: "


def main() -> None:
    match sys.argv[1:]:
        case ["serve", dsn, job]:
            uvloop.run(_serve(dsn, **json.loads(job)))
        case ["mirror", dsn]:
            uvloop.run(_mirror(dsn))
        case ["read"]:
            uvloop.run(_count(json.loads(sys.stdin.read())))
        case _:
            asyncio.run(_measure(_arguments()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts.bench.firehose", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rates", default="5000,20000", help="events per second (5000,20000)")
    parser.add_argument("--gaps", default="2,5,8", help="least milliseconds between two flushes under load (2,5,8)")
    parser.add_argument("--streams", default="100", help="streams with a reader each (100)")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--elsewhere", action="store_true", help="readers on another replica")
    return parser.parse_args()


async def _measure(args: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="parley-bench-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user and must be able to enter
    try:
        async with processes.postgres(folder / "data") as (server, postgres):
            await processes.output("-m", "app", "migrate", environment={"DATABASE_URL": server.dsn})
            print(f"A reader for each stream, {args.seconds:g} s, medians of {args.runs} runs (least-most)")
            print(
                "\n| events/s | streams | gap, ms | Python, µs | Python there, µs | PostgreSQL, µs"
                " | p50, ms | p99, ms | delivered/s | lost | WAL, B |"
            )
            print("| ---: |" + " ---: |" * 10)
            for rate, streams, gap in _cases(args):
                job = {"rate": rate, "count": streams, "gap_ms": gap, "seconds": args.seconds}
                job |= {"elsewhere": args.elsewhere}
                runs = [await _run(server.dsn, postgres, folder, job) for _ in range(args.runs)]
                cells = map(_cell, zip(*runs, strict=True))
                print(f"| {rate:,} | {streams:,} | {gap:g} | " + " | ".join(cells) + " |", flush=True)
    finally:
        shutil.rmtree(folder)


def _cases(args: argparse.Namespace) -> Iterator[tuple[int, int, float]]:
    numbers = [[float(number) for number in given.split(",")] for given in (args.rates, args.streams, args.gaps)]
    for rate, streams, gap in itertools.product(*numbers):
        yield int(rate), int(streams), gap


def _cell(values: tuple[float, ...]) -> str:
    median, least, most = map(_shown, (statistics.median(values), min(values), max(values)))
    return median if least == most else f"{median} ({least}-{most})"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:.3g}"


async def _run(dsn: str, postgres: int, folder: Path, job: dict[str, float]) -> tuple[float, ...]:
    """Python (of the other replica, too) and PostgreSQL CPU per event in microseconds, latency p50 and p99 in ms,
    events/s, events lost, WAL in bytes per event."""
    told = json.dumps({**job, "ids": str(folder / "ids.json")})
    arguments, log = ("scripts.bench.firehose", "serve", dsn, told), folder / "firehose.log"
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(processes.running(*arguments, log=log))
        where = json.loads(await processes.first_line(process))
        mirror = None
        if job["elsewhere"]:
            mirror = await stack.enter_async_context(
                processes.running("scripts.bench.firehose", "mirror", dsn, log=log)
            )
            where["port"] = int(await processes.first_line(mirror))
        given = json.dumps(where).encode()
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        reading = tasks.create_task(processes.output("-m", "scripts.bench.firehose", "read", given=given))
        await _said(process, "begun")
        before, there, wal = processes.cpu_s(postgres), _cpu_s(mirror), await _wal(dsn)
        done = json.loads(await _said(process, "done"))
        postgres_s, there, wal = processes.cpu_s(postgres) - before, _cpu_s(mirror) - there, await _wal(dsn) - wal
        if mirror is not None:
            await asyncio.sleep(_ON_ITS_WAY_S)
            mirror.terminate()
        seen = json.loads(await reading)
    events = done["events"]
    costs = (seconds / events * 1e6 for seconds in (done["python_s"], there, postgres_s))
    return (*costs, seen["p50"], seen["p99"], seen["events"] / done["took_s"], events - seen["events"], wal / events)


def _cpu_s(process: Process | None) -> float:
    return processes.cpu_s(process.pid) if process is not None else 0


async def _wal(dsn: str) -> int:
    connection = await asyncpg.connect(dsn)
    try:
        return int(await connection.fetchval("select pg_current_wal_lsn() - '0/0'"))
    finally:
        await connection.close()


async def _said(process: Process, word: str) -> str:
    while not (line := await processes.first_line(process)).startswith(word):
        pass
    return line.removeprefix(word)


# -- the replica


async def _serve(dsn: str, *, rate: int, count: int, gap_ms: float, seconds: float, ids: str, elsewhere: bool) -> None:
    async with _replica(dsn, count, gap_ms) as (streaming, writers, url):
        Path(ids).write_text(json.dumps([str(writer.stream_id) for writer in writers]))
        print(json.dumps({"port": int(url.rpartition(":")[2]), "ids": ids}), flush=True)
        while (streaming.bus.state()["followed_elsewhere"] if elsewhere else streaming.hub.readers) < len(writers):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        print("begun", flush=True)
        began, spent = time.perf_counter(), time.process_time()
        events = await _write(writers, rate, seconds)
        for writer in writers:
            await writer.saved()
        took, python = time.perf_counter() - began, time.process_time() - spent
        print("done" + json.dumps({"events": events, "python_s": python, "took_s": took}), flush=True)
        await asyncio.sleep(2)


async def _mirror(dsn: str) -> None:
    """A replica that writes nothing: it has readers, until it is told to go."""
    from app.server import signals

    async with _replica(dsn, 0, 8) as (_, _, url):
        print(url.rpartition(":")[2], flush=True)
        await signals().wait()


async def _write(writers: list["Writer"], rate: int, seconds: float) -> int:
    """Append at an even pace, stream after stream; what a sleep oversleeps is made up for."""
    began, events = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        due, token = int(passed * rate), {"token": f"{time.monotonic_ns()}", "markers": {}, "flow": "main"}
        for number in range(events, due):
            writers[number % len(writers)].append("token", token)
        events = due
        await asyncio.sleep(_TICK_S)
    return events


@asynccontextmanager
async def _replica(dsn: str, count: int, gap_ms: float) -> AsyncIterator[tuple["Streaming", list["Writer"], str]]:
    """A gateway of which only the log and the bus run, and streams that are written."""
    from app.gateway.parts import Parts
    from app.gateway.resources import opened
    from app.safe import NO_SAFE
    from app.server import serving
    from app.settings import load
    from app.telemetry import configure_logging

    configure_logging("warning", "text")  # standard output is for the figures
    settings = load(database_url=dsn, flush_gap_ms=gap_ms, auth="open", row_security="off", user_readers=_READERS)
    async with opened(settings, NO_SAFE) as resources, asyncio.TaskGroup() as tasks:
        parts = Parts(settings, resources, signing_keys=(), tasks=tasks)
        streaming = parts.streaming
        await streaming.partitions.run_once()
        await streaming.replica.register()
        streaming.replica.refusal = None
        writers = [await _begun(streaming) for _ in range(count)]
        loops = [tasks.create_task(loop) for loop in (streaming.log.run(), streaming.bus.run())]
        async with serving(_app(parts), "127.0.0.1", 0) as url:
            yield streaming, writers, url
            streaming.hub.close()
        for loop in loops:
            loop.cancel()


async def _begun(streaming: "Streaming") -> "Writer":
    from app.streams.stream import NEW_ID, Stream, random_part

    async with streaming.replica.transaction() as connection:
        new_id = await connection.fetchval(f"select {NEW_ID.format(random_part='$1')}", random_part())
        await streaming.streams.begin(connection, Stream(new_id, "u", str(new_id), "c", 1, "main"), {})
    return streaming.log.open(new_id, last_id=1)


def _app(parts: "Parts") -> "Starlette":
    from starlette.applications import Starlette

    from app.gateway.presence import Life, Presence
    from app.gateway.state import state_of
    from app.routes import State, routes

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[State]:
        yield state_of(parts, Presence(parts, Life()))

    return Starlette(routes=routes(parts.settings), lifespan=lifespan)


# -- the readers


async def _count(where: dict[str, Any]) -> None:
    """Count the frames of all streams, and the time that the last token of each piece was on its way."""
    loop = asyncio.get_running_loop()
    readers = [_Reader(stream) for stream in json.loads(Path(where["ids"]).read_text())]
    for reader in readers:
        await loop.create_connection(lambda reader=reader: reader, "127.0.0.1", where["port"])  # type: ignore[misc]
    await asyncio.gather(*(reader.over.wait() for reader in readers))
    late = sorted(took for reader in readers for took in reader.took)
    # stream_start is the first event of each
    events = sum(reader.events for reader in readers) - len(readers)
    print(json.dumps({"events": events, "p50": late[len(late) // 2] / 1e6, "p99": late[len(late) * 99 // 100] / 1e6}))


class _Reader(asyncio.Protocol):
    def __init__(self, stream: str) -> None:
        self._stream = stream
        self._rest = b""
        self.events = 0
        self.took: list[int] = []
        self.over = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        head = f"GET /api/stream-events/{self._stream} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n"
        transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        # A mark cut in two by the network counts with its second half.
        piece = self._rest + data
        self.events += piece.count(_MARK)
        self._rest = piece[-len(_MARK) + 1 :]
        if (at := data.rfind(_SAID)) >= 0:
            digits = data[at + len(_SAID) :].partition(b'"')[0]
            if digits.isdigit():
                self.took.append(time.monotonic_ns() - int(digits))

    def connection_lost(self, error: Exception | None) -> None:
        self.over.set()


if __name__ == "__main__":
    main()
