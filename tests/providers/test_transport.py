"""What the network and the provider's HTTP can do to a call of any dialect: U1, U2, U4 to U6, U13, U14, U16 to U18."""

import asyncio
import gc
import os
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlencode

import httpx2
import pytest

from app.demo.answers import tokens
from app.providers.aio import AioHTTPTransport
from app.providers.provider import Deadlines, Finish, Prompt, Provider, Text
from app.providers.refusal import Refusals, retry_after
from tests.providers.answers import answered, failed, finish_of, prompt, text_of
from tests.providers.conftest import KEY, Connect, Remembered
from tests.providers.dialects import DIALECTS, Dialect
from tests.providers.wire import HEAD, chunked, raw_server, receive, written
from tests.serving import client_of

FAST = "demo?delay_ms=0&tokens=20"
SAID = "".join(tokens("Hello", 20))
CLOSED_WITHIN_S = 1
# The promise is 20,000 (U18); that many take about a minute.
CANCELS = int(os.environ.get("PARLEY_TEST_CANCELS", "2000"))


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> Dialect:
    return DIALECTS[request.param]


def port_nobody_listens_on() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


async def test_u1_a_refused_connection_is_unavailable(connect: Connect) -> None:
    error = await failed(connect(f"http://127.0.0.1:{port_nobody_listens_on()}/v1"), prompt("any"))
    assert (error.kind, error.code, error.retryable) == ("unavailable", "upstream_unavailable", True)
    assert error.detail == "Provider 'vendor' cannot be reached: it refuses connections."


async def test_u1_an_unknown_host_is_unavailable(connect: Connect) -> None:
    error = await failed(connect("http://nobody.invalid/v1"), prompt("any"))
    assert error.kind == "unavailable"
    assert "nobody.invalid" not in error.detail


async def test_u1_a_certificate_nobody_signed_is_not_trusted(connect: Connect) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(Path(__file__).with_name("untrusted.pem"))
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # the server's side of the failed handshake
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=context) as server:
        port = server.sockets[0].getsockname()[1]
        error = await failed(connect(f"https://127.0.0.1:{port}/v1"), prompt("any"))
    assert error.detail == "Provider 'vendor' cannot be reached: TLS failed or its certificate is not trusted."


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("2", 2), ("0.5", 0.5), ("-3", 0), ("nan", None), ("inf", None), ("soon", None), (None, None), ("1e9", 86400),
     ("Thu, 01 Jan 1970 00:01:40 GMT", 40), ("Thu, 01 Jan 1970 00:00:00 GMT", 0), ("Thu, 99 Jan 1970", None)],
)  # fmt: skip
def test_u2_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, now=60) == seconds


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529])
async def test_u2_a_busy_provider_may_be_asked_again_after_the_time_it_says(connect: Connect, status: int) -> None:
    error = await failed(connect(), prompt(f"demo?fault=status&status={status}&retry_after=0.2"))
    assert (error.kind, error.retryable) == ("rate_limited" if status == 429 else "unavailable", True)
    assert error.retry_after == 0.2


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "rejected"), (401, "refused"), (403, "refused"), (404, "rejected"), (413, "rejected"), (422, "rejected")],
)
async def test_what_cannot_succeed_is_not_to_be_tried_again(
    connect: Connect, remembered: Remembered, status: int, kind: str
) -> None:
    error = await failed(connect(), prompt(f"demo?fault=status&status={status}&key={status}"))
    assert (error.kind, error.retryable) == (kind, False)
    assert len(await remembered(str(status))) == 1


async def test_an_error_message_is_cleaned_and_holds_no_key(connect: Connect) -> None:
    error = await failed(connect(), prompt("demo?fault=status&status=401"))
    assert error.detail == (
        "Provider 'vendor' refused the request (status 401): "
        "The demo answers 401 on request. Your credentials: [key] See [url]"
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"bad key {KEY}!", "bad key [key]!"),
        ("Incorrect API key provided: sk-proj-a**********xyz.", "Incorrect API key provided: [key]."),
        ("a\r\nb\x00\x1b[31mc\u2028d\ud83d", "a b [31mc d"),
        ("see HTTPS://vendor.example/x?y and ftp://z", "see [url] and [url]"),
        ("x" * 300, "x" * 199 + "…"),
        ("it is fine to speak of skiing", "it is fine to speak of skiing"),
    ],
)
def test_messages_are_scrubbed(said: str, shown: str) -> None:
    assert Refusals("vendor", secret=KEY).scrubbed(said) == shown


