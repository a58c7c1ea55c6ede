"""The load: many readers in a process of its own that does nothing with what arrives but note the time.

python -m scripts.bench.load < JOB > ANSWERS      (both JSON)
"""

import asyncio
import gc
import random
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from time import monotonic_ns
from typing import Any

import orjson
import uvloop

from scripts.bench.answer import Answer, Piece, Response, Subject, read

_HOST = "127.0.0.1"
_HEAD = "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: {connection}\r\n{more}\r\n"


@dataclass(frozen=True, slots=True)
class Job:
    """`lanes` readers that each ask `rounds` times in turn, beginning at random moments of `ramp_s` from `start`.

    `start` is in monotonic nanoseconds. Without `reading` an accepted message is left to itself; with a `reading_port`
    it is read there.
    """

    subject: Subject
    port: int
    path: str
    body: Mapping[str, Any]
    tokens: int
    lanes: int
    start: int
    ramp_s: float = 0
    rounds: int = 1
    timeout_s: float = 60
    reading: bool = True
    reading_port: int | None = None


class _Connection(asyncio.Protocol):
    """Keeps what arrives with its time; whoever asked for a short response is woken at its end."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.closed = asyncio.get_running_loop().create_future()
        self._reply: tuple[Response, asyncio.Future[None]] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self.pieces.append((monotonic_ns(), data))
        if self._reply is not None:
            response, done = self._reply
            response.feed(data)
            if response.complete and not done.done():
                done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._reply is not None and not self._reply[1].done():
            self._reply[1].set_exception(exc or ConnectionResetError("closed"))
        if not self.closed.done():
            self.closed.set_result(None)

    def write(self, request: bytes) -> None:
        self._transport.write(request)

    async def reply(self, request: bytes) -> Response:
        self._reply = response, done = Response(), asyncio.get_running_loop().create_future()
        self.write(request)
        await done
        self._reply = None
        self.pieces.clear()
        return response

    def abort(self) -> None:
        self._transport.abort()


async def run(job: Job) -> list[Answer]:
    """Play the job; then, with the load over, take the answers apart."""
    chance = random.Random(1)
    offsets = [chance.uniform(0, job.ramp_s) for _ in range(job.lanes)]
    lanes = await asyncio.gather(*(_lane(job, number, offset) for number, offset in enumerate(offsets)))
    return [_taken_apart(job, asked, outcome) for lane in lanes for asked, outcome in lane]


_Outcome = list[Piece] | str


async def _lane(job: Job, number: int, offset_s: float) -> list[tuple[int, _Outcome]]:
    await asyncio.sleep((job.start - monotonic_ns()) / 1e9 + offset_s)
    return [await _outcome(job, number) for _ in range(job.rounds)]


async def _outcome(job: Job, number: int) -> tuple[int, _Outcome]:
    asked = monotonic_ns()
    try:
        async with asyncio.timeout(job.timeout_s):
            async with _connected(job.port) as connection:
                asked = monotonic_ns()
                if job.subject not in ("parley", "elsewhere"):
                    await _ask(job, connection)
                    return asked, connection.pieces
                path = await _message(job, connection, number)
                if job.reading_port is None:
                    await _read(path, connection)
                    return asked, connection.pieces
                async with _connected(job.reading_port) as reading:
                    await _read(path, reading)
                    return asked, reading.pieces
    except (OSError, TimeoutError, RuntimeError) as error:
        return asked, f"{type(error).__name__}: {error}"


@asynccontextmanager
async def _connected(port: int) -> AsyncIterator[_Connection]:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, _HOST, port)
    try:
        yield connection
    finally:
        connection.abort()


async def _ask(job: Job, connection: _Connection) -> None:
    connection.write(_post(job, "close", job.body))
    await connection.closed


async def _message(job: Job, connection: _Connection, number: int) -> str:
    """Send the message; where its answer streams, nowhere if nobody reads it."""
    accepted = await connection.reply(
        _post(job, "keep-alive", {**job.body, "user_id": f"reader-{number}-{monotonic_ns()}"})
    )
    if accepted.status != 200:
        raise RuntimeError(f"status {accepted.status}: {accepted.body[:200].decode()}")
    return str(orjson.loads(accepted.body)["streaming_url"]) if job.reading else ""


async def _read(path: str, connection: _Connection) -> None:
    """As a browser does: the events of the answer, often on the connection that the message took."""
    if path:
        connection.write(_head("GET", path, "close", "Accept: text/event-stream\r\n"))
        await connection.closed


def _post(job: Job, connection: str, body: Mapping[str, Any]) -> bytes:
    content = orjson.dumps(body)
    more = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return _head("POST", job.path, connection, more) + content


def _head(method: str, path: str, connection: str, more: str) -> bytes:
    return _HEAD.format(method=method, path=path, connection=connection, more=more).encode()


def _taken_apart(job: Job, asked: int, outcome: _Outcome) -> Answer:
    if isinstance(outcome, str):
        return Answer(asked, error=outcome)
    return read(job.subject, asked, outcome, tokens=job.tokens) if job.reading else Answer(asked)


def main() -> None:
    job = Job(**orjson.loads(sys.stdin.buffer.read()))
    gc.disable()  # its pauses would look like the subject's
    answers = uvloop.run(run(job))
    # Not sys.stdout: under PYTHONUNBUFFERED its write may take a part of this only.
    with open(1, "wb", closefd=False) as out:
        out.write(orjson.dumps([asdict(answer) for answer in answers]))


if __name__ == "__main__":
    main()
