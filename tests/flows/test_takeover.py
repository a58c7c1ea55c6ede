"""Streams that nobody runs any more are begun again, or ended, whatever kept the first one from it."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import orjson

from tests.chats.pictures import picture
from tests.flows.events import data_of, only, text
from tests.house import House, Open, flow
from tests.serving import serving
from tests.sse import Frame, read_stream

# Its first owner hears the first five tokens and then waits; whoever asks again hears all of it.
STALLS = {"fault": "stall", "after": 5, "times": 1, "key": "stalls"}
LONG = "One two three four five six seven eight nine ten."


async def _status(home: House, stream_id: str) -> str:
    status: str = await home.database.fetchval("select status from streaming_sessions where id = $1", stream_id)
    return status


async def test_a_run_whose_end_could_not_be_written_is_ended_by_a_later_pass(house: Open) -> None:
    async with house(scan_s=0.1) as home:
        # Not a database that is away, which is waited for, but one that refuses what it is told.
        await home.database.execute("alter table messages add constraint odd check (role <> 'assistant') not valid")
        answer = (await home.post(session_id="s")).json()
        other = (await home.post(session_id="other")).json()
        async with asyncio.timeout(5):
            while (
                await home.database.fetchval("select count(*) from streaming_events where payload like '%flow_end%'")
                < 2
            ):
                pass
        assert await _status(home, answer["streaming_session_id"]) == "active"
        await home.database.execute("alter table messages drop constraint odd")
        for accepted in (answer, other):
            frames = await asyncio.wait_for(read_stream(home.client, accepted["streaming_url"]), 30)
            assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
            assert [frame.event for frame in frames].count("stream_end") == 1
            assert frames[-1].data["data"]["status"] == "completed"
        assert (await home.post(session_id="s")).status_code == 200


async def test_the_takeover_of_one_stream_does_not_hinder_the_others(house: Open) -> None:
    async with house(scan_s=0.1, lease_s=0.3, beat_s=0.1) as home:
        await home.ask()
        await home.database.execute("insert into replicas (id, version, alive) values (gen_random_uuid(), 'x', false)")
        make = """
            with s as (
                insert into streaming_sessions
                    (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, replica_id)
                select ($1 || substr(gen_random_uuid()::text, 9))::uuid, 'u', 's', 'quick', $2, 'main', 'active', r.id
                from replicas r where not alive returning id)
            insert into streaming_events (stream_id, id, payload)
            select s.id, 1, $3 from s returning stream_id
        """
        day = (await home.database.fetchval("select max(id::text) from streaming_sessions"))[:8]
        broken = await home.database.fetchval(make, day, 1, '{"event":"token","da')
        whole = await home.database.fetchval(make, day, 99, '{"event":"stream_start","data":{}}')
        async with asyncio.timeout(20):
            while await _status(home, whole) == "active":
                await asyncio.sleep(0.05)
        assert await _status(home, whole) == "failed"
        assert await _status(home, broken) == "active"


# -- begun again, by another server, with everything the first one had


class Left:
    """An answer whose first owner leaves at the end of the block, after its provider has fallen silent."""

    def __init__(self, home: House, accepted: dict[str, Any]) -> None:
        self.home = home
        self.accepted = accepted
        self.url: str = accepted["streaming_url"]

    async def frames(self) -> list[Frame]:
        """All of it, at the second owner's."""
        frames = await asyncio.wait_for(read_stream(self.home.client, self.url), 20)
        assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
        return frames

    async def saved(self) -> tuple[str, str]:
        row = await self.home.database.fetchrow("select status, content from messages where role = 'assistant'")
        assert row is not None
        return tuple(row)

    async def attempts(self, flow: str = "main") -> list[tuple[int, str, str | None]]:
        query = "select attempt, outcome, error_code from usage_ledger where flow = $1 order by attempt"
        return [tuple(row) for row in await self.home.database.fetch(query, flow)]


@asynccontextmanager
async def leaving(
    home: House, database: str, *, silent: str = "main", tokens: int = 5, **fields: Any
) -> AsyncGenerator[Left, None]:
    async with serving(database, drain_s=0) as first:
        body = {"user_id": "ann", "chatbot_id": "shop", "message_text": "Hello", "session_id": "chat", **fields}
        response = await first.post("/api/process-message", json=body)
        assert response.status_code == 200, response.text
        left = Left(home, response.json())
        async with asyncio.timeout(10):
            while await _said(home, left, silent) < tokens:
                pass
        yield left


