"""POST /api/process-message: what it accepts, what it remembers, and that it never accepts half."""

import asyncio
import json
from typing import Any

import asyncpg
import pytest

from tests.house import House, Open, flow
from tests.sse import read_stream

ROWS = ("conversation_sessions", "streaming_sessions", "chats", "messages", "idempotency_keys")


async def rows(home: House) -> list[int]:
    return [await home.count(table) for table in ROWS] + [await home.count("streaming_events where id = 1")]


async def test_accepted_is_durable_before_the_provider_has_answered(house: Open) -> None:
    async with house({"mute": "demo?fault=silent"}) as home:
        answer = (await home.post("mute", session_id="chat-1", client_message_id="m-1")).json()
        assert answer["session_id"] == "chat-1"
        assert await rows(home) == [1, 1, 1, 1, 1, 1]
        assert await home.database.fetchval("select content from messages where id = 'm-1'") == "Hello"
        assert await home.database.fetchval("select status from conversation_sessions") == "active"


async def test_stored_messages_are_the_history_unless_the_request_brings_its_own(house: Open) -> None:
    async with house({"echo": "demo?delay_ms=0&echo=1&tokens=4000"}) as home:
        first, _ = await home.ask("echo", message_text="My name is Ann.")
        session = first["session_id"]
        _, frames = await home.ask("echo", message_text="And now?", session_id=session)
        assert "My name is Ann." in said(frames)
        own = [{"role": "user", "content": "I am Bob."}, {"role": "assistant", "content": "Hello Bob."}]
        _, frames = await home.ask("echo", message_text="Who?", session_id=session, conversation_history=own)
        assert "I am Bob." in said(frames)
        assert "My name is Ann." not in said(frames)
        _, frames = await home.ask("echo", message_text="Who?", session_id=session, conversation_history=[])
        assert "Bob" not in said(frames)


def said(frames: list[Any]) -> str:
    return "".join(frame.data["data"]["token"] for frame in frames if frame.event == "token")


async def test_one_users_session_id_is_another_session_of_another_user(house: Open) -> None:
    async with house({"echo": "demo?delay_ms=0&echo=1&tokens=4000"}) as home:
        await home.ask("echo", session_id="mine", message_text="a secret")
        _, frames = await home.ask("echo", session_id="mine", user_id="eve", message_text="tell")
        assert "a secret" not in said(frames)
        assert await home.count("chats") == 2


# -- G11


async def test_g11_the_same_request_gets_the_same_answer_and_runs_once(house: Open) -> None:
    async with house() as home:
        headers = {"Idempotency-Key": "k-1"}
        body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
        first = await home.client.post("/api/process-message", json=body, headers=headers)
        await read_stream(home.client, first.json()["streaming_url"])
        before = await rows(home)
        again = await home.client.post("/api/process-message", json=dict(reversed(body.items())), headers=headers)
        assert again.json() == first.json()
        assert again.headers["idempotent-replayed"] == "true"
        assert "idempotent-replayed" not in first.headers
        assert await rows(home) == before


async def test_g11_another_body_under_the_same_key_is_refused(house: Open) -> None:
    async with house() as home:
        assert (await home.post(client_message_id="m-1")).status_code == 200
        refused = await home.post(client_message_id="m-1", message_text="Something else")
        assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_mismatch")
        other_user = await home.post(client_message_id="m-1", message_text="Something else", user_id="bob")
        assert other_user.status_code == 200


