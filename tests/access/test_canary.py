"""A key that is sent everywhere, rightly and wrongly, is found nowhere: no answer, log line, metric or row (A7)."""

import asyncio
from collections import defaultdict
from typing import Any

import asyncpg
import httpx2

from app.access import keys
from app.operations import OPERATIONS
from tests.command import running
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
        async with asyncio.timeout(10):
            while not await look.fetchval("select count(*) from error_logs where code = 'internal_error'"):
                await asyncio.sleep(0.05)
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