async def _said(home: House, left: Left, flow: str) -> int:
    """Tokens so far; -1 before it began."""
    events = (await home.client.get(left.url, params={"limit": 5000})).json()["events"]
    return len([event for event in events if event["data"].get("flow") == flow]) - 1


async def test_g8_it_is_begun_again_and_says_so(house: Open, database: str) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS)}})
        async with leaving(home, database) as left:
            pass
        frames = await left.frames()
        assert only(frames, "flow_restart") == {"flow": "main", "attempt": 2, "reason": "owner_lost"}
        assert [data["attempt"] for data in data_of(frames, "flow_start")] == [1, 2]
        assert only(frames, "stream_end")["status"] == "completed"
        assert text(frames) == LONG
        assert await left.saved() == ("complete", LONG)
        assert await left.attempts() == [(1, "failed", "owner_lost"), (2, "completed", None)]


async def test_g8_nothing_shown_is_begun_again_without_a_word(house: Open, database: str) -> None:
    silent = flow(LONG, wishes={"fault": "silent", "times": 1, "key": "silent"})
    async with house() as home:
        await home.apply(shop={"flows": {"main": silent, "early": flow(LONG, stream=True)}})
        async with leaving(home, database, silent="early") as left:
            pass
        frames = await left.frames()
        assert data_of(frames, "flow_restart") == []
        assert text(frames, "main") == LONG
        assert len(data_of(frames, "flow_end", "early")) == 1
        assert await left.attempts("early") == [(1, "completed", None)]


async def test_g8_a_chatbot_that_rather_fails_keeps_what_was_shown(house: Open, database: str) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS, on_break="fail")}})
        async with leaving(home, database) as left:
            pass
        frames = await left.frames()
        assert data_of(frames, "flow_restart") == []
        assert only(frames, "flow_error")["code"] == only(frames, "stream_end")["error"]["code"] == "owner_lost"
        assert LONG.startswith(text(frames))
        assert await left.saved() == ("partial", text(frames))
        assert await left.attempts() == [(1, "failed", "owner_lost")]


async def test_the_model_is_asked_the_very_same_thing_again(house: Open, database: str) -> None:
    """The stored history before the question, the question, the picture, the wishes; by the version that was asked."""
    main = flow(wishes={"echo": "1", "key": "silent"}, system="As {{value.who}}, in {{language}}.", images=True)
    bot = {"flows": {"main": main}, "allow": {"values": ["who"], "languages": ["fr"], "temperature": [0, 1]}}
    stalling = main | {"model": main["model"] + "&fault=silent&times=1"}
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow("First answer.")}})
        await home.ask("shop", message_text="First question?", session_id="chat")
        await home.apply(shop=bot | {"flows": {"main": stalling}})
        wishes = {"values": {"who": "a pirate"}, "language": "fr", "temperature": 0.5}
        image = {"name": "p.png", "mime": "image/png", "data": b64encode(picture(size=(8, 6))).decode()}
        fields: dict[str, Any] = {"configuration": wishes, "image_data": image}
        async with leaving(home, database, tokens=0, message_text="Second {{value.who}}?", **fields) as left:
            await home.apply(shop={"flows": {"main": flow("A later version.")}})
        asked = orjson.loads(text(await left.frames()))
        system, first, answer, second = asked["messages"]
        assert system["content"] == "As a pirate, in fr."
        assert (first["content"], answer["content"]) == ("First question?", "First answer.")
        words, seen = second["content"]
        assert words["text"] == "Second {{value.who}}?"
        assert seen["image_url"]["url"].startswith("data:image/png;base64,")
        assert asked["temperature"] == 0.5


async def test_a_history_that_was_given_is_given_again(house: Open, database: str) -> None:
    async with house() as home:
        await home.apply(
            shop={"flows": {"main": flow(wishes={"echo": "1", "fault": "silent", "times": 1, "key": "silent"})}}
        )
        history = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        async with leaving(home, database, tokens=0, conversation_history=history) as left:
            kept = await home.database.fetchval("select request from streaming_sessions")
            assert orjson.loads(kept)["history"] == history
        asked = orjson.loads(text(await left.frames()))
        assert [message["content"] for message in asked["messages"]] == ["x", "y", "Hello"]
        assert await home.database.fetchval("select request from streaming_sessions") is None


