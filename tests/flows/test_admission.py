"""How much one user may have under way: bounded on all replicas together, and refused before a row is written."""

import asyncio
from collections import Counter
from typing import Any

import httpx2

from tests.flows.test_images import inline
from tests.house import House, Open, flow
from tests.serving import serving

TABLES = ("conversation_sessions", "streaming_sessions", "streaming_events", "chats", "messages", "idempotency_keys")
ENDLESS = flow(wishes={"fault": "silent"})
BOTS: dict[str, Any] = {
    "mute": {"flows": {"main": ENDLESS}},
    "seeing": {"flows": {"main": ENDLESS | {"images": True}}},
}


async def rows(home: House) -> dict[str, int]:
    return {table: await home.count(table) for table in (*TABLES, "queued_messages", "images")}


def assert_refused(response: httpx2.Response, code: str = "too_many_runs") -> None:
    assert (response.status_code, response.json()["code"]) == (429, code), response.text
    assert int(response.headers["retry-after"]) >= 1


async def post(client: httpx2.AsyncClient, chatbot: str = "mute", **fields: Any) -> httpx2.Response:
    body = {"user_id": "ann", "chatbot_id": chatbot, "message_text": "Hello", **fields}
    return await client.post("/api/process-message", json=body)


async def test_g14_a_user_has_so_many_answers_under_way_on_all_replicas_together(house: Open, database: str) -> None:
    async with house(user_runs=3) as home, serving(database, user_runs=3, drain_s=0) as other:
        await home.apply(**BOTS)
        clients = (home.client, other) * 8
        answers = await asyncio.gather(*(post(client, client_message_id=f"m{n}") for n, client in enumerate(clients)))
        assert Counter(answer.status_code for answer in answers)[200] == 3
        for answer in answers:
            if answer.status_code != 200:
                assert_refused(answer)
        counts = await rows(home)
        assert [counts[table] for table in TABLES if table != "streaming_events"] == [3] * 5
        assert (await post(other, user_id="bob")).status_code == 200
        accepted = next(answer for answer in answers if answer.status_code == 200).json()
        await other.post(f"{accepted['streaming_url']}/cancel")
        assert (await post(home.client)).status_code == 200
        assert_refused(await post(other))


async def test_g11_a_repetition_is_answered_although_there_is_no_room(house: Open) -> None:
    async with house(user_runs=1) as home:
        await home.apply(**BOTS)
        first = await post(home.client, "seeing", client_message_id="m", image_data=inline())
        again = await post(home.client, "seeing", client_message_id="m", image_data=inline())
        assert (first.status_code, again.json()) == (200, first.json())


async def test_nothing_is_written_for_what_is_refused_not_even_its_picture(house: Open) -> None:
    async with house(user_runs=1) as home:
        await home.apply(**BOTS)
        assert (await post(home.client)).status_code == 200
        before = await rows(home)
        for fields in ({}, {"client_message_id": "m"}, {"session_id": "new"}):
            assert_refused(await post(home.client, "seeing", image_data=inline(), **fields))
            assert_refused(await post(home.client, **fields))
        upload = {"chatbot_id": "seeing", "image_data": inline(), "user_id": "ann"}
        assert_refused(await home.client.post("/api/upload-image", json=upload | {"message_text": "What is it?"}))
        after = await rows(home)
        # The stream that was accepted goes on.
        assert after | {"streaming_events": 0} == before | {"streaming_events": 0}
        assert (await home.client.post("/api/upload-image", json=upload)).status_code == 200


async def test_a_question_about_a_picture_counts_like_any_message(house: Open) -> None:
    async with house(user_runs=1) as home:
        await home.apply(**BOTS)
        upload = {"chatbot_id": "seeing", "image_data": inline(), "user_id": "ann", "message_text": "What is it?"}
        assert (await home.client.post("/api/upload-image", json=upload)).status_code == 200
        assert_refused(await post(home.client))
        for _ in range(2):  # nobody in particular is not one user
            assert (await home.client.post("/api/upload-image", json=upload | {"user_id": None})).status_code == 200


async def test_what_waits_is_bounded_over_all_sessions_and_needs_no_other_place(house: Open) -> None:
    async with house(user_runs=2, user_queue=3) as home:
        await home.apply(**BOTS)
        for session in ("a", "b"):
            assert (await post(home.client, session_id=session)).json()["status"] == "active"
        at_once = [post(home.client, session_id=session) for session in ("a", "b") * 4]
        answers = await asyncio.gather(*at_once)
        assert Counter(answer.status_code for answer in answers)[200] == 3
        for answer in answers:
            if answer.status_code != 200:
                assert_refused(answer, "queue_full")
        assert await home.count("queued_messages") == 3
        picture = await post(home.client, "seeing", session_id="a", image_data=inline())
        assert_refused(picture, "queue_full")


async def test_answers_under_way_are_counted_by_an_index(house: Open) -> None:
    from app.flows.sessions import _ACTIVE_ELSEWHERE

    async with house() as home:
        await home.database.execute(
            "insert into conversation_sessions (user_id, id, chatbot_id, status)"
            " select 'ann', n::text, 'x', case when n % 1000 = 0 then 'active' else 'idle' end"
            " from generate_series(1, 20000) n; analyze conversation_sessions"
        )
        plan = await home.database.fetch(f"explain (analyze, buffers off) {_ACTIVE_ELSEWHERE}", "ann", "1000")
        text = "\n".join(row[0] for row in plan)
        assert "conversation_sessions_active" in text
        assert "Rows Removed" not in text or "Rows Removed by Filter: 1\n" in text + "\n"
