"""Failures as clients and operators see them: problem documents, their rows in error_logs, request ids."""

import asyncio
import re
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from itertools import product
from typing import Any
from urllib.parse import quote, urlsplit

import asyncpg
import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.gateway.presence import Life
from app.main import create_app
from app.operations import OPERATIONS
from app.problems import ROWS
from app.server import serving as serving_app
from app.settings import load
from tests.access.test_guard import bearer, key_with
from tests.serving import client_of, serving, until_ready

_LIMIT = 4096


@pytest.fixture
async def client(database: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    async with serving(database, body_limit=_LIMIT, sse_max_age_s=0.2) as client:
        yield client


async def _row(database: str, error_id: str) -> asyncpg.Record:
    """The row of an error, once the journal has written it."""
    connection = await asyncpg.connect(database)
    try:
        async with asyncio.timeout(10):
            while not (row := await connection.fetchrow("select * from error_logs where id = $1::uuid", error_id)):
                await connection.execute("select pg_sleep(0.05)")
        return row
    finally:
        await connection.close()


async def _raw(url: str, request: bytes) -> bytes:
    """What a server says to these bytes, up to the end of the headers."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


def _check_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem["success"] is False
    assert problem["detail"]
    return problem


async def test_an_unknown_path(client: httpx2.AsyncClient) -> None:
    for path in ("/", "/nothing", "/api", "/api/stream-events/", "/%00", "/api/..%2f..%2fetc"):
        _check_problem(await client.get(path), 404, "route_unknown")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_a_wrong_method_is_told_the_right_one(client: httpx2.AsyncClient, method: str, path: str) -> None:
    response = await client.request("TRACE", path)
    _check_problem(response, 405, "method_not_allowed")
    assert method in response.headers["allow"].split(", ")


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
async def test_options_are_answered_without_a_body(client: httpx2.AsyncClient, method: str, path: str) -> None:
    response = await client.options(path)
    assert response.status_code == 204
    assert method in response.headers["allow"].split(", ")
    assert not response.content


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "GET"])
async def test_head_is_answered_at_once_and_like_get(client: httpx2.AsyncClient, path: str) -> None:
    path = path.format_map(defaultdict(lambda: "none", stream_id="0197c1a2-7b3c-7def-8a01-23456789abcd"))
    head, get = await client.head(path), await client.get(path)
    assert head.status_code == get.status_code
    assert head.headers["content-type"] == get.headers["content-type"]
    assert not head.content


async def test_an_error_id_finds_its_row(client: httpx2.AsyncClient, database: str) -> None:
    response = await client.post("/api/process-message", json={}, headers={"X-Request-Id": "mine-1"})
    problem = _check_problem(response, 422, "invalid_request")
    row = await _row(database, problem["error_id"])
    assert (row["code"], row["message"], row["request_id"]) == ("invalid_request", problem["detail"], "mine-1")


async def test_strangers_fill_no_table_and_those_let_in_only_slowly(database: str) -> None:
    async with serving(database, auth="keys", rate_key="reads=200") as client:
        shop, admin = bearer(await key_with(database, "read")), bearer(await key_with(database, "admin"))
        paths = ["/nothing", "/readyz?verbose", *(path.format_map(defaultdict(lambda: "x")) for _, path in OPERATIONS)]
        for headers in ({}, bearer("parley_guess"), bearer("a.b.c"), {"X-API-Key": "x" * 40_000}):
            for method, path in product(("GET", "POST", "TRACE"), paths):
                answer = await client.request(method, path, headers=headers)
                assert answer.status_code < 500
                assert answer.status_code in (200, 204) or answer.json()["error_id"]
        asked = 0
        while (await client.get("/api/stream-events/x", headers=shop)).status_code == 404:
            asked += 1
        metrics = (await client.get("/metrics", headers=admin)).text
    errors = {code: float(count) for code, count in re.findall(r'parley_errors_total\{code="(\w+)"\} (\S+)', metrics)}
    assert errors.keys() >= {"route_unknown", "credentials_missing", "credentials_invalid", "method_not_allowed"}
    assert (errors["stream_unknown"], errors["rate_limited"]) == (asked, 1)
    connection = await asyncpg.connect(database)
    rows = await connection.fetch(
        "select code, count(*) from error_logs group by 1"
    )  # the gateway has written the last
    await connection.close()
    ((code, count),) = rows
    assert code == "stream_unknown"
    assert ROWS <= count < asked
    assert f"parley_journal_dropped_total {asked - count:.1f}" in metrics


async def test_a_crash_says_nothing_but_its_id(database: str) -> None:
    async def crash(_: Request) -> Response:
        raise RuntimeError("the secret of the house")

    life = Life()
    app = create_app(load(database_url=database, auth="open"), life)
    app.router.routes.append(Route("/crash", crash))
    async with serving_app(app, "127.0.0.1", 0) as url, client_of(url) as client:
        await until_ready(client)
        response = await client.get("/crash", headers={"X-Request-Id": "mine-2"})
        problem = _check_problem(response, 500, "internal_error")
        assert "secret" not in response.text
        assert response.headers["x-request-id"] == "mine-2"
        assert response.headers["connection"] == "close"
        assert (await _row(database, problem["error_id"]))["request_id"] == "mine-2"


async def _chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 1024):
        yield b" " * 1024


async def test_a_body_over_the_limit_is_a_problem_declared_or_not(client: httpx2.AsyncClient) -> None:
    over = _LIMIT + 1024
    for content in (b" " * over, _chunks(over)):
        response = await client.post("/api/process-message", content=content)
        _check_problem(response, 413, "body_too_large")
    response = await client.post("/api/process-message", content=_chunks(_LIMIT))
    _check_problem(response, 400, "invalid_json")


async def test_a_declared_body_over_the_limit_is_not_waited_for(client: httpx2.AsyncClient) -> None:
    said = await _raw(
        str(client.base_url),
        b"POST /api/process-message HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n" % (_LIMIT + 1),
    )
    assert said.startswith(b"HTTP/1.1 413 ")


async def test_a_request_id_is_kept_where_harmless_and_made_otherwise(client: httpx2.AsyncClient) -> None:
    kept = await client.get("/livez", headers={"X-Request-Id": "Abc-1._"})
    assert kept.headers.get_list("x-request-id") == ["Abc-1._"]
    for given in ("", "two words", "x" * 65, "a;b", "<script>"):
        made = (await client.get("/livez", headers={"X-Request-Id": given})).headers.get_list("x-request-id")
        assert len(made) == 1
        assert re.fullmatch("[0-9a-f]{32}", made[0])


@pytest.mark.parametrize("breaks", [b"\r\nX-Evil: 1", b"\nX-Evil: 1", b"\r\n\r\nX-Evil: 1", b"\rX-Evil: 1"])
async def test_line_breaks_in_headers_make_no_second_field(client: httpx2.AsyncClient, breaks: bytes) -> None:
    """A break in a request header ends that field, as in any request; nothing behind it may come back (I5)."""
    for name in (b"X-Request-Id", b"Last-Event-ID", b"Idempotency-Key"):
        said = await _raw(
            str(client.base_url), b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n" + name + b": a" + breaks + b"\r\n\r\n"
        )
        assert b"evil" not in said.lower()


@pytest.mark.parametrize("breaks", ["\r\nX-Evil: 1", "\n\nevent: evil", "\u2028evil", "\x00"])
async def test_line_breaks_in_ids_are_refused_or_escaped(
    client: httpx2.AsyncClient, database: str, breaks: str
) -> None:
    question = {"user_id": "ann", "chatbot_id": "demo", "message_text": "Hello"}
    for field in ("session_id", "client_message_id"):
        response = await client.post("/api/process-message", json=question | {field: "a" + breaks})
        _check_problem(response, 422, "invalid_request")
    for path in (f"/nothing{breaks}", f"/api/stream-events/a{breaks}"):
        response = await client.get(quote(path))
        problem = _check_problem(response, 404, response.json()["code"])
        assert "x-evil" not in response.headers
    assert "\n" not in (await _row(database, problem["error_id"]))["message"]
