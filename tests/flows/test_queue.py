"""A second message while an answer runs: refused, queued or put first; the queue is durable, visible and editable."""

import asyncio
from typing import Any

import asyncpg
import httpx2

from tests.flows.events import kinds, only, text
from tests.flows.test_stopping import ENDLESS, until_event
from tests.house import House, Open, flow
from tests.serving import serving
from tests.sse import read_stream

SLOW = {"flows": {"main": flow(wishes={"tokens": 30, "delay_ms": 10})}}


async def send(home: House, session: str = "chat", **fields: Any) -> dict[str, Any]:
    response = await home.post("shop", session_id=session, **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def queue(client: httpx2.AsyncClient, session: str = "chat") -> list[dict[str, Any]]:
    response = await client.get(f"/api/sessions/{session}/queue", params={"user_id": "ann"})
    assert response.status_code == 200, response.text
    messages: list[dict[str, Any]] = response.json()["messages"]
    return messages


async def said(home: House) -> list[tuple[str, str]]:
    rows = await home.database.fetch("select role, content from messages order by position")
    return [(row["role"], row["content"]) for row in rows if row["role"] == "user"]


async def test_messages_wait_and_have_their_turns_in_order(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=SLOW)
        answers = [await send(home, message_text=f"number {n}") for n in range(4)]
        assert [answer["status"] for answer in answers] == ["active", "queued", "queued", "queued"]
        waiting = await queue(home.client)
        assert [message["message_text"] for message in waiting] == ["number 1", "number 2", "number 3"]
        assert [message["streaming_session_id"] for message in waiting] == [
            answer["streaming_session_id"] for answer in answers[1:]
        ]
        page = (await home.client.get(answers[3]["streaming_url"])).json()
        assert (page["session_status"], page["events"], page["has_more"]) == ("queued", [], True)
        # Read live from before their turns: nothing may be missed when they begin.
        streams = await asyncio.gather(*(read_stream(home.client, answer["streaming_url"]) for answer in answers))
        for frames in streams:
            assert kinds(frames) == ["stream_start", "flow_start", "token", "flow_end", "message", "stream_end"]
            assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
        assert await said(home) == [("user", f"number {n}") for n in range(4)]
        assert await queue(home.client) == []
        assert await home.database.fetchval("select status from conversation_sessions") == "idle"
        longest = await home.database.fetchval("select max(duration_ms) from conversation_processing_metrics")
        assert longest < 10_000, "counted from the turn, not from the start of the machine"


async def test_reject(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=SLOW | {"on_busy": "reject"})
        await send(home)
        response = await home.post("shop", session_id="chat")
        assert (response.status_code, response.json()["code"]) == (409, "session_busy")
        assert (await send(home, on_busy="enqueue"))["status"] == "queued"


async def test_interrupt_stops_the_answer_under_way_and_comes_next(house: Open) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow(wishes=ENDLESS)}}, quick={"flows": {"main": flow("Yes.")}})
        first = await send(home, message_text="first")
        await until_event(home, first["streaming_url"], 5)
        waiting = (await home.post("quick", session_id="chat", message_text="second")).json()
        urgent = (await home.post("quick", session_id="chat", message_text="urgent", on_busy="interrupt")).json()
        frames = await asyncio.wait_for(read_stream(home.client, first["streaming_url"]), 10)
        assert only(frames, "stream_end")["status"] == "cancelled"
        assert text(await asyncio.wait_for(read_stream(home.client, urgent["streaming_url"]), 10)) == "Yes."
        assert text(await asyncio.wait_for(read_stream(home.client, waiting["streaming_url"]), 10)) == "Yes."
        assert await said(home) == [("user", "first"), ("user", "urgent"), ("user", "second")]
        partial = "select content from messages where status = 'partial'"
        assert await home.database.fetchval(partial) == text(frames)