def test_a_key_that_looks_like_none_is_scrubbed_too() -> None:
    assert Refusals("vendor", secret="tree.house").scrubbed("no tree.house here") == "no [key] here"


@pytest.mark.parametrize("fault", ["deaf", "silent"])
async def test_u4_a_first_token_that_never_comes_is_a_timeout(
    connect: Connect, remembered: Remembered, fault: str
) -> None:
    provider = connect(deadlines=Deadlines(first_token_s=0.1))
    error = await failed(provider, prompt(f"demo?fault={fault}&key={fault}"))
    assert (error.kind, error.code, error.retryable) == ("timeout", "upstream_timeout", True)
    records = await remembered(fault)
    assert len(records) == 1
    assert all(record["closed_at"] - record["received_at"] < 0.1 + CLOSED_WITHIN_S for record in records)


async def test_u4_comments_are_no_tokens(connect: Connect) -> None:
    async with raw_server(_murmur) as url:
        provider = connect(url, deadlines=Deadlines(first_token_s=0.2))
        async with asyncio.timeout(5):
            error = await failed(provider, prompt("any"))
    assert error.kind == "timeout"


async def _murmur(writer: asyncio.StreamWriter) -> None:
    """Comments for ever, or rather until the client leaves."""
    writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(chunked(b": still here\n\n"))
        await writer.drain()
        await asyncio.sleep(0.01)  # the murmur's own pace; nobody waits for it


async def test_u5_a_stall_between_tokens_keeps_what_came(connect: Connect, remembered: Remembered) -> None:
    provider = connect(deadlines=Deadlines(first_token_s=5, gap_s=0.1))
    started = time.monotonic()
    chunks, error = await answered(provider, prompt("demo?delay_ms=1&fault=stall&after=4&key=u5"))
    assert text_of(chunks) == "".join(tokens("Hello", 4))
    assert finish_of(chunks) is None
    assert error is not None
    assert error.kind == "timeout"
    assert 0.1 <= time.monotonic() - started < 3
    [record] = await remembered("u5")
    assert record["closed_at"] is not None


async def test_u5_a_slow_consumer_is_not_the_providers_silence(connect: Connect, remembered: Remembered) -> None:
    provider = connect(deadlines=Deadlines(first_token_s=5, gap_s=0.1))
    async with aclosing(provider.stream(prompt("demo?tokens=20&delay_ms=20&key=slow"))) as batches:
        chunks = [*await anext(batches), *await anext(batches)]
        await remembered("slow")  # the provider has said everything, 400 ms later
        async for batch in batches:
            chunks.extend(batch)
    assert text_of(chunks) == SAID


async def test_u5_a_pace_within_the_gap_never_times_out(connect: Connect) -> None:
    provider = connect(deadlines=Deadlines(first_token_s=5, gap_s=0.25))
    chunks, error = await answered(provider, prompt("demo?tokens=20&delay_ms=50"))
    assert (text_of(chunks), error) == (SAID, None)


async def test_u6_a_reset_keeps_the_tokens_before_it_and_is_not_tried_again(
    connect: Connect, remembered: Remembered
) -> None:
    chunks, error = await answered(connect(), prompt("demo?delay_ms=5&fault=reset&after=4&key=u6"))
    assert text_of(chunks) == "".join(tokens("Hello", 4))
    assert error is not None
    assert (error.kind, error.retryable) == ("unavailable", True)
    assert len(await remembered("u6")) == 1


async def test_u6_a_reset_before_the_first_token_may_be_tried_again(connect: Connect) -> None:
    error = await failed(connect(), prompt(f"{FAST}&fault=vanish"))
    assert (error.kind, error.retryable) == ("unavailable", True)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a length\r\n",
        HEAD + b"Content-Length: 100\r\n\r\ndata: {}\n\n",
        HEAD + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\n\r\n",
    ],
)
async def test_what_is_not_http_or_ends_early_is_an_error(connect: Connect, answer: bytes) -> None:
    async with raw_server(lambda writer: written(writer, answer)) as url:
        error = await failed(connect(url), prompt("any"))
    assert error.kind in ("unavailable", "protocol")


async def test_a_body_that_ends_with_the_connection_is_read_to_the_end(connect: Connect, dialect: Dialect) -> None:
    answer = HEAD + b"Connection: close\r\n\r\n" + dialect.finished
    async with raw_server(lambda writer: written(writer, answer)) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    assert (chunks, error) == ([Text("Hi"), Finish("stop")], None)


