"""What every answer carries, whatever became of the request: what browsers must not do with it, and who may read it."""

import asyncio
from collections import defaultdict
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.access.origins import cors, origins
from app.errors import Misconfigured
from app.gateway.presence import Life
from app.main import create_app
from app.operations import OPERATIONS
from app.server import serving as serving_app
from app.settings import load
from tests.house import Open
from tests.serving import client_of, serving, until_ready

_PAGE = "https://chat.example.org"
_ORIGINS = {"cors_origins": f"{_PAGE}, http://localhost:3000"}
_SAFE = {
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
}


def _path(path: str) -> str:
    return path.format_map(defaultdict(lambda: "none", stream_id="0197c1a2-7b3c-7def-8a01-23456789abcd"))


async def _raw(client: httpx2.AsyncClient, request: bytes) -> str:
    """All that a server says to these bytes before it closes."""
    parts = urlsplit(str(client.base_url))
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return (await reader.read()).decode()
    finally:
        writer.close()


def _check(headers: httpx2.Headers) -> None:
    assert {name: headers.get(name) for name in _SAFE} == _SAFE
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "server" not in headers


async def test_every_answer_says_what_browsers_must_not_do_with_it(database: str) -> None:
    async with serving(database, hsts_s=86400, sse_max_age_s=0.1) as client:
        for method, path in (*OPERATIONS, ("GET", "/none"), ("TRACE", "/livez"), ("OPTIONS", "/livez")):
            answer = await client.request(method, _path(path), content=b"{")
            _check(answer.headers)
            assert answer.headers["strict-transport-security"] == "max-age=86400"
            assert method == "OPTIONS" or "cache-control" in answer.headers or path == "/livez"
            assert "public" not in answer.headers.get("cache-control", "")
        said = await _raw(client, b"no HTTP at all\r\n\r\n")
    head, _, _ = said.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 400 ")
    _check(httpx2.Headers(dict(line.split(": ", 1) for line in head.splitlines()[1:])))


async def test_nothing_is_said_of_https_unless_asked_for(database: str) -> None:
    async with serving(database) as client:
        assert "strict-transport-security" not in (await client.get("/livez")).headers


async def test_without_origins_no_page_may_read_anything(database: str) -> None:
    async with serving(database, auth="keys") as client:
        for method in ("GET", "OPTIONS"):
            answer = await client.request(method, "/livez", headers={"Origin": _PAGE, **_asking("GET")})
            assert not [name for name in answer.headers if name.startswith("access-control")]


def _asking(method: str, *headers: str) -> dict[str, str]:
    return {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": ", ".join(headers)}


async def test_a_page_of_a_named_origin_may_read_every_answer(database: str) -> None:
    """A8: also a refusal, a crash, and a stream's beginning; any other page none of them."""

    async def crash(_: Request) -> Response:
        raise RuntimeError

    life = Life()
    settings = load(database_url=database, auth="keys", **_ORIGINS)
    app = create_app(settings, life)
    app.router.routes.append(Route("/crash", crash))
    async with serving_app(cors(app, settings), "127.0.0.1", 0) as url, client_of(url) as client:
        await until_ready(client)
        for path, status in (("/livez", 200), ("/none", 404), ("/api/stream", 401), ("/crash", 500)):
            for origin, allowed in ((_PAGE, _PAGE), ("http://localhost:3000", "http://localhost:3000")):
                answer = await client.get(path, headers={"Origin": origin})
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == allowed
                assert {"ETag", "Retry-After", "Location", "X-Request-Id", "RateLimit"} <= set(
                    answer.headers["access-control-expose-headers"].split(", ")
                )
                assert "Origin" in answer.headers["vary"]
            for stranger in ("https://evil.example", f"{_PAGE}.evil.example", f"{_PAGE}:8443", "null"):
                answer = await client.get(path, headers={"Origin": stranger})
                assert answer.status_code == status
                assert "access-control-allow-origin" not in answer.headers
                assert "Origin" in answer.headers["vary"]
            assert "access-control-allow-credentials" not in answer.headers


async def test_a_page_may_resume_a_stream_and_is_answered_before_it_asks(house: Open) -> None:
    async with house({"quick": "demo?tokens=3&ttft=0&gap=0"}, **_ORIGINS) as home:
        answer, frames = await home.ask()
        headers = {"Origin": _PAGE, "Accept": "text/event-stream", "Last-Event-ID": str(frames[0].id)}
        async with home.client.stream("GET", answer["streaming_url"], headers=headers) as stream:
            assert stream.status_code == 200
            assert stream.headers["access-control-allow-origin"] == _PAGE
            assert b"event: stream_end" in await stream.aread()
        asking = {"Origin": _PAGE, **_asking("GET", "last-event-id", "authorization")}
        preflight = await home.client.options(answer["streaming_url"], headers=asking)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == _PAGE
        assert {"Last-Event-ID", "Authorization", "Idempotency-Key", "X-API-Key"} <= set(
            preflight.headers["access-control-allow-headers"].split(", ")
        )
        stranger = await home.client.options(answer["streaming_url"], headers={**asking, "Origin": "https://evil.org"})
        assert stranger.status_code == 400
        assert "access-control-allow-origin" not in stranger.headers
        plain = await home.client.options(answer["streaming_url"])
        assert (plain.status_code, set(plain.headers["allow"].split(", "))) == (204, {"GET", "HEAD"})


@pytest.mark.parametrize(
    "wrong",
    [
        "*",
        "null",
        "https://*.example.org",
        "chat.example.org",
        "https://chat.example.org/",
        "https://Chat.example.org",
        "https://me@chat.example.org",
        "https://chat.example.org/chat",
        "ftp://chat.example.org",
        "https://",
        "https://chat.example.org:x",
        "https://ü.example.org",
    ],
)
def test_origins_are_named_one_by_one_and_as_browsers_write_them(wrong: str) -> None:
    with pytest.raises(Misconfigured, match="PARLEY_CORS_ORIGINS"):
        origins(load(cors_origins=f"{_PAGE},{wrong}"))


def test_a_port_that_browsers_leave_out_is_left_out() -> None:
    given = "https://chat.example.org:443,http://[::1]:3000,http://x:80"
    assert origins(load(cors_origins=given)) == {_PAGE, "http://[::1]:3000", "http://x"}


async def test_in_open_mode_no_page_from_elsewhere_can_send_a_message(house: Open) -> None:
    """A browser sends it without asking, where nothing but the body's type would have to be right."""
    body: dict[str, Any] = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
    async with house({"quick": "demo?tokens=1&ttft=0&gap=0"}, **_ORIGINS) as home:
        here = str(home.client.base_url).rstrip("/")
        for origin in ("https://evil.example", "null", "file://", "http://127.0.0.1.evil.example", "http://[", "x"):
            refused = await home.client.post("/api/process-message", json=body, headers={"Origin": origin})
            assert (refused.status_code, refused.json()["code"]) == (403, "origin_unknown")
        assert await home.count("chats") == 0
        for origin in (here, "http://localhost:5173", _PAGE):
            answer = await home.client.post("/api/process-message", json=body, headers={"Origin": origin})
            assert answer.status_code == 200