async def test_waiting_messages_can_be_edited_removed_and_sent_now(house: Open) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow(wishes=ENDLESS)}}, quick={"flows": {"main": flow("Yes.")}})
        first = await send(home, message_text="first")
        sent = {}
        for name in ("one", "two", "three"):
            body = {"session_id": "chat", "message_text": name, "client_message_id": name}
            sent[name] = (await home.post("quick", **body)).json()
            assert sent[name]["status"] == "queued"
        user = {"user_id": "ann"}
        url = "/api/sessions/chat/queue"
        edited = await home.client.patch(f"{url}/two", params=user, json={"message_text": "zwei"})
        assert edited.status_code == 200
        removed = (await home.client.delete(f"{url}/one", params=user)).json()
        frames = await read_stream(home.client, f"/api/stream-events/{removed['streaming_session_id']}")
        assert [frame.event for frame in frames] == ["stream_end"]
        assert only(frames, "stream_end")["status"] == "cancelled"
        assert [message["message_text"] for message in await queue(home.client)] == ["zwei", "three"]
        now = (await home.client.post(f"{url}/three/send-now", params=user)).json()
        await asyncio.wait_for(read_stream(home.client, f"/api/stream-events/{now['streaming_session_id']}"), 10)
        assert only(await read_stream(home.client, first["streaming_url"]), "stream_end")["status"] == "cancelled"
        await asyncio.wait_for(read_stream(home.client, sent["two"]["streaming_url"]), 10)
        assert await said(home) == [("user", "first"), ("user", "three"), ("user", "zwei")]
        for response in (
            await home.client.patch(f"{url}/two", params=user, json={"message_text": "late"}),
            await home.client.delete(f"{url}/one", params=user),
            await home.client.post(f"{url}/three/send-now", params={"user_id": "bob"}),
        ):
            assert (response.status_code, response.json()["code"]) == (404, "message_not_queued")


async def test_a_queued_stream_can_be_cancelled_like_any_other(house: Open) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow(wishes=ENDLESS)}})
        await send(home)
        waiting = await send(home)
        stopped = (await home.client.post(waiting["streaming_url"] + "/cancel")).json()
        assert (stopped["session_status"], stopped["upstream_closed"], stopped["last_event_id"]) == (
            "cancelled",
            True,
            1,
        )
        assert await queue(home.client) == []


async def test_the_queue_is_bounded_and_ids_are_used_once(house: Open) -> None:
    async with house(queue_limit=2) as home:
        await home.apply(shop={"flows": {"main": flow(wishes=ENDLESS)}})
        await send(home, client_message_id="a")
        await send(home, client_message_id="b")
        assert (await send(home, client_message_id="b"))["status"] == "queued", "repeated, not queued twice"
        other = await home.post("shop", session_id="chat", client_message_id="b", message_text="else")
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
        await send(home)
        full = await home.post("shop", session_id="chat")
        assert (full.status_code, full.json()["code"]) == (429, "queue_full")
        assert await home.count("queued_messages") == 2
        assert await home.count("streaming_sessions") == 3


# An answer has ended and its replica has not lived to give the next message its turn.
IDLE = "update conversation_sessions set status = 'idle', streaming_session_id = null"


async def test_a_turn_comes_although_the_replica_that_should_give_it_has_gone(house: Open, database: str) -> None:
    async with house(scan_s=0.1) as home:
        await home.apply(shop={"flows": {"main": flow("Yes.")}}, slow={"flows": {"main": flow(wishes=ENDLESS)}})
        body = {"user_id": "ann", "session_id": "chat", "message_text": "x"}
        async with serving(database, drain_s=0) as other:
            first = (await other.post("/api/process-message", json=body | {"chatbot_id": "slow"})).json()
            second = (await other.post("/api/process-message", json=body | {"chatbot_id": "shop"})).json()
            assert (first["status"], second["status"]) == ("active", "queued")
        await home.database.execute(IDLE)
        frames = await asyncio.wait_for(read_stream(home.client, second["streaming_url"]), 20)
        assert text(frames) == "Yes."


async def test_a_message_edited_while_its_turn_comes_is_asked_as_it_was_edited(house: Open, database: str) -> None:
    blocked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"

    async def until_blocked(connection: asyncpg.Connection) -> None:
        async with asyncio.timeout(10):
            while not await connection.fetchval(blocked):
                pass

    async with house(scan_s=0.1) as home:
        await home.apply(shop={"flows": {"main": flow(wishes=ENDLESS)}}, quick={"flows": {"main": flow("Yes.")}})
        await send(home)
        waiting = (await home.post("quick", session_id="chat", message_text="first thought")).json()
        editor = await asyncpg.connect(database)
        async with editor.transaction():
            async with home.database.transaction():
                await home.database.execute(IDLE)
                lock = asyncio.create_task(editor.execute("select from conversation_sessions for update"))
                await until_blocked(home.database)
            await lock  # ours before anybody can see that the session is idle
            await until_blocked(home.database)  # the turn has read the message
            await editor.execute("update queued_messages set text = 'second thought'")
        await editor.close()
        assert text(await asyncio.wait_for(read_stream(home.client, waiting["streaming_url"]), 10)) == "Yes."
        assert (await said(home))[1] == ("user", "second thought")


