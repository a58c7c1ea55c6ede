"""A connection before there is a request: heads without an end, too large or too slow are refused; nothing piles up."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from app.bodies import BodyLimit, Pace
from app.connection import HEAD_LIMIT
from app.server import serving
from tests.house import Open

_START = b"GET / HTTP/1.1\r\nHost: here\r\n"


async def _told(request: Request) -> Response:
    return PlainTextResponse(str(len(await request.body())))


async def _deaf(_: Request) -> Response:
    return PlainTextResponse("deaf")


@pytest.fixture
async def url() -> AsyncGenerator[str, None]:
    """Of a server whose clients have 0.2 s for a head."""
    app = Starlette(routes=[Route("/", _told, methods=["GET", "POST"]), Route("/deaf", _deaf, methods=["POST"])])
    async with serving(app, "127.0.0.1", 0, head_s=0.2, headers=[("X-Safe", "yes")]) as url:
        yield url


Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def _connected(url: str) -> AsyncGenerator[Wire, None]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        async with asyncio.timeout(10):
            yield reader, writer
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
    assert b"x-safe: yes" in head.lower()
    return int(head.split()[1]), await reader.readexactly(int(length.split()[1]))


async def _refused(reader: asyncio.StreamReader, status: int, code: str) -> None:
    told, body = await _answer(reader)
    problem: dict[str, Any] = orjson.loads(body)
    assert (told, problem["status"], problem["code"], problem["success"]) == (status, status, code, False)
    with suppress(ConnectionResetError):  # more came than was read
        assert not await reader.read()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /?" + b"q" * HEAD_LIMIT + b" HTTP/1.1\r\nHost: here\r\n\r\n",
        _START + b"X-Long: " + b"x" * HEAD_LIMIT + b"\r\n\r\n",
        _START + b"X-Half: " + b"x" * HEAD_LIMIT,
        b"GET /" + b"x" * HEAD_LIMIT,
        _START + b"".join(b"X-%d: x\r\n" % number for number in range(100)) + b"\r\n",
        b"\r\n" * HEAD_LIMIT,
        b"POST / HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * HEAD_LIMIT,
    ],
    ids=["query", "header", "half a header", "half a line", "many headers", "blank lines", "trailers"],
)
async def test_a_head_that_is_too_large_is_refused(url: str, head: bytes) -> None:
    async with _connected(url) as (reader, writer):
        writer.write(head)
        await _refused(reader, 431, "head_too_large")


async def test_a_head_within_the_limit_is_taken_with_a_large_body_behind_it(url: str) -> None:
    async with _connected(url) as (reader, writer):
        head = b"POST / HTTP/1.1\r\nHost: here\r\nX-Long: " + b"x" * (HEAD_LIMIT - 200)
        writer.write(head + b"\r\nContent-Length: 100000\r\n\r\n" + b"b" * 100_000)
        assert await _answer(reader) == (200, b"100000")
        writer.write(_START + b"\r\n")
        assert await _answer(reader) == (200, b"0")


@pytest.mark.parametrize("said", [_START, b"GET /", b"\r\n"])
async def test_a_head_that_dribbles_is_refused_in_time(url: str, said: bytes) -> None:
    async with _connected(url) as (reader, writer):
        began = monotonic()
        answer = asyncio.ensure_future(_refused(reader, 408, "head_too_slow"))
        writer.write(said)
        while not answer.done():
            writer.write(b"X" if said != b"\r\n" else said)
            await asyncio.wait([answer], timeout=0.02)
        await answer
        assert monotonic() - began < 5


async def test_who_says_nothing_is_sent_away_without_a_word(url: str) -> None:
    async with _connected(url) as (reader, _):
        assert not await reader.read()


async def test_what_goes_on_after_its_answer_is_not_listened_to_for_ever(url: str) -> None:
    async with _connected(url) as (reader, writer):
        writer.write(b"POST /deaf HTTP/1.1\r\nHost: here\r\nContent-Length: 1000000\r\n\r\n")
        assert await _answer(reader) == (200, b"deaf")
        ended = asyncio.ensure_future(reader.read())
        while not ended.done():
            writer.write(b"x")
            await asyncio.wait([ended], timeout=0.02)
        with suppress(ConnectionResetError):
            assert not await ended


async def test_a_connection_stays_between_two_requests(url: str) -> None:
    async with _connected(url) as (reader, writer):
        for _ in range(2):
            writer.write(_START)
            await asyncio.sleep(0)
            writer.write(b"\r\n")
            assert await _answer(reader) == (200, b"0")
            await asyncio.sleep(0.3)  # longer than a head may take


async def test_what_is_no_http_is_a_problem_too(url: str) -> None:
    for said in (b"\x16\x03\x01\x02", b"GET\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"CONNECT h:1 HTTP/1.1\r\n\r\n"):
        async with _connected(url) as (reader, writer):
            writer.write(said)
            await _refused(reader, 400, "bad_request")


async def test_who_asks_for_another_protocol_gets_this_one(url: str) -> None:
    for protocol in (b"h2c", b"websocket"):
        async with _connected(url) as (reader, writer):
            writer.write(_START + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n")
            assert await _answer(reader) == (200, b"0")
            assert not await reader.read()  # its parser would read nothing more


async def test_a_refusal_is_counted_and_safe_like_every_answer(house: Open) -> None:
    async with house() as home:
        async with _connected(str(home.client.base_url)) as (reader, writer):
            writer.write(_START + b"X-Long: " + b"x" * HEAD_LIMIT)
            said = (await reader.read()).decode()
        assert "nosniff" in said
        assert orjson.loads(said.partition("\r\n\r\n")[2])["error_id"]
        assert 'parley_errors_total{code="head_too_large"} 1.0' in (await home.client.get("/metrics")).text


async def _all_said(reader: asyncio.StreamReader) -> bytes:
    """Up to the end of the connection, which is a reset where something was sent to who does not listen any more."""
    said = b""
    with suppress(ConnectionResetError):
        while more := await reader.read(4096):
            said += more
    return said


async def test_a_body_that_dribbles_is_refused_in_time(house: Open) -> None:
    async with house(body_timeout_s=0.3, upload_stall_s=0.3) as home:
        paths = ("process-message", "POST"), ("conversation-config/x", "PUT"), ("chats/import?user_id=ann", "POST")
        for path, method in paths:
            async with _connected(str(home.client.base_url)) as (reader, writer):
                writer.write(
                    f"{method} /api/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n".encode()
                )
                answer = asyncio.ensure_future(_all_said(reader))
                while not answer.done():
                    writer.write(b" ")
                    await asyncio.wait([answer], timeout=0.02)
                assert b'"code":"body_too_slow"' in (said := await answer), said


async def test_the_time_of_a_body_ends_with_it() -> None:
    """What is received after it is the end of the connection, and may take as long as it likes."""
    gone = asyncio.Event()

    async def receive() -> Any:
        if not gone.is_set():
            gone.set()
            return {"type": "http.request", "body": b"x", "more_body": False}
        await asyncio.sleep(0.1)
        return {"type": "http.disconnect"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"x"
        assert (await receive())["type"] == "http.disconnect"

    async def send(_: Any) -> None:
        raise AssertionError

    await BodyLimit(app, 10, Pace(0.05))({"type": "http", "headers": []}, receive, send)
