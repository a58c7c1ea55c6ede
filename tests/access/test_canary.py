"""No secret is found anywhere, whoever sends it where and whatever breaks: no answer, log line, metric or row (A7)."""

import asyncio
import socket
import traceback
from base64 import b64encode
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product
from time import time
from typing import Any
from urllib.parse import quote

import asyncpg
import httpx2
import jwt
import pytest

from app.access import keys
from app.access.stream_token import SigningKey
from app.doctor import examine
from app.errors import Misconfigured
from app.operations import OPERATIONS
from app.postgres import open_pool, wait_for_database
from app.safe import MasterKey, Safe
from app.settings import load
from tests.access.echo import FAULTS, echoing_vendor
from tests.access.test_stream_token import token_of
from tests.command import Command, answered, running, silent_port, through
from tests.serving import client_of, until_ready

_STREAM = "0197c1a2-7b3c-7def-8a01-23456789abcd"
_ROWS = "select coalesce(string_agg(e::text, ' '), '') from {} e"


def _requests(key: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Every route with the key where it belongs, and where people put it by mistake."""
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    bearers = [{"Authorization": f"Bearer {given}"} for given in (key, wrong, key[:50])]
    given: list[dict[str, str]] = [
        *bearers,
        {"X-API-Key": key},
        {"X-API-Key": wrong},
        {"Authorization": f"Basic {key}"},
    ]
    given += [{"Authorization": key}, {**bearers[0], "X-API-Key": wrong}]
    given += [{**bearers[0], name: key} for name in ("X-Request-Id", "Last-Event-ID", "Cookie", "Referer")]
    asked = []
    for method, path in OPERATIONS:
        for headers in given:
            asked.append((method, path.format_map(defaultdict(lambda: _STREAM)), {"headers": headers, "content": b"{"}))
        mistaken = path.format_map(defaultdict(lambda: key))
        asked.append(
            (method, mistaken, {"headers": bearers[0], "params": {"api_key": key, "user_id": key, "after": key}})
        )
        asked.append((method, mistaken, {"params": {"token": key}, "json": {"user_id": "ann", "message_text": key}}))
    return [*asked, ("GET", f"/{key}", {}), ("TRACE", "/metrics", {"headers": bearers[0]})]


def _no_canary(text: str, key: str) -> None:
    assert key[24:48] not in text, "a part of its secret"


async def test_a_key_is_found_nowhere(database: str) -> None:
    look = await asyncpg.connect(database)
    variables = {"PARLEY_AUTH": "keys", "PARLEY_LOG_LEVEL": "debug", "PARLEY_PORT": "0", "DATABASE_URL": database}
    variables["PARLEY_SSE_MAX_AGE_S"] = "0.2"
    key, admin = [await keys.create(look, "canary", [scope]) for scope in ("process", "admin")]
    async with running("serve", PARLEY_LOG_FORMAT="text", **variables) as process:
        async with client_of((await process.says("listening")).rpartition("url=")[2]) as client:
            await until_ready(client)
            statuses = {await _ask(client, key, *request) for given in (key, admin) for request in _requests(given)}
            # A bug of ours, with its traceback, while the key is in the headers of the request.
            await look.execute("alter table chats rename to gone")
            crash = ("GET", "/api/sessions/x/queue?user_id=ann", {"headers": {"Authorization": f"Bearer {admin}"}})
            statuses.add(await _ask(client, admin, *crash))
            metrics = await client.get("/metrics", headers={"X-API-Key": admin})
            _no_canary(metrics.text, key)
        assert statuses >= {200, 400, 401, 403, 404, 405, 422, 500}
        await look.execute("alter table gone rename to chats")
        async with asyncio.timeout(30):
            while not await look.fetchval("select count(*) from error_logs where code = 'internal_error'"):
                pass
        said = "\n".join((await process.stop()).err)
    assert "request_crashed" in said
    for secret in (key, admin):
        _no_canary(said, secret)
        assert keys._hash(secret).hex() not in said
        for table in ("error_logs", "api_keys", "streaming_sessions", "chats", "conversation_processing_metrics"):
            _no_canary(await look.fetchval(_ROWS.format(table)), secret)
    assert f"key:{key[7:23]}" in await look.fetchval(_ROWS.format("error_logs")), "but who it was is told"
    await look.close()


async def _ask(client: httpx2.AsyncClient, key: str, method: str, path: str, how: dict[str, Any]) -> int:
    response = await client.request(method, path, **how)
    # What is sent back, as a client's own field, is not ours to take out: nothing of the kind exists today.
    _no_canary(response.text, key)
    _no_canary(str(response.headers.multi_items()), key)
    return response.status_code


# -- all the others

_MASTER, _ISSUER = "canary-master-" + "m4" * 16, "canary-issuer-" + "i5" * 16
_PASSWORD = "p4ssCanaryWord"
# One that looks like a key, and one that looks like nothing; the second is given in plain text and stored encrypted.
_VENDOR, _PLAIN = "sk-canaryVendor-" + "v7" * 12, "zebra.crossing/canary+" + "z9" * 12


@dataclass(frozen=True, slots=True)
class Canaries:
    """Secrets by their names, and what looks for them: in their words, a good part of those, and encoded."""

    parts: dict[str, set[str]] = field(default_factory=dict)

    def add(self, name: str, secret: str) -> str:
        middle = secret[len(secret) // 4 :][:24]
        self.parts[name] = {middle, quote(secret, safe=""), b64encode(secret.encode()).decode().rstrip("=")[:-1]}
        return secret

    def look(self, where: str, text: str) -> None:
        for name, parts in self.parts.items():
            for part in parts:
                at = text.find(part)
                assert at < 0, f"the {name} is in {where}: {text[max(0, at - 200) : at + 80]}"


@dataclass(frozen=True, slots=True)
class Town:
    """A gateway in a process of its own, and who looks."""

    client: httpx2.AsyncClient
    database: asyncpg.Connection
    canaries: Canaries
    process: Command

    async def ask(self, method: str, path: str, key: str = "", **how: Any) -> httpx2.Response:
        if key:
            how["headers"] = {"Authorization": f"Bearer {key}"}
        response = await self.client.request(method, path, **how)
        told = f"{_without_url(response)} {response.headers.multi_items()}"
        self.canaries.look(f"the answer to {method} {path[:60]}", told)
        return response

    async def send(self, chatbot: str, key: str) -> dict[str, Any]:
        body = {"chatbot_id": chatbot, "message_text": "Hello"}
        response = await self.ask("POST", "/api/process-message", key, json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def end_of(self, chatbot: str, key: str) -> str:
        """How an answer ended, as every reader of it is told."""
        stream = (await self.send(chatbot, key))["streaming_session_id"]
        url, cursor = f"/api/stream-events/{stream}", 0
        page: dict[str, Any] = {"has_more": True}
        while page["has_more"]:
            page = (await self.ask("GET", f"{url}?wait=5&after={cursor}", key)).json()
            cursor = page["last_event_id"]
        await self.ask("GET", url, headers={"Authorization": f"Bearer {key}", "Accept": "text/event-stream"})
        status: str = page["session_status"]
        return status

    async def look_into_the_tables(self) -> None:
        for row in await self.database.fetch("select tablename from pg_tables where schemaname = 'public'"):
            rows = await self.database.fetchval(_ROWS.format(row["tablename"]))
            self.canaries.look(f"the table {row['tablename']}", rows)


@asynccontextmanager
async def _town(database: str, port: socket.socket) -> AsyncGenerator[Town, None]:
    canaries = Canaries()
    dsn = through(port, database).replace("parley@", f"parley:{canaries.add('password', _PASSWORD)}@")
    secrets = {"MASTER": _MASTER, "ISSUER": _ISSUER, "VENDOR_KEY": _VENDOR}
    for name, secret in {**secrets, "stored key": _PLAIN}.items():
        canaries.add(name, secret)
    variables = {
        "DATABASE_URL": dsn,
        "PARLEY_PORT": "0",
        "PARLEY_LOG_LEVEL": "debug",
        "PARLEY_SSE_MAX_AGE_S": "1",
        "PARLEY_LOG_FORMAT": "text",
        "PARLEY_AUTH": "keys,jwt",
        "PARLEY_JWT_ISSUER": "us",
        "PARLEY_JWT_AUDIENCE": "us",
        "PARLEY_JWT_SECRET": "env:ISSUER",
        "PARLEY_MASTER_KEY": "env:MASTER",
        "PARLEY_PROVIDER_RETRIES": "0",
        "PARLEY_RATE_USER": "none",
        "PARLEY_RATE_ADDRESS": "none",
        **secrets,
    }
    look = await asyncpg.connect(database)
    try:
        async with (
            running("serve", **variables) as process,
            client_of((await process.says("listening")).rpartition("url=")[2]) as client,
        ):
            yield Town(client, look, canaries, process)
    finally:
        await look.close()


def _without_url(response: httpx2.Response) -> str:
    """The one place for the token of a stream: the URL that whoever has sent a message is given."""
    sent = response.request.method == "POST" and response.status_code == 200
    given = response.json().get("streaming_url") if sent else None
    return response.text.replace(given, "") if given else response.text


def _definition(vendor: str, fault: str, kind: str, key: str) -> dict[str, Any]:
    provider = {"kind": kind, "base_url": f"{vendor}/v1", "api_key": key}
    return {
        "providers": {"vendor": provider},
        "chatbot": {"flows": {"main": {"provider": "vendor", "model": f"fault-{fault}"}}},
    }


def _mistakes(vendor: str) -> list[dict[str, Any]]:
    """Keys and passwords at the wrong places of a configuration."""
    good = _definition(vendor, "plain", "openai", "env:VENDOR_KEY")
    provider = good["providers"]["vendor"]
    wrong: list[dict[str, Any]] = [
        {"base_url": f"https://ann:{_PLAIN}@vendor.invalid/v1"},
        {"base_url": f"https://vendor.invalid/v1?key={_PLAIN}"},
        {"base_url": _VENDOR},
        {"api_key": f"ENV:{_VENDOR}"},
        {"api_key": f"{_VENDOR} {_PLAIN}"},
        {"api_key": [_VENDOR]},
        {"kind": _VENDOR},
        {"limit_name": _PLAIN},
    ]
    return [{**good, "providers": {"vendor": {**provider, **one}}} for one in wrong]


async def test_no_secret_is_found_anywhere(database: str) -> None:
    with silent_port() as port:
        async with echoing_vendor() as vendor, _town(database, port) as town:
            await town.process.says("database_waiting")
            async with answered(port, database):
                await until_ready(town.client)
                admin, user, token = await _let_in(town)
                chatbots = await _configured(town, vendor, admin)
                # Every chatbot fails as its vendor does, and tells nobody what it was told.
                ended = [await town.end_of(chatbot, user) for chatbot in chatbots]
                assert set(ended) == {"failed"}
                await _asked_everything(town, user, token)
                await _crashed(town, admin, chatbots[0], user)
                metrics = await town.ask("GET", "/metrics", admin)
                assert 'code="upstream_refused"' in metrics.text
            # The database is away.
            assert (await town.ask("GET", "/api/sessions/x/queue", user)).status_code == 503
            # Each way waits until it is given up, so one of them per route, all at once.
            routes = [(method, path.format_map(defaultdict(lambda: _STREAM))) for method, path in OPERATIONS]
            await asyncio.gather(*(town.ask(*route, key) for route in routes for key in (admin, user)))
            async with answered(port, database):
                await until_ready(town.client)
                failures = "select count(*) from error_logs where code like 'upstream%'"
                async with asyncio.timeout(10):
                    while await town.database.fetchval(failures) < len(chatbots):
                        pass
                await town.look_into_the_tables()
                done = await town.process.stop()
            said = "\n".join([*done.err, *done.out])
            town.canaries.look("the log", said)
            for event in ("attempt_failed", "run_crashed", "request_crashed", "database_waiting"):
                assert event in said, f"it was not tried: {event}"


async def _let_in(town: Town) -> tuple[str, str, str]:
    """An administrator's key, a user's token, and the token of one of its streams."""
    admin = town.canaries.add("API key", await keys.create(town.database, "canary", ["admin"]))
    claims = {"iss": "us", "aud": "us", "sub": "ann", "exp": int(time()) + 3600}
    user = jwt.encode(claims, _ISSUER, algorithm="HS256")
    town.canaries.add("user's token", user.rpartition(".")[2])
    sealed = await town.database.fetchval("select convert_from(material, 'utf8') from signing_keys")
    material = Safe([MasterKey.of(_MASTER.encode())]).open(sealed, "signing")
    town.canaries.add("signing key", material)
    town.canaries.add("derived signing key", SigningKey.of(bytes.fromhex(material)).secret.hex())
    await _configure(town, admin, "first", _definition("http://127.0.0.1:9", "plain", "openai", _PLAIN))
    url = (await town.send("first", user))["streaming_url"]
    return admin, user, town.canaries.add("stream token", token_of(url))


async def _configure(town: Town, admin: str, chatbot: str, wanted: dict[str, Any]) -> None:
    url = f"/api/conversation-config/{chatbot}"
    assert (await town.ask("PUT", url, admin, json=wanted)).json()["changed"]
    # What an administrator is shown, too.
    assert (await town.ask("GET", url, admin)).json()["configuration"]["flowApiKeys"] == {"main": "configured"}


async def _configured(town: Town, vendor: str, admin: str) -> list[str]:
    chatbots: list[str] = []
    for (kind, fault), key in product(product(_KINDS, FAULTS), ("env:VENDOR_KEY", _PLAIN)):
        chatbots.append(chatbot := f"{kind}-{fault}-{len(chatbots)}")
        await _configure(town, admin, chatbot, _definition(vendor, fault, kind, key))
    for mistake in _mistakes(vendor):
        refused = await town.ask("PUT", "/api/conversation-config/mistake", admin, json=mistake)
        assert refused.status_code == 422, refused.text
    return chatbots


async def _asked_everything(town: Town, *secrets: str) -> None:
    for secret in secrets:
        for method, path, how in _requests(secret):
            await town.ask(method, path, **how)


async def _crashed(town: Town, admin: str, chatbot: str, user: str) -> None:
    """Bugs of ours, with their tracebacks: of a request, and of a run at its end."""
    for table, event in (("chats", "request_crashed"), ("usage_ledger", "run_crashed")):
        await town.database.execute(f"alter table {table} rename to gone")
        if event == "run_crashed":
            await town.send(chatbot, user)
        else:
            assert (await town.ask("GET", "/api/sessions/x/queue?user_id=ann", admin)).status_code == 500
        await town.process.says(event)
        await town.database.execute(f"alter table gone rename to {table}")


_KINDS = ("openai", "anthropic", "flowise")


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://ann:canary/word@127.0.0.1:1/db",
        "postgresql://ann:canary#word@127.0.0.1:1/db",
        "postgresql://ann:canary?word@127.0.0.1:1/db",
        "postgresql://ann:can[ary@127.0.0.1:1/db",
        "postgresql://ann:canary@127.0.0.1:1/db?sslmode=canary",
        "postgresql://ann:canary@127.0.0.1:1/db?target_session_attrs=canary",
        "postgresql://ann:canary@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/canary",
        "postgresql://ann:canary@127.0.0.1:1/db",
        "postgresql://ann:canary@canary.invalid/db",
        "postgresql://:canary,canary@:canary/",
    ],
)
async def test_no_part_of_a_database_url_is_said(dsn: str) -> None:
    said: list[str] = [finding.line() async for finding in examine(load(database_url=dsn))]
    with pytest.raises(Misconfigured) as caught:
        await wait_for_database(dsn, 0, said.append)
    said += [caught.value.detail, *traceback.format_exception(caught.value)]
    pool = await open_pool(dsn, 1)
    with pytest.raises((Misconfigured, OSError)) as failed:
        await pool.acquire()
    said += traceback.format_exception(failed.value)
    pool.terminate()
    assert len(said) > 4
    assert "canary" not in "".join(said).replace("canary.invalid", "").replace("test_canary", "")