async def test_k5_fifty_parallel_posts_with_one_key_are_one_run(house: Open) -> None:
    async with house() as home:
        answers = await asyncio.gather(*(home.post(client_message_id="m-1") for _ in range(50)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1
        assert await home.count("streaming_sessions") == 1
        assert sum("idempotent-replayed" in answer.headers for answer in answers) == 49


async def test_g11_a_repetition_is_answered_although_the_chatbot_takes_it_no_more(house: Open) -> None:
    async with house() as home:
        main = {"flows": {"main": flow("Yes.")}}
        await home.apply(shop=main | {"allow": {"temperature": [0, 1]}})
        asked = {"client_message_id": "m", "configuration": {"temperature": 0.5}}
        first = await home.post("shop", **asked)
        await home.apply(shop=main)
        async with asyncio.timeout(10):
            while (await home.post("shop", configuration={"temperature": 0.5})).status_code == 200:
                pass
        again = await home.post("shop", **asked)
        assert (again.status_code, again.json()) == (200, first.json())
        assert again.headers["Idempotent-Replayed"] == "true"
        other = await home.post("shop", **asked, message_text="Else")
        assert other.json()["code"] == "idempotency_mismatch"
        await home.database.execute("update idempotency_keys set created_at = now() - interval '2 days'")
        assert (await home.post("shop", **asked)).json()["code"] == "configuration_refused"


async def test_an_expired_key_may_be_used_again(house: Open) -> None:
    async with house() as home:
        first, _ = await home.ask(client_message_id="m-1", session_id="s")
        await home.database.execute("update idempotency_keys set created_at = now() - interval '25 hours'")
        again = await home.post(client_message_id="m-1", message_text="Other", session_id="s")
        assert (again.status_code, again.json()["code"]) == (409, "message_exists")
        fresh = await home.post(client_message_id="m-2", session_id="s")
        assert fresh.json()["streaming_session_id"] != first["streaming_session_id"]


async def test_a_refused_message_leaves_its_key_free(house: Open) -> None:
    async with house() as home:
        before = await rows(home)
        assert (await home.post("nobody", client_message_id="m-1")).status_code == 404
        assert await rows(home) == before
        assert (await home.post(client_message_id="m-1")).status_code == 200


# -- busy, full, away


async def test_a_session_answers_one_message_at_a_time(house: Open) -> None:
    async with house({"mute": "demo?fault=silent"}) as home:
        await home.post("mute", session_id="s")
        before = await rows(home)
        busy = await home.post("quick", session_id="s", on_busy="reject")
        assert (busy.status_code, busy.json()["code"]) == (409, "session_busy")
        assert await rows(home) == before
        assert (await home.post("quick", session_id="s2")).status_code == 200


async def test_g14_a_full_replica_refuses_before_any_row_is_written(house: Open) -> None:
    async with house({"mute": "demo?fault=silent"}, max_runs=1) as home:
        assert (await home.post("mute", client_message_id="m")).status_code == 200
        before = await rows(home)
        refused = await home.post("quick")
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert await rows(home) == before
        assert (await home.post("mute", client_message_id="m")).headers["idempotent-replayed"] == "true"


async def test_d7_a_full_disk_refuses_posts_while_reads_work(house: Open, server: Any) -> None:
    async with house() as home:
        answer, frames = await home.ask()
        # The same SQLSTATE that a full disk raises, from the server itself.
        await home.database.execute(
            "create function full_disk() returns trigger language plpgsql as"
            " $$ begin raise exception 'no space left on device' using errcode = '53100'; end $$"
        )
        for table in ("streaming_sessions", "messages"):
            await home.database.execute(
                f"create trigger full_disk before insert on {table} for each row execute function full_disk()"
            )
        before = await rows(home)
        refused = await home.post()
        assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
        assert "disk is full" in refused.json()["detail"]
        assert await rows(home) == before
        again = await read_stream(home.client, answer["streaming_url"])
        assert [frame.data for frame in again] == [frame.data for frame in frames]
        for table in ("streaming_sessions", "messages"):
            await home.database.execute(f"drop trigger full_disk on {table}")
        assert (await home.post()).status_code == 200


async def test_d11_a_deadlock_is_retried_inside(house: Open, database: str) -> None:
    await _later_about_deadlocks(database)
    async with house() as home:
        await home.ask(session_id="s")
        async with home.database.transaction():
            await home.database.execute("set local deadlock_timeout = '1min'")
            await home.database.execute("select 1 from chats where id = 's' for update")
            posting = asyncio.ensure_future(home.post(session_id="s"))
            await _until_blocked(home)
            # The POST holds the session and waits for our chat; now we wait for its session. It is the first to look
            # what it waits for, so it is the one that PostgreSQL ends.
            await home.database.execute("select 1 from conversation_sessions where id = 's' for update")
        assert (await posting).status_code == 200
        assert await home.database.fetchval("select deadlocks from pg_stat_database where datname = current_database()")


async def _later_about_deadlocks(database: str) -> None:
    """Have connections leave us time to lock what they wait with, on a busy machine, too; they wait two seconds."""
    connection = await asyncpg.connect(database)
    name = await connection.fetchval("select quote_ident(current_database())")
    await connection.execute(f"alter database {name} set deadlock_timeout = '1500ms'")
    await connection.close()


async def test_d11_a_lock_held_too_long_is_an_honest_503(house: Open) -> None:
    async with house() as home:
        await home.ask(session_id="s")
        before = await rows(home)
        async with home.database.transaction():
            await home.database.execute("select 1 from conversation_sessions where id = 's' for update")
            refused = await home.post(session_id="s")
        assert (refused.status_code, refused.json()["code"]) == (503, "database_busy")
        assert await rows(home) == before
        assert (await home.post(session_id="s")).status_code == 200


async def _until_blocked(home: House) -> None:
    blocked = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
    async with asyncio.timeout(5):
        while not await home.database.fetchval(blocked):
            pass


# -- bad input

BAD: dict[str, tuple[Any, int, str]] = {
    "not json": (b"hello", 400, "invalid_json"),
    "nothing": (b"", 400, "invalid_json"),
    "an array": (b"[]", 400, "invalid_json"),
    "not utf-8": (b'{"user_id": "\xff"}', 400, "invalid_json"),
    "deep": (b'{"a":' + b"[" * 100_000, 400, "invalid_json"),
    "deep and valid": (b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400, "invalid_json"),
    "four megabytes deep": (b"[" * 4_000_000, 400, "invalid_json"),
    "101 deep": (b'{"configuration":' + b"[" * 100 + b"]" * 100 + b"}", 400, "invalid_json"),
    "300 deep, half an emoji": (b'{"a":"\\ud800","b":' + b"[" * 300 + b"]" * 300 + b"}", 400, "invalid_json"),
    "a million members": (b'{"a":[' + b"0," * 600_000 + b"0]}", 400, "invalid_json"),
    "nan": (b'{"user_id": NaN}', 400, "invalid_json"),
    "huge number": (b'{"user_id": ' + b"9" * 100_000 + b"}", 400, "invalid_json"),
    "no message": ({"message_text": None}, 422, "invalid_request"),
    "empty message": ({"message_text": ""}, 422, "invalid_request"),
    "wrong type": ({"user_id": 7}, 422, "invalid_request"),
    "bool for text": ({"message_text": True}, 422, "invalid_request"),
    "user with newline": ({"user_id": "a\nb"}, 422, "invalid_request"),
    "long user": ({"user_id": "u" * 257}, 422, "invalid_request"),
    "session with slash": ({"session_id": "../x"}, 422, "invalid_request"),
    "long session": ({"session_id": "s" * 10_000}, 422, "invalid_request"),
    "session with nul": ({"session_id": "a%00\x00"}, 422, "invalid_request"),
    "role system": ({"conversation_history": [{"role": "system", "content": "x"}]}, 422, "invalid_request"),
    "i2 long history": ({"conversation_history": [{"role": "user", "content": "x"}] * 201}, 422, "history_too_long"),
    "fat history": ({"conversation_history": [{"role": "user", "content": "x" * 300_000}]}, 422, "history_too_long"),
    "long message": ({"message_text": "x" * 40_000}, 422, "message_too_long"),
    "i12 base url": ({"configuration": {"base_url": "http://evil"}}, 422, "configuration_refused"),
    "i12 key": ({"configuration": {"api_key": "x"}}, 422, "configuration_refused"),
    "i12 model": ({"configuration": {"model": "x"}}, 422, "configuration_refused"),
    "i12 a long name": ({"configuration": {"z" * 900_000: 1}}, 422, "configuration_refused"),
    "i12 many names": ({"configuration": {f"name{n}": 1 for n in range(9000)}}, 422, "configuration_refused"),
    "image": ({"image_data": {"name": "a"}}, 422, "images_unsupported"),
    "on_busy": ({"on_busy": "later"}, 422, "invalid_request"),
}


@pytest.fixture
def good() -> dict[str, Any]:
    return {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}


async def test_bad_input_is_told_and_nothing_is_written(house: Open, good: dict[str, Any]) -> None:
    async with house() as home:
        before = await rows(home)
        for name, (change, status, code) in BAD.items():
            body = change if isinstance(change, bytes) else json.dumps({**good, **change})
            response = await home.client.post("/api/process-message", content=body)
            assert (response.status_code, response.json()["code"]) == (status, code), name
            assert response.headers["content-type"] == "application/problem+json"
            assert len(response.content) < 5000, name
        assert await rows(home) == before


async def test_i1_a_body_over_the_limit_is_refused_declared_or_not(house: Open) -> None:
    async with house(body_limit=10_000) as home:

        async def chunks() -> Any:
            for _ in range(20):
                yield b"x" * 1000

        for content in (b"x" * 20_000, chunks()):
            response = await home.client.post("/api/process-message", content=content)
            assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ('"a\\u0000b"', "a\ufffdb"),
        ('"cut \\ud83d"', "cut \ufffd"),
        ('"\\ude00 tail"', "\ufffd tail"),
        ('"\\ud83d\\ude00"', "😀"),
        ('"\\u2028 line"', "\u2028 line"),
        ('"\\r\\n\\r\\nevent: stream_end"', "\r\n\r\nevent: stream_end"),
        (json.dumps("w" * 30_000), "w" * 30_000),
    ],
)
async def test_i4_text_is_cleaned_once_and_the_same_everywhere(house: Open, sent: str, kept: str) -> None:
    async with house({"echo": "demo?delay_ms=0&echo=1&tokens=100000"}) as home:
        body = f'{{"user_id":"ann","chatbot_id":"echo","message_text":{sent}}}'
        response = await home.client.post("/api/process-message", content=body.encode())
        assert response.status_code == 200, response.text
        frames = await read_stream(home.client, response.json()["streaming_url"])
        assert await home.database.fetchval("select content from messages where role = 'user'") == kept
        assert frames[-1].data["data"]["status"] == "completed"


