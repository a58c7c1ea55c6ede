"""Erasing a user through a real gateway: afterwards no table has their name or a word of theirs."""

import asyncio
from typing import Any

import asyncpg
import httpx2
import orjson
import pytest

from app.access import keys
from app.access.audit import fingerprint
from app.chats.usage import UsageDays
from app.demo.server import demo_provider
from app.flows import chatbots, erasure, file, user_endpoints
from app.flows.stopping import Stopping
from app.postgres import open_pool
from tests.access.issuer import token
from tests.access.users import as_user, serving_users
from tests.chats.pictures import base64_of, picture
from tests.conversations.worded import differing, follow
from tests.house import Open
from tests.sync.test_gateway import add, delete, put, sync

_TABLES = """
select c.oid::regclass::text as name from pg_class c
where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p') and not c.relispartition order by 1
"""
# As every replica writes them now and then.
_HOURS = """
insert into sync_hours (user_id, hour, exchanges, refused, mutations, rows_written, conflicts, resyncs, bytes_up,
    bytes_down, duration_ms)
select u, now(), 1, 0, 0, 0, 0, 0, 0, 0, 0 from unnest($1::text[]) as u
"""
# Of nobody in particular, in several blocks.
_ERROR_ROWS = """
insert into error_logs (id, category, code, message)
select gen_random_uuid(), 'internal', 'x', repeat('x', 500) from generate_series(1, 60)
"""
_ANN, _BOB, _WORD = "ann 4711", "bob-0815", "xyzzy"


async def _rows_with(database: asyncpg.Connection, *needles: str) -> dict[str, list[str]]:
    """Of all tables the rows that have one of these anywhere."""
    found = {}
    for table in [row["name"] for row in await database.fetch(_TABLES)]:
        rows = [row[0] for row in await database.fetch(f"select t::text from {table} t")]
        if those := sorted(row for row in rows if any(needle in row for needle in needles)):
            found[table] = those
    return found


async def _bots(connection: asyncpg.Connection, demo: str) -> None:
    models = {
        "slow": "demo?delay_ms=20&tokens=100000",
        "slowest": "demo?delay_ms=2000&tokens=100000",
        "quick": "demo?delay_ms=0&tokens=3",
    }
    flows: dict[str, Any] = {
        name: {"provider": "demo", "model": model, "images": True} for name, model in models.items()
    }
    bots = {name: {"flows": {"main": flow}} for name, flow in flows.items()}
    wanted = {"providers": {"demo": {"kind": "openai", "base_url": demo}}, "chatbots": bots}
    await chatbots.apply(connection, file.parse(str(wanted)))


async def _lived(client: httpx2.AsyncClient, user: str, word: str) -> None:
    """Something of this user in as many tables as there are."""
    headers = as_user(user)

    async def posted(path: str, body: Any, **more: str) -> Any:
        answer = await client.post(path, json=body, headers={**headers, **more})
        assert answer.status_code == 200, answer.text
        return answer.json()

    image = {"chatbot_id": "quick", "image_data": {"data": base64_of(picture()), "name": f"{word}.png"}}
    image_id = (await posted("/api/upload-image", image))["image"]["id"]
    said = {"message_text": f"What is {word}?", "session_id": f"{word}-s"}
    ended = await posted(
        "/api/process-message",
        {**said, "chatbot_id": "quick", "image_id": image_id},
        **{"Idempotency-Key": f"key-{word}"},
    )
    url = ended["streaming_url"]
    cursor, page = 0, {"has_more": True, "last_event_id": 0}
    while page["has_more"]:
        page = (await client.get(url, params={"after": cursor, "wait": 5}, headers=headers)).json()
        cursor = page["last_event_id"]
    for _ in range(2):
        await posted("/api/process-message", {**said, "chatbot_id": "slow"})
    ops = [put(f"{word}-c", f"{word} one"), add(f"{word}-m", f"{word}-c", f"{word} said")]
    old, gone = [put(f"{word}-old")], [delete(f"{word}-old", 1)]
    push = [{"mid": mid, "ops": one} for mid, one in enumerate((ops, old), 1)]
    await posted("/api/chat/sync", {"client": f"{word}-phone", "push": push})
    await posted("/api/chat/sync", {"client": f"{word}-phone", "push": [{"mid": 3, "ops": gone}]})
    ops = [put(f"{word}-c", f"{word} two", at=5), delete(f"{word}-gone", 1)]
    await posted("/api/chat/sync", {"client": f"{word}-desk", "push": [{"mid": 1, "ops": ops}]})
    wrong = await client.get("/api/chats", params={"size": "x"}, headers=headers)
    assert wrong.status_code == 400