async def test_a_message_that_had_waited_is_begun_again_too(house: Open, database: str) -> None:
    async with house(scan_s=0.1) as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS)}})
        async with serving(database, drain_s=0) as first:
            body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "x", "session_id": "chat"}
            await first.post("/api/process-message", json=body)
            waiting = (await first.post("/api/process-message", json=body | {"chatbot_id": "shop"})).json()
            left = Left(home, waiting)
            async with asyncio.timeout(10):
                while await _said(home, left, "main") < 5:
                    pass
        frames = await left.frames()
        assert text(frames) == LONG
        end = only(frames, "flow_end")
        assert 0 < end["ttft_ms"] <= end["duration_ms"] < 60_000, "since it began, not since the machine did"


async def test_one_flow_that_was_stopped_before_stays_so(house: Open, database: str) -> None:
    async with house() as home:
        aside = flow(LONG, stream=True, wishes={"fault": "stall", "after": 5, "key": "aside"})
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS), "aside": aside}})
        async with leaving(home, database) as left:
            await home.database.execute("update streaming_sessions set cancel_flows = '{aside}'")
        frames = await left.frames()
        assert text(frames, "main") == LONG
        assert data_of(frames, "flow_end", "aside")[-1]["finish_reason"] == "cancelled"


# -- ended


async def ended_as(left: Left, code: str) -> None:
    """Failed, with the text it had; every flow that began has an end."""
    frames = await left.frames()
    assert data_of(frames, "flow_restart") == []
    assert only(frames, "stream_end")["error"]["code"] == only(frames, "flow_error")["code"] == code
    assert await left.saved() == ("partial", text(frames))
    error_id = only(frames, "stream_end")["error"]["error_id"]
    assert (await left.home.row(f"select code from error_logs where id = '{error_id}'"))["code"] == code


async def test_after_so_many_owners_it_fails(house: Open, database: str) -> None:
    async with house(owners=3) as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS)}})
        async with leaving(home, database) as left:
            # A drain does not count, so that this one has had three.
            await home.database.execute("update streaming_sessions set attempt = 4")
        await ended_as(left, "owner_lost")


async def test_what_began_long_ago_is_not_begun_again(house: Open, database: str) -> None:
    async with house(restart_age_s=60) as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS)}})
        async with leaving(home, database) as left:
            await home.database.execute("update streaming_events set created_at = now() - interval '2 minutes'")
        await ended_as(left, "owner_lost")


async def test_what_a_version_without_restarts_had_accepted_is_ended(house: Open, database: str) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS)}})
        async with leaving(home, database) as left:
            await home.database.execute("update streaming_sessions set request = null")
        await ended_as(left, "owner_lost")


async def test_what_it_needs_may_have_gone(house: Open, database: str) -> None:
    gone = {
        "question_gone": "delete from messages where role = 'user'",
        "image_unknown": "delete from images",
        "chatbot_version_gone": "delete from chatbots where id = 'shop'",
    }
    image = {"name": "p.png", "mime": "image/png", "data": b64encode(picture(size=(8, 6))).decode()}
    for code, statement in gone.items():
        async with house() as home:
            await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS, images=True)}})
            async with leaving(home, database, image_data=image, session_id=code) as left:
                await home.database.execute(statement)
            await ended_as(left, code)
            await home.database.execute("delete from messages")


async def test_a_replica_without_room_ends_what_is_stopped_and_waits_with_the_rest(house: Open, database: str) -> None:
    async with house({"mute": "demo?fault=silent"}, max_runs=1, scan_s=0.1) as home:
        await home.apply(shop={"flows": {"main": flow(LONG, wishes=STALLS | {"times": 2})}})
        async with leaving(home, database) as left, leaving(home, database, session_id="other") as stopped:
            occupied = (await home.post("mute")).json()
            await home.database.execute("update streaming_sessions set cancel_flows = '{}' where session_id = 'other'")
        assert only(await stopped.frames(), "stream_end")["status"] == "cancelled"
        assert await _status(home, left.accepted["streaming_session_id"]) == "active"
        await home.client.post(occupied["streaming_url"] + "/cancel")
        assert text(await left.frames()) == LONG
