"""The door of every route: who gets in, what the others are told, and that no route is without one."""

import re
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import asyncpg
import httpx2
import pytest
from starlette.responses import Response
from starlette.routing import Route

from app.access import keys
from app.access.anybody import Anybody, anybody
from app.access.credentials import require_safe
from app.access.demands import demands
from app.access.guard import guard
from app.access.principal import SCOPES, Principal, Scope
from app.errors import Forbidden, Misconfigured
from app.main import create_app
from app.operations import OPERATIONS
from app.settings import load
from tests.command import run, running
from tests.serving import client_of, serving, until_ready

_PATHS: dict[str, str] = defaultdict(lambda: "none", stream_id="0197c1a2-7b3c-7def-8a01-23456789abcd")
_PUBLIC = {"/livez", "/readyz", "/api/conversation-health", "/openapi.json", "/docs"}
# Whoever signs what is sent there needs no credentials: tests/conversations/test_webhook.py.
_SIGNED = {"/api/webhooks/conversation-complete"}
_GUARDED = [(method, path) for method, path in OPERATIONS if path not in _PUBLIC | _SIGNED]
_NONE = f"parley_{'0' * 16}_{'0' * 64}"


@asynccontextmanager
async def _connection(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(database)
    try:
        yield connection
    finally:
        await connection.close()


async def key_with(database: str, *scopes: Scope) -> str:
    async with _connection(database) as connection:
        return await keys.create(connection, "test", scopes)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def client(database: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """Of a server that asks for keys."""
    async with serving(database, auth="keys", drain_s=0, sse_max_age_s=0.2) as client:
        yield client


def _url(path: str) -> str:
    return path.format_map(_PATHS)


def _routes() -> list[Route]:
    async def answer(_: Any) -> Response:
        return Response()

    return [Route("/one", answer), Route("/one/{id}", answer, methods=["PUT", "GET"])]


# -- the table


def test_a_route_without_an_entry_does_not_start() -> None:
    table: dict[tuple[str, str], Any] = {("GET", "/one"): "read", ("GET", "/one/{id}"): "read"}
    with pytest.raises(LookupError, match=r"PUT /one/\{id\} has no entry"):
        guard(_routes(), table)
    table["PUT", "/one/{id}"] = "admin"
    guard(_routes(), table)


def test_a_route_of_any_method_does_not_start() -> None:
    with pytest.raises(LookupError, match="any method"):
        guard([Route("/one", Response())], {})


def test_an_entry_without_a_route_does_not_start() -> None:
    table: dict[tuple[str, str], Any] = {
        ("GET", "/one"): "read",
        ("GET", "/one/{id}"): "read",
        ("PUT", "/one/{id}"): "read",
    }
    for idle in (("POST", "/one"), ("GET", "/two"), ("POST", "/one?name")):
        with pytest.raises(LookupError, match="without a route"):
            guard(_routes(), {**table, idle: "read"})


def test_the_table_of_a_server_is_complete_and_public_is_what_was_promised() -> None:
    create_app(load(database_url="postgresql://nowhere/x"))
    table = demands()
    assert {(method, path.partition("?")[0]) for method, path in table} == OPERATIONS.keys()
    assert {path for (_, path), demand in table.items() if demand == "public"} == _PUBLIC | _SIGNED
    opened = {entry for entry, demand in demands(metrics_open=True).items() if demand != table[entry]}
    assert opened == {("GET", "/metrics"), ("GET", "/readyz?verbose")}


# -- who gets in


@pytest.mark.parametrize(("method", "path"), _GUARDED)
async def test_without_credentials_nothing_is_answered(client: httpx2.AsyncClient, method: str, path: str) -> None:
    given: list[dict[str, str]] = [{}, {"Authorization": ""}, {"Authorization": "Bearer"}, {"Authorization": _NONE}]
    for headers in (*given, bearer(_NONE), {"X-API-Key": _NONE}, {"X-API-Key": ""}):
        response = await client.request(method, _url(path), headers=headers, content=b"{")
        assert response.status_code == 401, response.text
        assert response.json()["code"] == ("credentials_invalid" if headers else "credentials_missing")
        assert re.fullmatch('Bearer realm="parley"(, error="invalid_token")?', response.headers["www-authenticate"])
        assert "API key" in response.json()["detail"] or "revoked" in response.json()["detail"]


async def test_public_routes_need_nothing(client: httpx2.AsyncClient) -> None:
    for path in _PUBLIC:
        assert (await client.get(path)).status_code == 200
        assert (await client.get(path, headers=bearer("nonsense"))).status_code == 200
    for path in ("/readyz?verbose", "/readyz?a=1&verbose=", "/readyz?verbose=0"):
        for method in ("GET", "HEAD"):
            assert (await client.request(method, path)).status_code == 401


@pytest.mark.parametrize(("method", "path"), _GUARDED)
async def test_a_scope_opens_its_routes_and_no_other(
    client: httpx2.AsyncClient, database: str, method: str, path: str
) -> None:
    need = demands()[method, path]
    for scope in SCOPES:
        response = await client.request(
            method, _url(path), headers=bearer(await key_with(database, scope)), content=b"{"
        )
        if scope in (need, "admin"):
            assert response.status_code not in (401, 403), response.text
        else:
            problem = response.json()
            assert (response.status_code, problem["code"], problem["scope"]) == (403, "scope_missing", need)
            assert f'error="insufficient_scope", scope="{need}"' in response.headers["www-authenticate"]


async def test_both_headers_name_a_key_and_one_of_each_is_enough(client: httpx2.AsyncClient, database: str) -> None:
    key, url = await key_with(database, "admin"), "/metrics"
    for headers in (bearer(key), {"Authorization": f"bearer   {key}"}, {"X-API-Key": key}):
        assert (await client.get(url, headers=headers)).status_code == 200
    proxied = {"X-API-Key": key, "Authorization": "Basic c29tZWJvZHk6ZWxzZQ=="}
    assert (await client.get(url, headers=proxied)).status_code == 200
    for twice in ([("Authorization", f"Bearer {key}")] * 2, [("X-API-Key", key), ("X-API-Key", _NONE)]):
        assert (await client.get(url, headers=twice)).status_code == 401
    for scheme in ("Basic", "Digest", "Token"):
        assert (await client.get(url, headers={"Authorization": f"{scheme} {key}"})).status_code == 401
    assert (await client.get(url, params={"api_key": key, "key": key})).status_code == 401


async def test_metrics_can_be_opened(database: str) -> None:
    async with serving(database, auth="keys", metrics_open=True) as client:
        assert (await client.get("/metrics")).status_code == 200
        assert "version" in (await client.get("/readyz?verbose")).json()
        assert (await client.get("/api/stream?streams=x")).status_code == 401


async def test_a_revoked_key_is_refused_within_ten_seconds(client: httpx2.AsyncClient, database: str) -> None:
    key = await key_with(database, "admin")
    assert (await client.get("/metrics", headers=bearer(key))).status_code == 200
    async with _connection(database) as connection:
        await keys.revoke(connection, key)
        revoked_at = await connection.fetchval("select clock_timestamp()")
        while (await client.get("/metrics", headers=bearer(key))).status_code == 200:
            await connection.execute("select pg_sleep(0.1)")
        assert (await connection.fetchval("select clock_timestamp()") - revoked_at).total_seconds() < 10


async def test_an_event_source_is_told_to_come_back_while_keys_cannot_be_checked(database: str) -> None:
    url = f"/api/stream-events/{_PATHS['stream_id']}"
    async with serving(database, auth="keys", drain_s=0) as client, _connection(database) as connection:
        await connection.execute("alter table api_keys rename to api_keys_gone")
        key = bearer(_NONE)
        assert (await client.get(url, headers=key)).status_code == 503
        response = await client.get(url, headers={**key, "Accept": "text/event-stream"})
        assert (response.status_code, response.text.startswith("retry: ")) == (200, True)
        assert (
            await client.post("/api/process-message", headers={**key, "Accept": "text/event-stream"})
        ).status_code == 503


# -- modes


@pytest.mark.parametrize(
    ("host", "open_anywhere", "fine"),
    [
        ("127.0.0.1", False, True),
        ("127.9.9.9", False, True),
        ("::1", False, True),
        ("localhost", False, True),
        ("0.0.0.0", False, False),
        ("::", False, False),
        ("", False, False),
        ("10.1.2.3", False, False),
        ("gateway.example", False, False),
        ("0.0.0.0", True, True),
    ],
)
def test_open_is_refused_where_others_reach_it(host: str, open_anywhere: bool, fine: bool) -> None:
    settings = load(database_url="postgresql://nowhere/x", host=host, auth="open", open_anywhere=open_anywhere)
    for start in (require_safe, create_app):
        if fine:
            start(settings)
        else:
            with pytest.raises(Misconfigured, match="PARLEY_OPEN_ANYWHERE=true"):
                start(settings)
    require_safe(settings.model_copy(update={"auth": "keys"}))


@pytest.mark.parametrize("command", ["serve", "dev"])
async def test_open_on_every_address_does_not_start(database: str, command: str, tmp_path: Any) -> None:
    done = await run(
        command, DATABASE_URL=database, PARLEY_PORT="0", PARLEY_HOST="0.0.0.0", PARLEY_DATA_DIR=str(tmp_path)
    )
    assert (done.code, len(done.err)) == (2, 1)
    assert "PARLEY_OPEN_ANYWHERE=true" in done.err[0]


async def test_serve_asks_for_keys_unless_told_otherwise(database: str) -> None:
    # An empty variable counts as absent.
    variables = {"DATABASE_URL": database, "PARLEY_PORT": "0", "PARLEY_LOG_FORMAT": "text", "PARLEY_AUTH": ""}
    async with running("serve", **variables) as process:
        async with client_of((await process.says("listening")).rpartition("url=")[2]) as client:
            await until_ready(client)
            assert (await client.get("/metrics")).status_code == 401
        assert not any("open_to_anybody" in line for line in process.err)


async def test_serve_says_that_it_is_open(database: str) -> None:
    async with running("serve", DATABASE_URL=database, PARLEY_PORT="0", PARLEY_LOG_FORMAT="text") as process:
        assert "127.0.0.1" in await process.says("open_to_anybody")


_HERE = ("127.0.0.1", "127.9.9.9:8080", "[::1]:80", "localhost:80", "LOCALHOST", "localhost.", "app.localhost:3000")
_ELSEWHERE = (
    "rebound.example",
    "127.0.0.1.rebound.example",
    "localhost.example",
    "a@127.0.0.1",
    "0.0.0.0",
    "10.1.2.3",
)


def _asking_as(anybody: Anybody, host: str) -> str:
    """What one may under this name of the server."""
    try:
        principal = anybody.principal([(b"host", host.encode()), (b"authorization", b"Bearer whatever")])
    except Forbidden as refused:
        return refused.code
    assert (principal.kind, principal.user_id) == ("open", None)
    assert all(principal.may(scope) for scope in SCOPES if scope != "admin")
    return "admin" if principal.may("admin") else "user"


def test_an_open_server_is_asked_under_names_of_its_own_machine_and_those_that_were_allowed() -> None:
    here = _anybody()
    assert {_asking_as(here, name) for name in _HERE} == {"admin"}
    assert {_asking_as(here, name) for name in (*_ELSEWHERE, "", "[", "a b", "x" * 9000)} == {"host_unknown"}
    with pytest.raises(Forbidden, match="PARLEY_ALLOWED_HOSTS"):
        here.principal([])
    proxied = _anybody(allowed_hosts="Chat.example.org., [2001:db8::1]")
    assert [_asking_as(proxied, name) for name in ("chat.EXAMPLE.org:443", "[2001:db8::1]:8080")] == ["user"] * 2
    assert {_asking_as(proxied, name) for name in _ELSEWHERE} == {"host_unknown"}
    assert _asking_as(proxied, "localhost") == "admin"


def test_where_something_in_front_asks_any_name_is_taken_and_nobody_is_an_administrator() -> None:
    for host in ("0.0.0.0", "127.0.0.1"):
        exposed = _anybody(host=host, open_anywhere=True)
        assert {_asking_as(exposed, name) for name in (*_HERE, *_ELSEWHERE, "")} == {"user"}
        named = _anybody(host=host, open_anywhere=True, allowed_hosts="chat.example.org")
        assert [_asking_as(named, name) for name in ("chat.example.org", "x.example.org")] == ["user", "host_unknown"]


def _anybody(**given: Any) -> Anybody:
    return anybody(load(auth="open", **given))


@pytest.mark.parametrize("wrong", ["https://chat.example.org", "chat.example.org:443", "*.example.org", "a/b", "a b"])
def test_a_name_that_is_none_stops_the_start(wrong: str) -> None:
    with pytest.raises(Misconfigured, match="PARLEY_ALLOWED_HOSTS"):
        create_app(load(database_url="postgresql://nowhere/x", allowed_hosts=wrong))


async def test_a_page_whose_name_was_pointed_here_reaches_nothing(database: str) -> None:
    """DNS rebinding: to its browser the page is the server's own, so that it may ask anything and read the answer."""
    async with serving(database) as client:
        page = {"Host": "rebound.example:8080", "Origin": "http://rebound.example:8080"}
        for (method, path), headers in product(_GUARDED, (page, {"Host": page["Host"]})):
            answer = await client.request(method, _url(path), headers=headers, content=b"{")
            assert (answer.status_code, answer.json()["code"]) == (403, "host_unknown"), path
        for path in _PUBLIC:
            assert (await client.get(path, headers=page)).status_code == 200, "load balancers ask by any name"


# -- principals


@pytest.mark.parametrize("scopes", [(), ("read",), ("process", "sync")])
def test_what_a_principal_may(scopes: Sequence[Scope]) -> None:
    principal = Principal("key", "key:1", frozenset(scopes))
    assert [scope for scope in SCOPES if principal.may(scope)] == [scope for scope in SCOPES if scope in scopes]
    assert all(Principal("key", "key:1", frozenset({"admin"})).may(scope) for scope in SCOPES)


def test_whom_a_principal_acts_for() -> None:
    anybody, ann = Principal("key", "key:1", frozenset()), Principal("user", "user:ann", frozenset(), "ann")
    assert [anybody.acting_for(name) for name in ("ann", "bob", None)] == ["ann", "bob", None]
    assert [ann.acting_for(name) for name in ("ann", None)] == ["ann", "ann"]
    for other in ("bob", "", "Ann", "ann "):
        with pytest.raises(Forbidden) as caught:
            ann.acting_for(other)
        assert caught.value.code == "user_mismatch"
