"""Everything under test: a PostgreSQL, replicas that reach it through ways of their own, and a balancer before them."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import asyncpg
import httpx2

from app.demo import demo_provider
from app.flows import chatbots, file
from app.postgres import Pool
from app.schema import migrate
from scripts.chaos.postgres import Postgres, running_postgres
from scripts.chaos.ways import Way, way_to

_ROOT = Path(__file__).parents[2]
_CLOCK = Path(__file__).parent / "clock"
_READY_S = 40
_STOP_S = 40

# Lengths of answers, in tokens of 20 ms.
LENGTHS = (20, 40, 70)
# Readers notice a silent replica soon, and come back soon; everything else is as it comes.
_READERS = {"PARLEY_SSE_HEARTBEAT_S": "1", "PARLEY_SSE_RETRY_MS": "200", "PARLEY_DRAIN_S": "1"}
_QUICK = {"PARLEY_LEASE_S": "1", "PARLEY_BEAT_S": "0.2", "PARLEY_SCAN_S": "0.2", "PARLEY_POLL_S": "0.2"}


class Failed(Exception):
    """The trial cannot go on."""


class Replica:
    """One place where a replica runs; its role in the database says which one wrote an event."""

    def __init__(self, number: int, folder: Path, variables: Mapping[str, str], database: Way) -> None:
        self.number = number
        self.role = f"replica_{number}"
        self.database = database
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"{self.role}.log"
        self._variables = variables
        self._process: Process | None = None
        self.clock = "0"

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Return when it takes messages."""
        if not self.running:
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "app", "serve", stdin=DEVNULL, stdout=DEVNULL, stderr=log.fileno(),
                    env=self._environment(), cwd=_ROOT,
                )  # fmt: skip
        await self.ready()

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PARLEY_", "DATABASE_"))}
        path = os.pathsep.join(filter(None, (str(_CLOCK), os.environ.get("PYTHONPATH"))))
        dsn = f"postgresql://{self.role}@127.0.0.1:{self.database.port}/parley?sslmode=disable"
        mine = {"DATABASE_URL": dsn, "PARLEY_PORT": str(self.port), "PARLEY_LOG_FORMAT": "text", "PARLEY_AUTH": "open"}
        mine["PARLEY_RATE_USER"] = "none"
        return {**kept, **self._variables, **mine, "PYTHONPATH": path, "PARLEY_CHAOS_CLOCK_S": self.clock}

    async def ready(self, within_s: float = _READY_S) -> None:
        async with httpx2.AsyncClient(base_url=self.url, trust_env=False, timeout=2) as client:
            async with asyncio.timeout(within_s):
                while not await _is_ready(client):
                    if not self.running:
                        raise Failed(f"{self.role} ended: {self.said()}")
                    await asyncio.sleep(0.05)

    def said(self) -> str:
        return self._log.read_text()[-3000:]

    def send(self, number: int) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    async def ended(self) -> int:
        assert self._process is not None
        async with asyncio.timeout(_STOP_S):
            return await self._process.wait()

    async def clear_away(self) -> None:
        if self.running:
            self.send(signal.SIGKILL)
            await self.ended()


async def _is_ready(client: httpx2.AsyncClient) -> bool:
    try:
        return (await client.get("/readyz")).status_code == 200
    except httpx2.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Site:
    """All of it. `look` does not go through any way, and is opened anew when the server restarts."""

    def __init__(self, postgres: Postgres, replicas: Sequence[Replica], balancer: Way, *, lease_s: float) -> None:
        self.lease_s = lease_s
        self.postgres = postgres
        self.replicas = replicas
        self.balancer = balancer
        self.look: Pool

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.balancer.port}"

    async def open_look(self) -> None:
        self.look = await asyncpg.create_pool(self.postgres.dsn, min_size=0, max_size=4)

    async def restart(self, *, crash: bool, away_s: float = 0) -> None:
        """Stop the database the fast or the immediate way, and start it again."""
        self.look.terminate()
        await (self.postgres.crash() if crash else self.postgres.stop())
        await asyncio.sleep(away_s)
        await self.postgres.start()
        await self.open_look()

    async def heal(self) -> None:
        """Everybody runs, is ready, reaches everything, and has the right time."""
        self.balancer.shunned.clear()
        for replica in self.replicas:
            replica.database.open()
            replica.send(signal.SIGCONT)
        async with asyncio.TaskGroup() as tasks:
            for replica in self.replicas:
                tasks.create_task(replica.start())


@asynccontextmanager
async def running_site(folder: Path, *, replicas: int, quick: bool) -> AsyncGenerator[Site, None]:
    """`quick`: a lease of one second instead of six, so that a short run fits into a test."""
    async with AsyncExitStack() as stack:
        postgres = await stack.enter_async_context(running_postgres(folder / "postgres", max_connections="200"))
        demo = await stack.enter_async_context(demo_provider())
        variables = {**_READERS, **(_QUICK if quick else {})}
        places = []
        for number in range(replicas):
            way = await stack.enter_async_context(way_to(postgres.dial))
            places.append(Replica(number, folder, variables, way))
        dials = [partial(asyncio.open_connection, "127.0.0.1", place.port) for place in places]
        balancer = await stack.enter_async_context(way_to(*dials))
        site = Site(postgres, places, balancer, lease_s=1 if quick else 6)
        await _prepare(postgres.dsn, demo, places)
        await site.open_look()
        stack.callback(lambda: site.look.terminate())
        for place in places:
            stack.push_async_callback(place.clear_away)
        await site.heal()
        yield site


async def _prepare(dsn: str, demo: str, places: Sequence[Replica]) -> None:
    await migrate(dsn)
    connection = await asyncpg.connect(dsn)
    try:
        for place in places:
            await connection.execute(f"create role {place.role} login; grant parley to {place.role}")
            await connection.execute(f"alter role {place.role} set role = 'parley'")
        # Which replica wrote an event; nothing of Parley's reads or writes this column.
        await connection.execute("alter table streaming_events add column writer text default session_user")
        await chatbots.apply(connection, file.parse(str(_chatbots(demo))))
    finally:
        await connection.close()


def _chatbots(demo: str) -> dict[str, object]:
    flows = {f"of{length}": f"demo?delay_ms=20&tokens={length}" for length in LENGTHS}
    return {
        "providers": {"demo": {"kind": "openai", "base_url": demo}},
        "chatbots": {name: {"flows": {"main": {"provider": "demo", "model": model}}} for name, model in flows.items()},
    }
