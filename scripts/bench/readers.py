"""Readers who come back: all at once, and each into a log that is full of others' events.

    .venv/bin/python -m scripts.bench.readers storm [--readers 1000] [--rounds 5]
    .venv/bin/python -m scripts.bench.readers catchup [--events 10000000] [--resumes 1000]     (or --quick)

A PostgreSQL of its own (with fsync), the gateway (`parley serve`, default settings but for the number of readers of one
stream and user) and readers in a process of its own that only note when their first event came. Linux only.

storm: the readers of streams that run and of streams that have ended, half and half, resume in the same moment, each on
a connection of its own, from the middle of what there is; health is asked all the while.
catchup: readers resume one after the other (or `--at-once 4`) at random places in a log of so many events.
"""

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import asyncpg
import httpx2
import uvloop
import yaml

from scripts.bench import processes

_LENGTH = 300
_STORM_STREAMS = 50
_WAIT_S = 30
# Streams of yesterday and today, as uuidv7, with an owner that is gone; each ends with its last event.
_STREAMS = """
insert into streaming_sessions (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, replica_id,
                                last_event_id, created_at, ended_at)
select (lpad(to_hex((extract(epoch from now() - random() * interval '20 hours') * 1000)::bigint), 12, '0') || '7'
        || substr(md5(random()::text), 1, 3) || 'a' || substr(md5(random()::text), 1, 15))::uuid,
       'user-' || n % 1000, 'session-' || n, 'bot', 1, 'main', 'completed', gen_random_uuid(), $2, now(), now()
from generate_series(1, $1::int) n
"""
_EVENTS = """
insert into streaming_events (stream_id, id, payload)
select s.id, n, case when n < $1 then
        '{"event":"token","data":{"token":" word","markers":{},"flow":"main"},"timestamp":"2026-01-01T00:00:00.000Z"}'
    else '{"event":"stream_end","data":{"status":"completed"},"timestamp":"2026-01-01T00:00:00.000Z"}' end
from (select id from streaming_sessions order by id limit $2 offset $3) s, generate_series(1, $1::int) n
"""
# Streams per statement: a million events are committed at once, as a server may have little memory.
_CHUNK = 3333