async def test_a_message_that_its_chatbot_takes_no_more_ends_failed(house: Open) -> None:
    async with house() as home:
        allowed = {"allow": {"temperature": [0, 1]}}
        await home.apply(shop={"flows": {"main": flow(wishes={"tokens": 40, "delay_ms": 40})}} | allowed)
        await send(home)
        waiting = await send(home, configuration={"temperature": 0.5})
        last = await send(home)
        await home.apply(shop={"flows": {"main": flow("Yes.")}})
        frames = await asyncio.wait_for(read_stream(home.client, waiting["streaming_url"]), 10)
        assert only(frames, "stream_end")["error"]["code"] == "configuration_refused"
        assert text(await asyncio.wait_for(read_stream(home.client, last["streaming_url"]), 10)) == "Yes."


async def test_a_message_whose_id_was_used_elsewhere_meanwhile_ends_failed_and_the_next_has_its_turn(
    house: Open,
) -> None:
    async with house(scan_s=60) as home:
        await home.apply(shop={"flows": {"main": flow(wishes=ENDLESS)}}, quick={"flows": {"main": flow("Yes.")}})

        async def with_id(session: str, key: str) -> dict[str, Any]:
            body = {"user_id": "ann", "chatbot_id": "quick", "message_text": key, "session_id": session}
            headers = {"Idempotency-Key": key}  # else the id alone would be the key
            body["client_message_id"] = "used"
            response = await home.client.post("/api/process-message", json=body, headers=headers)
            answer: dict[str, Any] = response.json()
            return answer

        first = await send(home)
        waiting = await with_id("chat", "one")
        last = (await home.post("quick", session_id="chat")).json()
        assert (waiting["status"], (await with_id("other", "two"))["status"]) == ("queued", "active")
        await home.client.post(first["streaming_url"] + "/cancel")
        frames = await asyncio.wait_for(read_stream(home.client, waiting["streaming_url"]), 10)
        assert only(frames, "stream_end")["error"]["code"] == "message_exists"
        assert text(await asyncio.wait_for(read_stream(home.client, last["streaming_url"]), 10)) == "Yes."


async def test_one_session_whose_turn_cannot_be_given_does_not_hold_up_the_others(house: Open) -> None:
    async with house(scan_s=0.1) as home:
        slow, quick = {"flows": {"main": flow(wishes=ENDLESS)}}, {"flows": {"main": flow("Yes.")}}
        await home.apply(shop=slow, quick=quick, broken=quick)
        for session, chatbot in (("a", "broken"), ("b", "quick")):
            await home.post("shop", session_id=session)
            waiting = (await home.post(chatbot, session_id=session)).json()
        # As a newer version of the server might write it.
        await home.database.execute("insert into chatbots (id, version, configuration) values ('broken', 2, '{}')")
        async with asyncio.timeout(10):
            while (await home.client.get("/api/conversation-config/broken")).status_code == 200:
                pass
        await home.database.execute(IDLE)
        assert text(await asyncio.wait_for(read_stream(home.client, waiting["streaming_url"]), 10)) == "Yes."


async def test_a_message_never_overtakes_those_that_wait(house: Open, database: str) -> None:
    async with house(scan_s=60) as home:
        await home.apply(shop={"flows": {"main": flow("Yes.")}}, slow={"flows": {"main": flow(wishes=ENDLESS)}})
        async with serving(database, drain_s=0) as other:
            body = {"user_id": "ann", "session_id": "chat", "message_text": "x"}
            await other.post("/api/process-message", json=body | {"chatbot_id": "slow"})
            await other.post("/api/process-message", json=body | {"chatbot_id": "shop"})
        await home.database.execute(IDLE)
        assert (await send(home))["status"] == "queued"
        assert len(await queue(home.client)) == 2


async def test_i10_ids_that_cannot_be_are_unknown(house: Open) -> None:
    async with house() as home:
        for name in ("%00", "a%0D%0Ab", "..%2F..%2Fx", "%ED%A0%80", "x" * 9000):
            url = f"/api/sessions/{name}/queue"
            listed = await home.client.get(url, params={"user_id": "a"})
            assert listed.json().get("messages", []) == []
            for response in (
                await home.client.delete(f"{url}/{name}", params={"user_id": "\x00"}),
                await home.client.patch(f"{url}/{name}", params={"user_id": "a"}, json={"message_text": "x"}),
                await home.client.post(f"{url}/{name}/send-now", params={"user_id": "a"}),
                await home.client.get(f"/api/conversation-config/{name}"),
            ):
                assert response.status_code == 404, response.text
