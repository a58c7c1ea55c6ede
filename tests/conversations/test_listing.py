"""Lists: every conversation once and in order, whatever the filters, however it is paged; and what is refused."""

from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from random import Random

import asyncpg
import httpx2
import pytest

from app.conversations import list_statements, pages
from app.postgres import open_connection
from tests.conversations import listed
from tests.serving import serving


@pytest.fixture
async def client(database: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    async with serving(database, drain_s=0, enable_background_jobs=False) as client:  # n8n is no source of ours
        yield client


_FIELDS = {"username": "username", "model": "model", "chatbot_id": "chatbotId", "source": "source"}


async def test_every_conversation_once_and_in_order_with_any_filter(client: httpx2.AsyncClient, database: str) -> None:
    chance = Random(6)
    rows = listed.rows(chance, 120)
    await listed.store(database, rows)
    for _ in range(40):
        filters: listed.Row = {
            name: chance.choice([row[name] for row in rows]) for name in _FIELDS if chance.random() < 0.35
        }
        since, until = sorted(listed.BEGAN + timedelta(minutes=chance.randrange(31)) for _ in range(2))
        wanted = [row for row in rows if all(not value or row[name] == value for name, value in filters.items())]
        if chance.random() < 0.4:
            filters |= {"from": since.isoformat(), "to": until.strftime("%Y-%m-%dT%H:%M:%SZ")}
            wanted = [row for row in wanted if since <= row["last"] < until]
        newest_first = chance.random() < 0.5
        entries = await listed.walk(
            client,
            **filters,
            size=chance.randint(1, 40),
            sort="-lastMessageTime" if newest_first else "lastMessageTime",
        )
        assert sorted(e["conversationId"] for e in entries) == sorted(row["conversation_id"] for row in wanted)
        times = [entry["lastMessageTime"] for entry in entries]
        assert times == sorted(times, reverse=newest_first)


async def test_pages_by_number_are_those_by_cursor(client: httpx2.AsyncClient, database: str) -> None:
    await listed.store(database, listed.rows(Random(1), 50))
    first = await listed.page(client, size=20)
    assert (first["page"], first["size"], first["total"], first["totalPages"]) == (1, 20, 50, 3)
    second = await listed.page(client, size=20, page=2)
    assert second["conversations"] == (await listed.page(client, size=20, cursor=first["nextCursor"]))["conversations"]
    last = await listed.page(client, size=20, page=3)
    assert (len(last["conversations"]), last["nextCursor"]) == (10, None)
    assert (await listed.page(client, page=4))["conversations"] == []
    assert (await client.get("/conversations", params={"size": 20})).json() == first


async def test_a_cursor_holds_while_conversations_come_and_move(client: httpx2.AsyncClient, database: str) -> None:
    """What does not move is listed once; what is new, or is spoken in again, comes before the cursor."""
    rows = listed.rows(Random(2), 40)
    await listed.store(database, rows)
    page = await listed.page(client, size=10)
    seen = [entry["conversationId"] for entry in page["conversations"]]
    connection = await asyncpg.connect(database)
    moved = rows[0]["conversation_id"]
    await connection.execute("update conversations set last_message_at = now() where conversation_id = $1", moved)
    await connection.execute(
        listed.INSERT, *({**rows[0], "conversation_id": "new", "last": datetime.now(UTC)}.values())
    )
    await connection.close()
    while page["nextCursor"]:
        page = await listed.page(client, size=10, cursor=page["nextCursor"])
        seen += [entry["conversationId"] for entry in page["conversations"]]
    assert len(seen) == len(set(seen))
    assert {row["conversation_id"] for row in rows} - set(seen) <= {moved}
    assert "new" not in seen


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"sort": ""}, "bad_parameter"),
        ({"page": "0"}, "bad_parameter"),
        ({"page": "-1"}, "bad_parameter"),
        ({"page": "NaN"}, "bad_parameter"),
        ({"page": "1e9"}, "bad_parameter"),
        ({"page": "1000000000"}, "page_too_deep"),
        ({"page": "9" * 300}, "bad_parameter"),
        ({"size": "0"}, "bad_parameter"),
        ({"size": "1000000000"}, "bad_parameter"),
        ({"size": "٣"}, "bad_parameter"),
        ({"size": ["5", "6"]}, "bad_parameter"),
        ({"size": ["x", ""]}, "bad_parameter"),
        ({"size": "200", "page": "52"}, "page_too_deep"),
        ({"cursor": "nonsense"}, "bad_cursor"),
        ({"cursor": "ZC4xLjEuMS4x", "sort": "lastMessageTime"}, "bad_cursor"),
        ({"cursor": "ZC45OTk5OTk5OTk5OTk5OTk5OTk5OTkuMS4xLjE"}, "bad_cursor"),
        ({"cursor": "é"}, "bad_cursor"),
        ({"sort": "username"}, "bad_parameter"),
        ({"from": "yesterday"}, "bad_parameter"),
        ({"to": "0001-01-01T00:00:00+23:59"}, "bad_parameter"),
        ({"model": "x" * 300}, "bad_parameter"),
        ({"username": "ann", "user_id": "bob"}, "bad_parameter"),
    ],
)
async def test_what_no_list_can_be_is_refused(client: httpx2.AsyncClient, params: listed.Row, code: str) -> None:
    response = await client.get("/api/messages/conversations", params=params)
    assert (response.status_code, response.json()["code"]) == (400, code)


