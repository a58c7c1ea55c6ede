"""What operators find in error_logs: one row per error, with what it happened to, and nothing that looks like a key."""

import asyncio

from app.journal import About, Journal
from app.postgres import open_pool
from app.telemetry import Metrics
from tests.house import Open, flow

KEY = "sk-canary-0123456789abcdef"


async def test_a_failed_flow_is_described(house: Open) -> None:
    async with house(provider_retries=1) as home:
        await home.apply(shop={"flows": {"main": flow("Hello."), "side": {"provider": "gone", "model": "m"}}})
        answer, frames = await home.ask("shop")
        error = next(frame.data["data"] for frame in frames if frame.event == "flow_error")
        row = await home.row("select * from error_logs")
        assert str(row["id"]) == error["error_id"]
        assert row["category"] == "CONVERSATION_PROCESSING_ERROR"
        assert (row["code"], row["flow"], row["attempt"]) == ("upstream_unavailable", "side", 2)
        assert (row["session_id"], row["chatbot_id"]) == (answer["session_id"], "shop")
        assert str(row["stream_id"]) == answer["streaming_session_id"]
        assert row["request_id"]
        assert '["gone","m","upstream_unavailable"]' in row["context"]
        assert "ProviderError" in row["stack"]


async def test_the_same_trouble_has_one_fingerprint(house: Open) -> None:
    async with house(provider_retries=0) as home:
        await home.apply(
            shop={"flows": {"main": {"provider": "gone", "model": "m"}}},
            other={"flows": {"main": {"provider": "gone", "model": "m"}}},
        )
        for chatbot in ("shop", "shop", "other"):
            await home.ask(chatbot)
        await home.row("select * from error_logs offset 2")
        prints = await home.database.fetch("select distinct fingerprint from error_logs")
        assert len(prints) == 2


async def test_a_row_holds_no_key_and_is_small(house: Open) -> None:
    async with house() as home:
        await home.client.get(f"/api/sessions/{KEY}" + "x" * 5000 + "/queue", params={"user_id": ""})
        row = await home.row("select * from error_logs")
        assert KEY not in str(dict(row))
        assert len(row["context"]) + len(row["stack"] or "") <= 8192


async def test_two_that_write_at_once_write_each_row_once(database: str) -> None:
    """As a stopping server does, which writes what is left."""
    pool = await open_pool(database, 3)
    journal = Journal(pool, Metrics())
    for number in range(5):
        journal.record("x", f"number {number}", about=About())
    assert sum(await asyncio.gather(*(journal.run_once() for _ in range(3)))) == 5
    assert await pool.fetchval("select count(*) from error_logs") == 5
    await pool.close()
