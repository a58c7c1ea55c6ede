"""The processes under measurement: started, found ready, weighed by /proc (Linux only), and stopped."""

import asyncio
import os
import socket
import sys
import urllib.error
import urllib.request
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import orjson

from app.embedded import EmbeddedPostgres, embedded_postgres

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_READY_S = 60
_STOP_S = 40


class Failed(Exception):
    """A process did not do what the benchmark needs."""


def cpu_s(root: int) -> float:
    """CPU seconds of a process and its descendants so far; those of dead children count through their parents."""
    return sum(map(_own_cpu_s, _tree(root)))


def _own_cpu_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0  # gone meanwhile: its parent has its time
    # utime, stime, cutime, cstime; counted from behind the name, which may hold anything.
    return sum(map(int, stat.rpartition(")")[2].split()[11:15])) * _TICK_S


def _tree(root: int) -> Iterator[int]:
    yield root
    try:
        children = " ".join(path.read_text() for path in Path(f"/proc/{root}/task").glob("*/children"))
    except OSError:
        return
    for child in children.split():
        yield from _tree(int(child))


def memory_bytes(pid: int) -> int:
    """Anonymous memory. Not the proportional set: that shrinks when another process maps the same libraries."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise Failed("the kernel tells nothing of anonymous memory")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def postgres(folder: Path) -> AsyncIterator[tuple[EmbeddedPostgres, int]]:
    """A new cluster as it comes, so with fsync, and the pid of its first process."""
    async with embedded_postgres(folder) as server:
        pid_file = server.data_dir / "postgres" / "data" / "postmaster.pid"
        yield server, int(pid_file.read_text().split()[0])


@asynccontextmanager
async def running(*arguments: str, log: Path, environment: Mapping[str, str] | None = None) -> AsyncIterator[Process]:
    """`python -m ARGUMENTS` while the block runs, its standard error in `log`; its end is told where this fails."""
    with log.open("ab") as errors:
        process = await _started(arguments, environment, errors.fileno())
    try:
        yield process
    except (Failed, ExceptionGroup) as error:
        error.add_note(log.read_text()[-2000:])
        raise
    finally:
        await _stop(process)


async def _started(arguments: tuple[str, ...], environment: Mapping[str, str] | None, stderr: int) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", *arguments, stdin=DEVNULL, stdout=PIPE, stderr=stderr, env=_environment(environment)
    )


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    """Ours without anybody's settings of a gateway."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PARLEY_", "DATABASE_URL"))}
    return {**kept, "PARLEY_RATE_USER": "none", **(more or {})}


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Failed("a process had to be killed") from None


async def first_line(process: Process) -> str:
    """What a server says when it is ready."""
    assert process.stdout is not None
    async with asyncio.timeout(_READY_S):
        line = await process.stdout.readline()
    if not line:
        raise Failed("a server died at its start")
    return line.decode().strip()


async def answered(url: str, process: Process) -> None:
    """Return when the URL answers 200."""
    async with asyncio.timeout(_READY_S):
        while await asyncio.to_thread(_status, url) != 200:
            if process.returncode is not None:
                raise Failed("a server died at its start")
            await asyncio.sleep(0.05)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # our own loopback server
            status: int = response.status
            return status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def active_streams(port: int) -> int:
    """Answers under way in the gateway at this port."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/conversation-health", timeout=5) as response:
        active: int = orjson.loads(response.read())["active_streams"]
        return active


async def output(*arguments: str, given: bytes = b"", environment: Mapping[str, str] | None = None) -> bytes:
    """Standard output of `python ARGUMENTS`. Raises Failed with what it said where it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=_environment(environment)
    )
    try:
        said, errors = await process.communicate(given)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise Failed(f"{' '.join(arguments)}: {errors.decode()[-2000:]}")
    return said