async def test_statistics_of_the_first_days_there_are(client: httpx2.AsyncClient) -> None:
    for params in ({"to": "0001-01-15"}, {"to": "0001-01-01"}, {"from": "9999-12-31"}):
        assert (await client.get("/api/messages/statistics", params=params)).status_code in (200, 400)


async def test_one_user_is_named_once(client: httpx2.AsyncClient) -> None:
    for path in ("/api/messages/conversations", "/api/messages/statistics", "/api/sessions/s/queue"):
        response = await client.get(f"{path}?user_id=bob&user_id=ann")
        assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


async def test_names_that_no_conversation_has(client: httpx2.AsyncClient, database: str) -> None:
    await listed.store(database, listed.rows(Random(3), 5))
    for name in ("nobody", "%00", "\x00", "'; drop table conversations", "\ufffd"):
        assert (await listed.page(client, username=name))["conversations"] == []
    for name in ("nobody", "%00", "..%2f..", "x" * 300, "%ff"):
        response = await client.get(f"/api/messages/conversations/{name}")
        assert (response.status_code, response.json()["code"]) in (
            (404, "conversation_unknown"),
            (404, "route_unknown"),
        )


async def test_totals_are_counted_so_far_and_no_further(
    client: httpx2.AsyncClient, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await listed.store(database, [{**row, "username": "ann"} for row in listed.rows(Random(4), 12)])
    monkeypatch.setattr("app.conversations.listing.FAR", 10)
    page = await listed.page(client, username="ann", size=5)
    assert (page["total"], page["totalIsExact"]) == (11, False)
    page = await listed.page(client, size=5)
    assert (page["total"], page["totalIsExact"]) == (12, True)


@pytest.mark.parametrize("saved_since", [0, 3])
async def test_a_deleted_index_is_said_to_be(client: httpx2.AsyncClient, database: str, saved_since: int) -> None:
    await listed.store(database, listed.rows(Random(4), saved_since))
    connection = await asyncpg.connect(database)
    await connection.execute("update conversation_index set is_there = false")
    await connection.close()
    lists = [
        "/api/messages/conversations" + query for query in ("", "?username=ann", "?q=first", "?q=zebra", "?page=9")
    ]
    for path in (*lists, "/conversations", "/api/messages/conversations/c1"):
        response = await client.get(path)
        assert (response.status_code, response.json()["code"]) == (409, "index_missing")
        assert "/api/sync/init" in response.json()["detail"]


_PLANS: list[tuple[listed.Row, str]] = [
    ({}, "conversations_recent"),
    ({"username": "u1"}, "conversations_of_user"),
    ({"model": "m1"}, "conversations_of_model"),
    ({"chatbot_id": "b1"}, "conversations_of_chatbot"),
    ({"source": "s1"}, "conversations_of_source"),
    ({"since": listed.BEGAN}, "conversations_recent"),
    ({"username": "u1", "since": listed.BEGAN}, "conversations_of_user"),
]
_MANY = """
insert into conversations (source, username, conversation_id, chatbot_id, model, first_message_at, last_message_at,
    time_source, message_count, total_tokens)
select 's' || n % 3, 'u' || n % 3, n, 'b' || n % 3, 'm' || n % 3, now(), now() - n * interval '1 s', 'message', 1, 1
from generate_series(1, 20000) n
"""


async def test_lists_walk_an_index_and_sort_nothing(database: str) -> None:
    connection = await open_connection(database)
    await connection.execute(_MANY)
    await connection.execute("vacuum analyze conversations")
    for filters, index in _PLANS:
        for after in (None, pages.Place(listed.BEGAN, 7, pages.Total(1))):
            wanted = pages.Wanted(**filters)
            plan = await listed.plan(connection, list_statements.walking(wanted, pages.Slice(50, after)))
            assert index in plan, plan
            assert "Seq Scan" not in plan, plan
            walk = plan[plan.index("CTE page") : plan.index("CTE Scan")]
            assert "Sort" not in walk, plan
            assert "Index Only Scan Backward using messages_in_chat" in plan, plan
        if filters:
            counted = await listed.plan(connection, list_statements.counting_walked(wanted, words="", far=10_001))
            assert "Index Only Scan" in counted, counted
            assert "Seq Scan" not in counted, counted
    await connection.close()