async def test_an_endless_error_body_is_cut(connect: Connect) -> None:
    async with raw_server(_endless_error) as url:
        async with asyncio.timeout(3):
            error = await failed(connect(url), prompt("any"))
    assert error.detail == "Provider 'vendor' reported an error (status 500)"


async def _endless_error(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(chunked(b"x" * 65536))
        await writer.drain()


async def test_u13_a_compressed_bomb_is_refused_unread(connect: Connect) -> None:
    error = await failed(connect(), prompt("demo?fault=gzip"))
    assert (error.kind, error.retryable) == ("protocol", False)
    assert "compressed" in error.detail


async def test_u14_a_redirect_is_not_followed_and_the_key_stays_here(connect: Connect) -> None:
    arrived: list[bool] = []

    async def elsewhere(writer: asyncio.StreamWriter) -> None:
        arrived.append(True)

    async with raw_server(elsewhere) as other:
        error = await failed(connect(), prompt(f"demo?{urlencode({'fault': 'redirect', 'to': other})}"))
    assert (error.kind, error.retryable) == ("protocol", False)
    assert not arrived


async def test_u16_at_capacity_a_call_fails_at_once(connect: Connect) -> None:
    provider = connect(concurrency=1)
    async with aclosing(provider.stream(prompt("demo?fault=stall&delay_ms=0"))) as batches:
        await anext(batches)
        error = await failed(provider, prompt(FAST))
    assert (error.kind, error.code, error.retryable) == ("busy", "upstream_busy", True)
    assert text_of((await answered(provider, prompt(FAST)))[0]) == SAID


async def _consume(provider: Provider, asked: Prompt, started: asyncio.Event) -> None:
    async with aclosing(provider.stream(asked)) as batches:
        async for _ in batches:
            started.set()


async def test_u17_a_cancelled_consumer_closes_the_connection_at_once(connect: Connect, remembered: Remembered) -> None:
    started = asyncio.Event()
    consumer = asyncio.create_task(_consume(connect(), prompt("demo?fault=stall&delay_ms=0&key=u17"), started))
    await started.wait()
    cancelled_at = time.time()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    [record] = await remembered("u17")
    assert cancelled_at <= record["closed_at"] < cancelled_at + CLOSED_WITHIN_S


@contextmanager
def finalizing(finalizer: Callable[[object], None]) -> Iterator[None]:
    before = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(before.firstiter, finalizer)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(*before)


async def test_u17_a_closed_generator_closes_the_connection_at_once(connect: Connect, remembered: Remembered) -> None:
    abandoned: list[object] = []  # generators that are left to the garbage collector
    with finalizing(abandoned.append):
        batches = connect().stream(prompt("demo?tokens=1000&key=u17-closed"))
        await anext(batches)
        closed_at = time.time()
        await batches.aclose()
    assert not abandoned
    [record] = await remembered("u17-closed")
    assert closed_at <= record["closed_at"] < closed_at + CLOSED_WITHIN_S


@pytest.mark.parametrize("fault", ["deaf", "silent"])
async def test_u17_so_does_one_cancelled_before_the_first_token(
    connect: Connect, remembered: Remembered, demo_url: str, fault: str
) -> None:
    provider = connect()
    consumer = asyncio.create_task(_consume(provider, prompt(f"demo?fault={fault}&key=u17-{fault}"), asyncio.Event()))
    await _until_asked(demo_url, f"u17-{fault}")
    cancelled_at = time.time()
    consumer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await consumer
    [record] = await remembered(f"u17-{fault}")
    assert cancelled_at <= record["closed_at"] < cancelled_at + CLOSED_WITHIN_S


async def _until_asked(demo_url: str, key: str) -> None:
    async with client_of(demo_url.removesuffix("/v1")) as client, asyncio.timeout(5):
        while not (await client.get("/demo/requests", params={"key": key})).json()["requests"]:
            pass


async def test_a_finished_answer_leaves_its_connection_for_the_next(connect: Connect, remembered: Remembered) -> None:
    provider = connect()
    for _ in range(3):
        await answered(provider, prompt(f"{FAST}&key=kept"))
    await anext(abandoned := provider.stream(prompt("demo?fault=stall&delay_ms=0&key=kept")))
    await abandoned.aclose()
    await answered(provider, prompt(f"{FAST}&key=kept"))
    clients = [record["client"] for record in await remembered("kept")]
    assert len(set(clients[:4])) == 1
    assert clients[4] != clients[0]


async def test_so_does_one_whose_body_ends_a_little_after_the_answer(connect: Connect, dialect: Dialect) -> None:
    connections = 0

    async def answer_for_ever(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with suppress(asyncio.IncompleteReadError):
            while True:
                await receive(reader)
                writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(dialect.finished + dialect.marker))
                await writer.drain()
                await asyncio.sleep(0.01)  # the little; a client that does not wait closes in it
                writer.write(b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer_for_ever, "127.0.0.1", 0) as server:
        provider = connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        for _ in range(3):
            assert (await answered(provider, prompt("any")))[1] is None
        await provider.aclose()
    assert connections == 1


@pytest.mark.parametrize("stalled", [True, False], ids=["stalls", "breaks"])
async def test_what_goes_wrong_after_the_finish_does_not_undo_it(
    connect: Connect, dialect: Dialect, monkeypatch: pytest.MonkeyPatch, stalled: bool
) -> None:
    monkeypatch.setattr("app.providers.answer._AFTERMATH_S", 0.05)

    async def play(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(dialect.finished))
        await writer.drain()
        if stalled:
            await _gone(writer)

    async with raw_server(play) as url, asyncio.timeout(5):
        chunks, error = await answered(connect(url), prompt("any"))
    assert (chunks, error) == ([Text("Hi"), Finish("stop")], None)


async def test_an_end_that_the_server_keeps_open_is_not_waited_for(connect: Connect, dialect: Dialect) -> None:
    async def linger(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(dialect.finished + dialect.marker))
        await writer.drain()
        await _gone(writer)

    async with raw_server(linger) as url, asyncio.timeout(5):
        chunks, error = await answered(connect(url, deadlines=Deadlines()), prompt("any"))
    assert (chunks, error) == ([Text("Hi"), Finish("stop")], None)


async def _gone(writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        await writer.wait_closed()


async def test_cookies_are_neither_kept_nor_sent(connect: Connect) -> None:
    heads: list[bytes] = []

    async def cookie_setting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 404 No\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(cookie_setting, "127.0.0.1", 0)
    async with server:
        provider = connect(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        for _ in range(2):
            await failed(provider, prompt("any"))
    assert len(heads) == 2
    assert not any(b"cookie" in head.lower() for head in heads)


async def test_the_environments_proxies_are_not_used(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port_nobody_listens_on()}")
    assert text_of((await answered(connect(), prompt(FAST)))[0]) == SAID


@asynccontextmanager
async def httpx2_client() -> AsyncIterator[httpx2.AsyncClient]:
    timeout = httpx2.Timeout(5, read=0.1)
    async with httpx2.AsyncClient(transport=AioHTTPTransport(), timeout=timeout, trust_env=False) as client:
        yield client


async def test_the_transport_speaks_httpx2(demo_url: str) -> None:
    body = {"model": FAST, "messages": [{"role": "user", "content": "Hello"}]}
    async with httpx2_client() as client:
        assert (await client.get(f"{demo_url}/models")).json()["object"] == "list"
        answer = await client.post(f"{demo_url}/chat/completions", json=body)
        assert answer.json()["choices"][0]["message"]["content"] == SAID
        with pytest.raises(httpx2.ReadTimeout):
            await client.post(f"{demo_url}/chat/completions", json={**body, "model": "demo?fault=deaf"})
        with pytest.raises(httpx2.ConnectError):
            await client.get(f"http://127.0.0.1:{port_nobody_listens_on()}/")
        with pytest.raises(httpx2.RemoteProtocolError):
            await client.post(
                f"{demo_url}/chat/completions", json={**body, "model": "demo?fault=cut&delay_ms=0", "stream": True}
            )


async def _cancelled_at_some_point(provider: Provider, number: int) -> None:
    """A call cancelled after `number` turns of the loop, or after its first token."""
    started = asyncio.Event()
    call = asyncio.create_task(_consume(provider, prompt("demo?fault=stall&delay_ms=0&after=1&key=u18"), started))
    if number % 2:
        await started.wait()
    else:
        for _ in range(number % 40):
            await asyncio.sleep(0)
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call


async def test_u18_after_many_cancels_the_next_call_works_and_nothing_is_left(connect: Connect) -> None:
    provider = connect(concurrency=100)
    await answered(provider, prompt(FAST))
    before = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    for start in range(0, CANCELS, 100):
        async with asyncio.TaskGroup() as group:
            for number in range(start, start + 100):
                group.create_task(_cancelled_at_some_point(provider, number))
    assert (await answered(provider, prompt(FAST)))[1] is None
    async with asyncio.timeout(10):
        while (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) > (before[0] + 2, before[1]):
            await asyncio.sleep(0)  # let the demo see that its clients have gone
    gc.collect()  # what was left unclosed would warn here, and a warning is an error