def main() -> None:
    match sys.argv[1:]:
        case ["read", at_once]:
            uvloop.run(_read(json.loads(sys.stdin.read()), int(at_once)))
        case _:
            asyncio.run(_measure(_arguments()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts.bench.readers", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["storm", "catchup"])
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--resumes", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a million events, two rounds")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.events, arguments.rounds = 1_000_000, 2
    return arguments


async def _measure(arguments: argparse.Namespace) -> None:
    folder = Path(tempfile.mkdtemp(prefix="parley-bench-"))
    folder.chmod(0o711)  # as root, PostgreSQL runs as another user and must be able to enter
    try:
        async with _gateway(folder) as (dsn, client):
            await (_storm if arguments.what == "storm" else _catchup)(arguments, dsn, client)
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def _gateway(folder: Path) -> AsyncIterator[tuple[str, httpx2.AsyncClient]]:
    ports, log = [processes.free_port() for _ in range(2)], folder / "errors.log"
    url = f"http://127.0.0.1:{ports[1]}"
    slow = {"provider": "demo", "model": "demo?tokens=2000&delay_ms=500"}
    provider = {"kind": "openai", "base_url": f"http://127.0.0.1:{ports[0]}/v1"}
    bots = folder / "chatbots.yaml"
    bots.write_text(yaml.safe_dump({"providers": {"demo": provider}, "chatbots": {"slow": {"flows": {"main": slow}}}}))
    async with processes.postgres(folder / "data") as (server, _):
        given = {
            "DATABASE_URL": server.dsn,
            "PARLEY_PORT": str(ports[1]),
            "PARLEY_LOG_LEVEL": "warning",
            "PARLEY_AUTH": "open",
        }
        given |= {"PARLEY_STREAM_READERS": "10000", "PARLEY_USER_READERS": "10000", "PARLEY_DRAIN_S": "0"}
        given |= {"PARLEY_AUTH": "open"}
        await processes.output("-m", "app", "migrate", environment=given)
        await processes.output("-m", "app", "apply", str(bots), environment=given)
        async with (
            processes.running("app", "demo-provider", "--port", str(ports[0]), log=log),
            processes.running("app", "serve", log=log, environment=given) as gateway,
            httpx2.AsyncClient(base_url=url, trust_env=False, timeout=60) as client,
        ):
            await processes.answered(f"{url}/readyz", gateway)
            yield server.dsn, client


async def _fill(dsn: str, streams: int) -> list[str]:
    """So many ended streams; their ids."""
    connection = await asyncpg.connect(dsn, command_timeout=600)
    try:
        await connection.execute(_STREAMS, streams, _LENGTH)
        for offset in range(0, streams, _CHUNK):
            await connection.execute(_EVENTS, _LENGTH, _CHUNK, offset)
        await connection.execute("vacuum (analyze) streaming_events")
        rows = await connection.fetch("select id from streaming_sessions where status = 'completed'")
        return [str(row["id"]) for row in rows]
    finally:
        await connection.close()


async def _resume(client: httpx2.AsyncClient, places: Sequence[tuple[str, int]], *, at_once: int) -> dict[str, Any]:
    """How long each of the readers waited for the event after its cursor, in milliseconds, sorted."""
    job = json.dumps({"port": client.base_url.port, "places": places}).encode()
    return dict(json.loads(await processes.output("-m", "scripts.bench.readers", "read", str(at_once), given=job)))


async def _storm(arguments: argparse.Namespace, dsn: str, client: httpx2.AsyncClient) -> None:
    half = _STORM_STREAMS // 2
    ended = await _fill(dsn, half)
    running = await asyncio.gather(*(_ask(client, number) for number in range(half)))
    places = [(ended[n % half], _LENGTH // 2) if n % 2 else (running[n % half], 2) for n in range(arguments.readers)]
    print(f"{arguments.readers:,} readers resume at once, milliseconds from the first connect\n")
    print("| round | first event, p50 | p99 | all served | not served | health answers within |")
    print("| ---: |" + " ---: |" * 5)
    for number in range(arguments.rounds):
        async with asyncio.TaskGroup() as tasks:
            resuming = tasks.create_task(_resume(client, places, at_once=arguments.readers))
            longest = await _watch_health(client, resuming)
        found = resuming.result()
        cells = (number + 1, *_quantiles(found["took"]), found["all"], found["failed"], longest * 1000)
        print("| " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |", flush=True)


async def _ask(client: httpx2.AsyncClient, number: int) -> str:
    """A running stream of which three events are there."""
    body = {"user_id": f"user-{number}", "chatbot_id": "slow", "message_text": "Hello"}
    accepted = (await client.post("/api/process-message", json=body)).raise_for_status().json()
    last = 0
    while last < 3:
        page = await client.get(accepted["streaming_url"], params={"after": last, "wait": 30})
        last = page.raise_for_status().json()["last_event_id"]
    return str(accepted["streaming_session_id"])


async def _watch_health(client: httpx2.AsyncClient, until: asyncio.Task[Any]) -> float:
    longest = 0.0
    while not until.done():
        began = perf_counter()
        (await client.get("/api/conversation-health")).raise_for_status()
        longest = max(longest, perf_counter() - began)
        await asyncio.sleep(0.01)
    return longest


async def _catchup(arguments: argparse.Namespace, dsn: str, client: httpx2.AsyncClient) -> None:
    began = perf_counter()
    streams = await _fill(dsn, arguments.events // _LENGTH)
    print(f"{len(streams) * _LENGTH:,} events in {len(streams):,} streams, made in {perf_counter() - began:.0f} s\n")
    print("| resumes | first event, p50, ms | p99, ms | most, ms | not served |\n| ---: | ---: | ---: | ---: | ---: |")
    for _ in range(arguments.rounds):
        places = [(random.choice(streams), random.randrange(_LENGTH - 1)) for _ in range(arguments.resumes)]
        found = await _resume(client, places, at_once=arguments.at_once)
        cells = (*_quantiles(found["took"]), found["took"][-1])
        print(
            f"| {arguments.resumes:,} | " + " | ".join(f"{c:.3g}" for c in cells) + f" | {found['failed']} |",
            flush=True,
        )


def _quantiles(took: Sequence[float]) -> tuple[float, float]:
    return took[len(took) // 2], took[len(took) * 99 // 100]


# -- the readers


async def _read(job: dict[str, Any], at_once: int) -> None:
    places = asyncio.Semaphore(at_once)
    began = perf_counter()

    async def one(stream: str, cursor: int) -> float | None:
        async with places:
            return await _first_event(job["port"], stream, cursor)

    waited = await asyncio.gather(*(one(*place) for place in job["places"]))
    took = sorted(ms for ms in waited if ms is not None)
    whole = (perf_counter() - began) * 1000
    print(json.dumps({"took": took, "all": whole, "failed": len(waited) - len(took)}))


async def _first_event(port: int, stream: str, cursor: int) -> float | None:
    """From the beginning of the connection to the frame of the event after the cursor; None where none came."""
    reader, began = _Reader(stream, cursor), perf_counter()
    transport, _ = await asyncio.get_running_loop().create_connection(lambda: reader, "127.0.0.1", port)
    try:
        async with asyncio.timeout(_WAIT_S):
            await reader.served
    except (TimeoutError, ConnectionError):
        return None
    finally:
        transport.abort()
    return (perf_counter() - began) * 1000


class _Reader(asyncio.Protocol):
    def __init__(self, stream: str, cursor: int) -> None:
        self._request = (
            f"GET /api/stream-events/{stream} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n"
            f"Last-Event-ID: {stream}:{cursor}\r\n\r\n"
        )
        self._mark, self._got = f"id: {stream}:{cursor + 1}\n".encode(), b""
        self.served: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request.encode())

    def data_received(self, data: bytes) -> None:
        if not self.served.done():
            self._got += data
            if self._mark in self._got:
                self.served.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.served.done():
            self.served.set_exception(ConnectionError("closed"))


if __name__ == "__main__":
    main()
