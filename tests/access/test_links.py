"""Streaming URLs where requests are asked for credentials: they read their one stream, for a time, and nothing else."""

import asyncio
import io
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from app.access import signing
from app.access.demands import BY_TOKEN, demands
from app.access.signing import Signing, given_keys
from app.access.stream_token import SigningKey, StreamToken, signed
from app.errors import Misconfigured
from app.postgres import Pool, open_pool
from app.safe import NO_SAFE
from app.settings import load
from app.telemetry import configure_logging
from tests.access.test_guard import _url as url_of
from tests.access.test_guard import bearer, key_with
from tests.access.test_stream_token import token_of
from tests.command import run
from tests.house import House, Open
from tests.sse import frames, read_stream

MATERIAL = "0123456789abcdef" * 4
SSE = {"Accept": "text/event-stream"}
MODELS = {"mute": "demo?fault=silent", "steady": "demo?delay_ms=50&tokens=5000"}


@pytest.fixture
async def home(house: Open, database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[House, None]:
    """Asks for keys; its client has none, but what it posts comes with one."""
    monkeypatch.setenv("TEST_SIGNING_KEY", MATERIAL)
    async with house(MODELS, auth="keys", signing_key="env:TEST_SIGNING_KEY", poll_s=0.05) as home:
        yield home


async def asked(home: House, database: str, chatbot: str = "quick", **fields: Any) -> dict[str, Any]:
    """The answer to a message that somebody with a key sends."""
    body = {"user_id": "ann", "chatbot_id": chatbot, "message_text": "Hello", **fields}
    key = bearer(await key_with(database, "process"))
    response = await home.client.post("/api/process-message", json=body, headers=key)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def forged(stream_id: str, *, for_s: float = 60, material: str = MATERIAL) -> str:
    """A token as the server with that key would make it."""
    return signed(SigningKey.of(material.encode()), UUID(stream_id), until=int(time() + for_s))


# -- what a token opens


async def test_a_streaming_url_is_enough_to_read_the_stream_any_number_of_times(home: House, database: str) -> None:
    answer = await asked(home, database)
    url = answer["streaming_url"]
    assert url.startswith(f"/api/stream-events/{answer['streaming_session_id']}?token=")
    for _ in range(2):
        got = await read_stream(home.client, url)
        assert [frame.number for frame in got] == list(range(1, len(got) + 1))
        assert got[-1].event == "stream_end"
    page = (await home.client.get(f"{url}&after=3&wait=1")).json()
    assert [event["id"] for event in page["events"]] == list(range(4, len(got) + 1))
    assert (await home.client.head(url)).status_code == 200
    assert (await home.client.get(url, headers={**SSE, "Last-Event-ID": got[-1].id})).status_code == 204


async def test_tokens_read_several_streams_over_one_connection(home: House, database: str) -> None:
    answers = [await asked(home, database) for _ in range(3)]
    streams = [answer["streaming_session_id"] for answer in answers]
    tokens = [token_of(answer["streaming_url"]) for answer in answers]
    for query in (f"token={','.join(tokens)}", "&".join(f"token={token}" for token in tokens)):
        url = f"/api/stream?streams={','.join(streams)}&{query}"
        async with home.client.stream("GET", url) as response:
            ended = [f.stream async for f in frames(response, several=True) if f.event == "stream_end"]
        assert sorted(ended) == sorted(streams)
    for few in (tokens[:2], [tokens[0]]):
        response = await home.client.get("/api/stream", params={"streams": ",".join(streams), "token": ",".join(few)})
        assert (response.status_code, response.json()["code"]) == (404, "stream_unknown")


async def test_a5_another_streams_token_meets_an_unknown_stream(home: House, database: str) -> None:
    mine, other = [await asked(home, database) for _ in range(2)]
    url = mine["streaming_url"].replace(mine["streaming_session_id"], other["streaming_session_id"])
    for headers in ({}, SSE):
        response = await home.client.get(url, headers=headers)
        assert (response.status_code, response.json()["code"]) == (404, "stream_unknown")
    unknown = "0197c1a2-7b3c-7def-8a01-23456789abcd"
    none = await home.client.get(f"/api/stream-events/{unknown}?token={forged(unknown)}")
    told = response.json()["detail"].replace(other["streaming_session_id"], "ID")
    assert none.status_code == 404
    assert none.json()["detail"].replace(unknown, "ID") == told


@pytest.mark.parametrize("headers", [{}, SSE])
async def test_a5_what_is_tampered_with_expired_or_another_servers_is_refused(
    home: House, database: str, headers: dict[str, str]
) -> None:
    stream = (await asked(home, database))["streaming_session_id"]
    good = forged(stream)
    changed = good[:-1] + ("A" if good[-1] == "-" else "-")
    bad = {"": "credentials_missing", "%": "token_invalid", changed: "token_invalid"}
    bad |= {forged(stream, for_s=-1): "token_expired", forged(stream, material=MATERIAL[::-1]): "token_invalid"}
    for token, code in bad.items():
        for path in (f"/api/stream-events/{stream}?", f"/api/stream?streams={stream}&"):
            response = await home.client.get(f"{path}token={token}", headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, code)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert not token or token not in response.text + str(response.headers)


async def test_a_token_opens_no_other_route_and_stops_nothing(home: House, database: str) -> None:
    answer = await asked(home, database, "mute")
    token = token_of(answer["streaming_url"])
    assert {entry for entry, need in demands().items() if need == "read"} >= BY_TOKEN
    for (method, path), need in demands().items():
        if need == "public" or (method, path) in BY_TOKEN:
            continue
        url = url_of(path.partition("?")[0]).replace(
            "0197c1a2-7b3c-7def-8a01-23456789abcd", answer["streaming_session_id"]
        )
        for headers in ({}, bearer(token), {"X-API-Key": token}):
            response = await home.client.request(method, url, params={"token": token, "verbose": ""}, headers=headers)
            assert response.status_code == 401, (method, path)
    assert (await home.client.get(answer["streaming_url"])).json()["session_status"] == "active"


async def test_credentials_count_where_a_token_does_not(home: House, database: str) -> None:
    stream = (await asked(home, database))["streaming_session_id"]
    expired, url = forged(stream, for_s=-1), f"/api/stream-events/{stream}"
    reader = bearer(await key_with(database, "read"))
    sender = bearer(await key_with(database, "process"))
    assert (await home.client.get(f"{url}?token={expired}", headers=reader)).status_code == 200
    assert (await home.client.get(f"{url}?token={expired}", headers=sender)).status_code == 403
    # A proxy's own password does no harm to a token that holds.
    basic = {"Authorization": "Basic c29tZWJvZHk6ZWxzZQ=="}
    assert (await home.client.get(f"{url}?token={forged(stream)}", headers=basic)).status_code == 200
    assert (await home.client.get(f"{url}?token={expired}", headers=basic)).status_code == 401


# -- where URLs are told


async def test_a_repeated_request_is_told_the_same_url(home: House, database: str) -> None:
    key = {**bearer(await key_with(database, "process")), "Idempotency-Key": "once"}
    body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
    first, again = [await home.client.post("/api/process-message", json=body, headers=key) for _ in range(2)]
    assert again.headers["idempotent-replayed"] == "true"
    assert first.json() == again.json()
    assert (await home.client.get(again.json()["streaming_url"])).status_code == 200


async def test_what_waits_has_a_url_that_outlives_what_is_in_front_of_it(home: House, database: str) -> None:
    session = (await asked(home, database, "mute"))["session_id"]
    waiting = await asked(home, database, session_id=session)
    assert waiting["status"] == "queued"
    reader = bearer(await key_with(database, "read"))
    queue = await home.client.get(f"/api/sessions/{session}/queue?user_id=ann", headers=reader)
    url = queue.json()["messages"][0]["streaming_url"]
    assert url == waiting["streaming_url"]
    assert (await home.client.get(url)).json()["session_status"] == "queued"
    token = StreamToken.parse(token_of(url))
    assert token is not None
    assert token.until - time() > 20 * 300


async def test_open_to_anybody_urls_are_plain_and_tokens_are_not_looked_at(house: Open) -> None:
    async with house() as home:
        answer, _ = await home.ask()
        assert answer["streaming_url"] == f"/api/stream-events/{answer['streaming_session_id']}"
        assert (await home.client.get(answer["streaming_url"] + "?token=nonsense")).status_code == 200


# -- the end


async def test_a5_a_connection_ends_with_its_token_at_a_frame_boundary(home: House, database: str) -> None:
    """The strict reader fails on anything that is cut."""
    stream = (await asked(home, database, "steady"))["streaming_session_id"]
    token = forged(stream, for_s=2)
    until = StreamToken.parse(token)
    assert until is not None
    url = f"/api/stream-events/{stream}?token={token}"
    async with asyncio.timeout(20), home.client.stream("GET", url, headers=SSE) as response:
        got = [frame async for frame in frames(response)]
    assert until.until - 0.5 <= time() < until.until + 3
    assert got[-1].event == "token"
    response = await home.client.get(url, headers=SSE)
    assert (response.status_code, response.json()["code"]) == (401, "token_expired")
    rest = await home.client.get(f"/api/stream-events/{stream}?token={forged(stream)}&after={got[-1].number}&limit=1")
    assert rest.json()["events"][0]["id"] == got[-1].number + 1


async def test_a_long_poll_ends_with_its_token(home: House, database: str) -> None:
    stream = (await asked(home, database, "mute"))["streaming_session_id"]
    url = f"/api/stream-events/{stream}"
    async with asyncio.timeout(10):
        while (await home.client.get(f"{url}?token={forged(stream)}&after=1&wait=1")).json()["last_event_id"] < 2:
            pass
    began = time()
    response = await home.client.get(f"{url}?token={forged(stream, for_s=2)}&after=2&wait=8")
    assert (response.status_code, response.json()["events"]) == (200, [])
    assert time() - began < 5


# -- it appears nowhere


@contextmanager
def everything_logged() -> Iterator[io.StringIO]:
    root, heard = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers, root.level
    configure_logging("debug", "json", stream=heard)
    try:
        yield heard
    finally:
        root.handlers = handlers
        root.setLevel(level)


async def test_a5_a_token_is_in_no_log_line_error_row_or_metric(home: House, database: str) -> None:
    with everything_logged() as heard:
        answer = await asked(home, database)
        stream, url = answer["streaming_session_id"], answer["streaming_url"]
        token = token_of(url)
        assert (await home.client.get(url)).status_code == 200
        tokens = [token, forged(stream, for_s=-1), token[:-4] + "AAAA"]
        statuses = set()
        for each in tokens:
            for query in ("", "&after=x", "&after=999999", "&limit=x"):
                for path in (f"/api/stream-events/{stream}?", f"/api/stream?streams={stream}&", "/nothing?", "/docs?"):
                    statuses.add((await home.client.get(f"{path}token={each}{query}")).status_code)
            statuses.add((await home.client.post(f"/api/stream-events/{stream}/cancel?token={each}")).status_code)
            statuses.add((await home.client.post(f"/api/stream-events/{stream}?token={each}")).status_code)
        await home.database.execute("alter table streaming_events rename to streaming_events_gone")
        statuses.add((await home.client.get(url)).status_code)
        await home.database.execute("alter table streaming_events_gone rename to streaming_events")
        assert statuses >= {200, 400, 401, 404, 405, 500}
        admin = bearer(await key_with(database, "admin"))
        metrics = (await home.client.get("/metrics", headers=admin)).text
        await home.row("select 1 from error_logs where code = 'internal_error'")
        rows = str([dict(row) for row in await home.database.fetch("select * from error_logs")])
    said = heard.getvalue()
    assert "request_crashed" in said
    for each in (*tokens, MATERIAL):
        assert not any(each[:40] in text for text in (said, rows, metrics))


async def test_pages_send_no_address_on(home: House) -> None:
    assert (await home.client.get("/docs")).headers["referrer-policy"] == "no-referrer"


# -- the keys


@pytest.fixture
async def pool(database: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(database, 5)
    yield pool
    await pool.close()


async def test_without_a_setting_all_replicas_share_a_key_that_one_of_them_makes(pool: Pool) -> None:
    replicas = [Signing(pool) for _ in range(4)]
    assert replicas[0].first is None
    await asyncio.gather(*(replica.run_once() for replica in replicas))
    firsts = {replica.first for replica in replicas}
    assert len(firsts) == 1
    await Signing(pool).run_once()
    assert await pool.fetchval("select count(*) from signing_keys") == 1
    assert len(await pool.fetchval("select material from signing_keys")) == 32


async def test_after_a_renewal_the_key_before_is_good_and_the_one_before_that_is_not(pool: Pool, database: str) -> None:
    old = Signing(pool, look_s=0)
    await old.run_once()
    first = old.first
    assert first is not None
    done = await run("keys", "renew-signing", DATABASE_URL=database)
    assert (done.code, len(done.out)) == (0, 1)
    new = Signing(pool)
    await new.run_once()
    second = new.first
    assert second is not None
    assert second != first
    assert await new.find(first.id) == first
    # A replica that has not looked yet finds the new one when it meets it.
    assert old.first == first
    assert await old.find(second.id) == second
    assert old.first == second
    async with pool.acquire() as connection:
        await signing.renew(connection, NO_SAFE)
    await new.run_once()
    assert await new.find(first.id) is None
    assert await new.find(second.id) == second
    assert await pool.fetchval("select count(*) from signing_keys") == 2


async def test_made_up_key_ids_look_into_the_table_now_and_then_only(pool: Pool) -> None:
    signing_ = Signing(pool)
    await signing_.run_once()
    await pool.execute("alter table signing_keys rename to gone")
    for _ in range(20):
        assert await signing_.find(b"none") is None
    with pytest.raises(asyncpg.UndefinedTableError):
        await Signing(pool).find(b"none")


async def test_a_server_without_a_setting_keeps_its_key_over_a_restart(house: Open, database: str) -> None:
    async with house(auth="keys") as home:
        url = (await asked(home, database))["streaming_url"]
        assert (await read_stream(home.client, url))[-1].event == "stream_end"
    async with house(auth="keys") as home:
        assert (await home.client.get(url)).status_code == 200


async def test_keys_are_read_from_where_the_setting_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(MATERIAL[::-1] + "\n")
    monkeypatch.setenv("NEW", MATERIAL)
    keys = given_keys(load(signing_key=f"env:NEW, file:{file}"))
    assert keys == [SigningKey.of(MATERIAL.encode()), SigningKey.of(MATERIAL[::-1].encode())]
    assert given_keys(load()) == []


@pytest.mark.parametrize("given", [MATERIAL, "env:SHORT", "env:NONE", "file:/nowhere", f"env:GOOD,{MATERIAL}"])
async def test_a_key_that_is_none_stops_the_start_and_is_not_shown(given: str, database: str) -> None:
    variables = {"PARLEY_SIGNING_KEY": given, "SHORT": "f00dcafe" * 3, "GOOD": MATERIAL[::-1]}
    done = await run("serve", DATABASE_URL=database, PARLEY_PORT="0", PARLEY_AUTH="keys", **variables)
    assert (done.code, len(done.err)) == (2, 1)
    assert not any(value in done.err[0] for value in (MATERIAL, *list(variables.values())[1:]))
    with pytest.raises(Misconfigured):
        given_keys(load(signing_key="anything"))


async def test_a_key_of_a_setting_is_renewed_there(database: str) -> None:
    done = await run("keys", "renew-signing", DATABASE_URL=database, PARLEY_SIGNING_KEY="env:X")
    assert (done.code, "PARLEY_SIGNING_KEY" in done.err[0]) == (2, True)
