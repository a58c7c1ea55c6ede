"""The `parley` command in a process of its own: started as a user starts it, watched, signalled, ended by its pid."""

import asyncio
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.wire import Wire

ROOT = Path(__file__).parent.parent
PARLEY = (sys.executable, "-m", "app")
PATIENCE_S = 30


@dataclass(frozen=True, slots=True)
class Done:
    """How a process ended, and every line it said."""

    code: int
    out: list[str]
    err: list[str]


class Command:
    """A running process."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.pid = process.pid
        self._process = process
        self._out: list[str] = []
        self._err: list[str] = []
        self._news = asyncio.Event()
        self._readers = [
            asyncio.create_task(self._read(process.stdout, self._out)),
            asyncio.create_task(self._read(process.stderr, self._err)),
        ]

    async def _read(self, pipe: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in pipe:
            lines.append(line.decode().rstrip("\n"))
            self._news.set()
        self._news.set()

    @property
    def out(self) -> list[str]:
        return list(self._out)

    @property
    def err(self) -> list[str]:
        return list(self._err)

    async def says(self, text: str, *, within_s: float = PATIENCE_S) -> str:
        """The first line that contains this, on either stream."""
        async with asyncio.timeout(within_s):
            while True:
                self._news.clear()
                if found := [line for line in (*self._out, *self._err) if text in line]:
                    return found[0]
                assert not all(reader.done() for reader in self._readers), f"it ended: {self._out} {self._err}"
                await self._news.wait()

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    async def ended(self, *, within_s: float = PATIENCE_S) -> Done:
        """Wait for the end; whoever else held the pipes has gone then, too."""
        async with asyncio.timeout(within_s):
            code = await self._process.wait()
            await asyncio.gather(*self._readers)
        return Done(code, self.out, self.err)

    async def stop(self, number: int = signal.SIGTERM, *, within_s: float = PATIENCE_S) -> Done:
        self.send(number)
        return await self.ended(within_s=within_s)

    async def clear_away(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        await self.ended()


@asynccontextmanager
async def running(*args: str, command: Sequence[str] = PARLEY, **variables: str) -> AsyncGenerator[Command, None]:
    """`parley ARGS`, open to anybody, with no settings but these variables; killed on the way out if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *command, *args, stdout=PIPE, stderr=PIPE, cwd=ROOT, env=_environment(variables)
    )
    command_ = Command(process)
    try:
        yield command_
    finally:
        await command_.clear_away()


async def run(*args: str, command: Sequence[str] = PARLEY, **variables: str) -> Done:
    """`parley ARGS` to its end."""
    async with running(*args, command=command, **variables) as process:
        return await process.ended()


def _environment(variables: dict[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("PARLEY_", "PG", "DATABASE_"))}
    unlimited = {"PARLEY_RATE_USER": "none", "PARLEY_RATE_ADDRESS": "none"}
    return ours | {"PARLEY_AUTH": "open"} | unlimited | variables


@contextmanager
def silent_port() -> Iterator[socket.socket]:
    """A port of 127.0.0.1 that refuses connections until somebody listens on this socket, and that nobody else gets."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held


def through(port: socket.socket, database: str) -> str:
    """The DSN of a database as it is once the port is `answered`."""
    name = database.partition("?")[0].rpartition("/")[2]
    return f"postgresql://parley@127.0.0.1:{port.getsockname()[1]}/{name}?sslmode=disable"


@asynccontextmanager
async def answered(port: socket.socket, database: str) -> AsyncGenerator[None, None]:
    """Listen on a port that was silent so far, in front of this database's server."""
    folder = database.partition("host=")[2].partition("&")[0]
    wire = Wire(lambda: asyncio.open_unix_connection(f"{folder}/.s.PGSQL.5432"))
    async with await asyncio.start_server(wire.accept, sock=port.dup()):
        yield
        wire.cut()


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes that work in a folder or were told of it: a server's backends stand in their data folder."""
    return [process for process in psutil.process_iter() if _lives(process) and _is_about(process, str(folder))]


def _is_about(process: psutil.Process, folder: str) -> bool:
    with suppress(psutil.Error):
        return process.cwd().startswith(folder) or any(folder in word for word in process.cmdline())
    return False


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        # A zombie only waits for init to collect it, which some containers' never does.
        return process.status() != psutil.STATUS_ZOMBIE
    return False


async def all_gone(processes: Sequence[psutil.Process]) -> None:
    """Wait until none of these lives any more."""
    async with asyncio.timeout(PATIENCE_S):
        while any(map(_lives, processes)):
            await asyncio.sleep(0.01)