async def test_no_table_has_the_users_name_or_words_afterwards(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with (
        demo_provider() as demo,
        serving_users(database, quota_user_messages=50, search_messages=True) as client,
    ):
        await _bots(connection, demo)
        await _lived(client, _ANN, _WORD)
        await _lived(client, _BOB, "plugh")
        await connection.execute(_HOURS, [_ANN, _BOB])
        async with asyncio.timeout(10):
            while await connection.fetchval("select count(*) from error_logs") < 2:
                await asyncio.sleep(0.02)
        pool = await open_pool(database, 1)
        await UsageDays(pool).run_once()
        pool.terminate()
        used = "select sum(calls), sum(prompt_tokens) from user_usage_daily"
        daily = await connection.fetch(used)
        standing = orjson.dumps({"place": [_ANN, "c"]}).decode()
        await connection.execute(
            "insert into conversation_rounds (source, place) values ('parley', $1) "
            "on conflict (source) do update set place = excluded.place",
            standing,
        )
        while await differing(connection):
            await follow(database)
        before = await _rows_with(connection, _ANN, _WORD)
        assert {"message_words", "message_word_users"} <= before.keys()
        assert {
            "chats",
            "messages",
            "images",
            "streaming_sessions",
            "queued_messages",
            "chat_versions",
        } <= before.keys()
        assert {"idempotency_keys", "error_logs", "quota_usage", "conversation_days", "sync_head"} <= before.keys()
        assert {"audit", "sync_hours"} <= before.keys()
        bobs = await _rows_with(connection, _BOB)
        usage = await connection.fetchval("select sum(prompt_tokens + completion_tokens) from usage_ledger")

        answer = await client.delete(f"/api/users/{_ANN}", headers=as_user(_ANN))
        assert (answer.status_code, answer.json()) == (200, {"success": True, "erased": True}), answer.text

        assert await _rows_with(connection, _ANN, _WORD) == {}
        after = await _rows_with(connection, _BOB)
        still = ("chats", "images", "queued_messages", "chat_versions", "quota_usage", "error_logs")
        assert {name: after[name] for name in still} == {name: bobs[name] for name in still}
        streams = "select count(*) from streaming_events where stream_id not in (select id from streaming_sessions)"
        assert await connection.fetchval(streams) == 0
        # What it has cost is known, and nobody's; her run under way may have cost something until it was stopped.
        spent = "select sum(prompt_tokens + completion_tokens) from usage_ledger where user_id in ('', $1)"
        assert await connection.fetchval(spent, _BOB) >= usage
        assert await connection.fetchval("select count(*) from usage_ledger where user_id = ''") >= 1
        assert await connection.fetch(used) == daily
        assert {name: after[name] for name in ("audit", "sync_hours")} == {
            name: bobs[name] for name in ("audit", "sync_hours")
        }
        noted = await connection.fetchrow("select actor, target from audit where action = 'user.erase'")
        assert noted is not None
        assert tuple(noted) == (fingerprint(_ANN), fingerprint(_ANN))
        counts = "select (select sum(conversations) from conversation_counts) = (select count(*) from conversations)"
        assert await connection.fetchval(counts)

        # Who comes back begins anew.
        empty = {"client": f"{_WORD}-phone", "push": []}
        fresh = await client.post("/api/chat/sync", json=empty, headers=as_user(_ANN))
        assert (fresh.json()["chats"], fresh.json()["bootstrap"]) == ([], True)
    await connection.close()


async def test_only_oneself_or_an_administrator(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with serving_users(database) as client:
        key = await keys.create(connection, "a back end", ["sync"])
        admin = await keys.create(connection, "an operator", ["admin"])
        push = {"client": "phone", "push": [{"mid": 1, "ops": [put("c")]}]}

        async def erase(who: str, whom: str, **params: str) -> tuple[int, str | None]:
            answer = await client.delete(f"/api/users/{whom}", params=params, headers=as_user(who))
            return answer.status_code, answer.json().get("code")

        for user in ("ann", "bob", "eve"):
            assert (await client.post("/api/chat/sync", json=push, headers=as_user(user))).status_code == 200
        for whom in ("ann", "nobody"):
            assert await erase("bob", whom) == (404, "user_unknown")
            # What cannot be undone is not for a key of a front end, whomever it says that it acts for.
            for params in ({}, {"user_id": "bob"}, {"user_id": whom}):
                assert await erase(key, whom, **params) == (403, "scope_missing")
        reader = {"Authorization": f"Bearer {token('two', 'ES256', sub='ann', scope='read')}"}
        refused = (await client.delete("/api/users/ann", headers=reader)).json()
        assert (refused["code"], refused["scope"]) == ("scope_missing", "sync")
        assert await erase("bob", "ann", user_id="ann") == (403, "user_mismatch")
        assert await connection.fetchval("select count(*) from chats") == 3
        assert await erase("ann", "ann") == (200, None)
        assert await erase(admin, "eve") == (200, None)
        assert [row[0] for row in await connection.fetch("select user_id from chats")] == ["bob"]
        actors = await connection.fetch("select actor, target from audit order by id")
        assert [row["target"] for row in actors] == [fingerprint("ann"), fingerprint("eve")]
        assert actors[0]["actor"] == fingerprint("ann")
        assert actors[1]["actor"].startswith("key:")
    await connection.close()


def _without_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would do it in others' stead."""

    async def nothing(self: erasure.Erasure) -> int:
        return 0

    monkeypatch.setattr(erasure.Erasure, "run_once", nothing)


async def test_an_administrator_with_a_users_token_stops_what_waits_and_runs_of_somebody_else(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_job(monkeypatch)
    connection = await asyncpg.connect(database)
    async with demo_provider() as demo, serving_users(database) as client:
        await _bots(connection, demo)
        said = {"chatbot_id": "slowest", "session_id": "s", "message_text": "What?"}
        for _ in range(3):
            posted = await client.post("/api/process-message", json=said, headers=as_user("bob"))
            assert posted.status_code == 200, posted.text
        admin = {"Authorization": f"Bearer {token('two', 'ES256', sub='root', scope='parley:admin')}"}
        async with asyncio.timeout(20):
            answer = await client.delete("/api/users/bob", headers=admin)
        assert (answer.status_code, answer.json()["erased"]) == (200, True)
        assert set(await _rows_with(connection, "bob")) == set()
    await connection.close()


async def test_two_at_once_end_well(database: str) -> None:
    connection = await asyncpg.connect(database)
    async with serving_users(database) as client:
        push = {"client": "phone", "push": [{"mid": 1, "ops": [put("c")]}]}
        assert (await client.post("/api/chat/sync", json=push, headers=as_user("ann"))).status_code == 200
        # Whoever counts this pass finds that another has come to the end.
        await connection.execute(
            "create function nothing() returns trigger language plpgsql as 'begin return null; end';"
            "create trigger gone before update on erasures for each row execute function nothing()"
        )
        assert (await client.delete("/api/users/ann", headers=as_user("ann"))).status_code == 200
    await connection.close()


async def test_what_was_cut_short_goes_on_by_itself(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house() as home:
        for user in ("ann", "bob"):
            await sync(home.client, "phone", [put("c"), add("m")], user=user)
        with monkeypatch.context() as patched:
            patched.setattr(user_endpoints, "_PATIENCE_S", -1.0)
            for _ in range(2):
                answer = await home.client.delete("/api/users/ann", params={"user_id": "ann"})
                assert (answer.status_code, answer.json()["erased"]) == (202, False)
        assert await home.database.fetchval("select user_id from erasures") == "ann"
        assert await home.count("audit") == 1
        await home.database.execute("delete from job_runs")
        async with asyncio.timeout(20):
            while await home.count("erasures"):
                await asyncio.sleep(0.05)
        assert await home.database.fetchval("select string_agg(distinct user_id, ',') from messages") == "bob"
        listed = await home.database.fetch("select username, conversation_id from conversations")
        assert [tuple(row) for row in listed] == [("bob", "c")]


async def test_every_pass_goes_on_where_the_last_one_stood(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_job(monkeypatch)
    monkeypatch.setattr(user_endpoints, "_PATIENCE_S", -1.0)
    monkeypatch.setattr(erasure, "_BLOCKS", 1)
    async with house() as home:
        await sync(home.client, "phone", [put("c"), add("m")], user="ann")
        await home.database.execute(_ERROR_ROWS)
        places = []
        for _ in range(100):
            answer = await home.client.delete("/api/users/ann")
            if answer.json()["erased"]:
                break
            places.append(await home.database.fetchval("select walk || ' ' || block from erasures"))
        assert answer.json()["erased"]
        assert {"error_logs 1", "error_logs 2", "error_logs 3"} <= set(places)
        assert await home.database.fetchval("select count(*) from messages") == 0


async def test_a_run_that_does_not_end_keeps_nothing_else(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Stopping, stream_id: Any, *, owner: str) -> None:
        pass

    _without_job(monkeypatch)
    monkeypatch.setattr(Stopping, "stop", nothing)
    async with house({"slowest": "demo?delay_ms=2000&tokens=100000"}) as home:
        await sync(home.client, "phone", [put("c"), add("m")], user="ann")
        accepted = (await home.post("slowest")).json()
        answer = await home.client.delete("/api/users/ann")
        assert (answer.status_code, answer.json()["erased"]) == (202, False)
        assert await home.count("chats") == await home.count("messages") == 0
        # What still runs long after began later.
        await home.database.execute("update erasures set created_at = now() - interval '11 minutes'")
        assert (await home.client.delete("/api/users/ann")).status_code == 200
        monkeypatch.undo()
        await home.client.post(f"/api/stream-events/{accepted['streaming_session_id']}/cancel")


async def test_one_at_a_time_is_waited_for(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def held(self: erasure.Erasure, one: Any) -> bool:
        began.set()
        await go_on.wait()
        return True

    _without_job(monkeypatch)
    monkeypatch.setattr(erasure.Erasure, "_pass", held)
    async with house() as home, asyncio.timeout(10):
        first = asyncio.create_task(home.client.delete("/api/users/ann"))
        await began.wait()
        for user in ("bob", "ann"):
            assert (await home.client.delete(f"/api/users/{user}")).status_code == 202
        assert await home.count("erasures") == 2
        go_on.set()
        assert (await first).status_code == 200


async def test_whom_nobody_tried_for_longest_is_tried_first(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    async def late(self: erasure.Erasure, one: Any) -> bool:
        tried.append(one.user_id)
        raise erasure._OutOfTime

    monkeypatch.setattr(erasure.Erasure, "_pass", late)
    monkeypatch.setattr(erasure, "_USERS", 1)
    nobody: Any = None
    pool = await open_pool(database, 1)
    await pool.execute("insert into erasures (user_id) values ('a'), ('b')")
    for _ in range(4):
        await erasure.Erasure(pool, nobody, nobody).run_once()
    pool.terminate()
    assert sorted(tried[:2]) == ["a", "b"]
    assert tried[:2] == tried[2:]


@pytest.mark.parametrize(("table", "statement"), [*erasure._WALKS.items(), ("streaming_sessions", erasure._STREAMS)])
async def test_tables_without_an_index_are_read_a_range_of_blocks_at_a_time(
    database: str, table: str, statement: str
) -> None:
    connection = await asyncpg.connect(database)
    # An empty table is read whole by any means.
    await connection.execute("set enable_seqscan = off; set enable_indexscan = off; set enable_bitmapscan = off")
    values = ("ann", (0, 0), (9, 0), ["x"])[: 4 if "$4" in statement else 3]
    plan = [row[0] for row in await connection.fetch(f"explain (costs off) {statement}", *values)]
    await connection.close()
    assert any(f"Tid Range Scan on {table}" in line for line in plan), plan