async def test_i3_duplicate_and_unknown_fields_do_no_harm(house: Open) -> None:
    async with house() as home:
        body = b'{"user_id":"a","user_id":"ann","chatbot_id":"quick","message_text":"Hi","unknown":{"x":[1]}}'
        response = await home.client.post("/api/process-message", content=body)
        assert response.status_code == 200
        assert await home.database.fetchval("select user_id from chats") == "ann"


DEEP, HUGE = b"[" * 99 + b"]" * 99, b'123456789012345678901234567890, "y": "\\ud800"'


@pytest.mark.parametrize("strange", [DEEP, HUGE])
async def test_i3_a_key_goes_with_any_body_that_is_taken(house: Open, strange: bytes) -> None:
    async with house() as home:
        body = b'{"user_id": "ann", "chatbot_id": "quick", "message_text": "x", "client_message_id": "m", "x": %s}'
        first, again = [await home.client.post("/api/process-message", content=body % strange) for _ in range(2)]
        assert (first.status_code, again.status_code) == (200, 200), first.text
        assert first.json() == again.json()
        other = await home.client.post("/api/process-message", content=body % (strange + b', "z": 1'))
        assert other.json()["code"] == "idempotency_mismatch"


async def test_u16_a_provider_at_capacity_refuses_before_any_row_is_written(house: Open) -> None:
    async with house({"mute": "demo?fault=silent"}, provider_concurrency=1) as home:
        assert (await home.post("mute")).status_code == 200
        async with asyncio.timeout(10):
            while not await home.count("streaming_events") >= 2 or (await home.post()).status_code != 503:
                pass
        before = await rows(home)
        refused = await home.post()
        assert (refused.status_code, refused.json()["code"]) == (503, "upstream_busy")
        assert int(refused.headers["retry-after"]) >= 1
        assert await rows(home) == before


async def test_k6_a_client_that_is_gone_before_the_answer_finds_its_run(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=10&tokens=40"}) as home:
        body = b'{"user_id":"ann","chatbot_id":"slow","message_text":"Hello","client_message_id":"once"}'
        url = home.client.base_url
        _, writer = await asyncio.open_connection(url.host, url.port)
        writer.write(
            b"POST /api/process-message HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
        )
        writer.write(body)
        await writer.drain()
        writer.transport.abort()
        async with asyncio.timeout(10):
            while not await home.count("streaming_sessions"):
                await asyncio.sleep(0.01)
        again = await home.post("slow", client_message_id="once")
        assert again.headers["idempotent-replayed"] == "true"
        frames = await read_stream(home.client, again.json()["streaming_url"])
        assert frames[-1].data["data"]["status"] == "completed"
        assert await home.count("streaming_sessions") == 1
