"""What exchanges come to: a line for each, metrics that name no user, a user's hours, and deletions on record."""

import asyncpg
from structlog.testing import capture_logs

from app.access import audit
from app.postgres import open_pool
from app.sync.figures import MOST_USERS, Figures
from app.telemetry import Metrics
from tests.access.users import as_user, serving_users
from tests.house import Open
from tests.sync.test_gateway import add, delete, put, sync

_HEADS = "insert into sync_head (user_id) select * from unnest($1::text[])"


def _value(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name} "))


async def test_each_exchange_is_a_line_and_is_counted_without_its_user(house: Open) -> None:
    async with house() as home:
        with capture_logs() as lines:
            first = await sync(home.client, "phone", [put("c"), add("m")], [add("m", content="Other words")])
            await sync(home.client, "phone", [put("c"), add("m")], [add("m", content="Other words")])
            failed = add("n", content="Broken off", status="failed")
            await sync(home.client, "phone", [failed], first=3, cursor=first["cursor"], failed=True)
            await sync(home.client, "phone", [add("n", content="Whole")], first=4, failed=True)
            await sync(home.client, "desk", cursor="5b6f1f0a6a55.1")
            await home.client.post("/api/chat/sync", json={"client": "new", "user_id": "ann", "push": "?"})
            await home.client.post("/api/chat/sync", content=b"{")
        told = [line for line in lines if line["event"] == "chats_synchronised"]
        assert [line["outcome"] for line in told] == ["done"] * 5 + ["invalid_request", "invalid_json"]
        pushed, again, broken, mended, anew = told[:5]
        assert (pushed["client"], pushed["mutations"], pushed["rows"], pushed["bootstrap"]) == ("phone", 2, 3, "new")
        assert (pushed["conflicts"], pushed["messages"]) == ({"forked": 1}, 2)
        assert pushed["up"] > 100 < pushed["down"]
        assert not {"mutations", "rows", "conflicts"} & again.keys(), "it was there already"
        assert (broken["failed"], mended["mended"], anew["bootstrap"]) == (1, 1, "epoch")
        assert "words" not in str(told)
        metrics = (await home.client.get("/metrics")).text
        for name, value in (
            ('parley_sync_exchanges_total{outcome="done"}', 5),
            ('parley_sync_exchanges_total{outcome="invalid_json"}', 1),
            ("parley_sync_seconds_count", 7),
            ("parley_sync_mutations_sum", 4),
            ("parley_sync_rows_sum", 5),
            ('parley_sync_conflicts_total{status="forked"}', 1),
            ('parley_sync_bootstraps_total{why="epoch"}', 1),
            ('parley_sync_failed_messages_total{what="brought"}', 1),
            ('parley_sync_failed_messages_total{what="mended"}', 1),
        ):
            assert _value(metrics, name) == value, name
        assert _value(metrics, 'parley_sync_bytes_total{direction="up"}') == sum(line["up"] for line in told)
        assert "ann" not in [word.strip('"') for word in metrics.replace("=", " ").split()]


async def test_a_users_hours_are_written_when_the_server_leaves(house: Open, database: str) -> None:
    async with house() as home:
        for mid in range(1, 4):
            await sync(home.client, "phone", [add(f"m{mid}")], first=mid)
        await home.client.post(
            "/api/chat/sync", json={"client": "new", "user_id": "ann", "push": [{"mid": 7, "ops": []}]}
        )
        await sync(home.client, "phone", user="bob")
    look = await asyncpg.connect(database)
    rows = await look.fetch("select *, hour = date_trunc('hour', hour) as whole from sync_hours order by user_id")
    assert [row["user_id"] for row in rows] == ["ann", "bob"]
    ann, bob = rows
    assert (ann["exchanges"], ann["refused"], ann["mutations"], ann["rows_written"]) == (4, 1, 3, 4)
    assert (bob["exchanges"], bob["mutations"], bob["whole"]) == (1, 0, True)
    assert (ann["bytes_up"] > 500, ann["bytes_down"] > 500, ann["duration_ms"] > 0) == (True, True, True)
    await look.close()


async def test_hours_add_up_survive_a_failure_and_are_bounded(database: str) -> None:
    pool = await open_pool(database, 2)
    figures = Figures(pool, Metrics())

    def note(user_id: str, times: int = 1) -> None:
        for _ in range(times):
            with figures.exchange() as one:
                one.user_id = user_id

    await pool.execute(_HEADS, ["ann"])
    note("ann")
    note("madeup")
    await figures.run_once()
    note("ann", 2)
    await pool.execute("alter table sync_hours rename to gone")
    try:
        await figures.run_once()
    except asyncpg.UndefinedTableError:
        note("ann")
    await pool.execute("alter table gone rename to sync_hours")
    await figures.run_once()
    await figures.run_once()
    assert await pool.fetchval("select exchanges from sync_hours") == 4
    many = [f"u{number}" for number in range(MOST_USERS + 5)]
    await pool.execute(_HEADS, many)
    for user_id in many:
        note(user_id)
    await figures.run_once()
    assert await pool.fetchval("select count(*) from sync_hours") == MOST_USERS + 1
    await pool.close()


async def test_chats_that_a_user_deletes_are_on_record(database: str) -> None:
    look = await asyncpg.connect(database)
    async with serving_users(database) as client:
        headers = as_user("ann") | {"X-Request-Id": "mine-1"}
        given = [[put("c1", "Secret"), put("c2"), put("c3")], [delete("c1", 5), delete("c3", 5), delete("nobodys", 5)]]
        push = [{"mid": mid, "ops": ops} for mid, ops in enumerate(given, 1)]
        for _ in range(2):
            for part in push:
                answer = await client.post("/api/chat/sync", json={"client": "a", "push": [part]}, headers=headers)
                assert answer.status_code == 200, answer.text
        gone = await client.delete("/api/chats/c2", headers=headers)
        assert gone.status_code in (200, 204), gone.text
        entries = [*reversed(await audit.last(look, 10))]
        told = [(one.actor, one.action, one.target, one.detail, one.request_id) for one in entries]
        assert told == [
            ("user:ann", "chat.delete", "ann", "2: c1, c3", "mine-1"),
            ("user:ann", "chat.delete", "ann", "1: c2", "mine-1"),
        ]
    await look.close()
