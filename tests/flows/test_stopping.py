"""Stopping: the provider sees the close, the text is kept, and nothing of it can be done twice."""

import asyncio
import os
from pathlib import Path
from time import time
from typing import Any

from app.flows.stopping import _PATIENCE_S
from tests.flows.events import data_of, kinds, only, text
from tests.house import House, Open, flow
from tests.serving import client_of, serving
from tests.sse import read_stream

STATUS = "select status from streaming_sessions where id = $1"
ENDLESS = {"tokens": 5000, "delay_ms": 10}


async def until_event(home: House, url: str, number: int) -> None:
    async with asyncio.timeout(10):
        while (await home.client.get(url)).json()["last_event_id"] < number:
            pass


async def request_of(home: House, key: str) -> dict[str, Any]:
    """What the provider saw of the one request with this key, once it is over."""
    async with client_of(home.demo.removesuffix("/v1")) as demo:
        response = await demo.get("/demo/requests", params={"key": key, "wait": 1})
    [record] = response.json()["requests"]
    assert isinstance(record, dict)
    return record


async def test_g9_cancel_closes_the_provider_and_keeps_the_text(house: Open) -> None:
    async with house() as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS | {"key": "stop"})}})
        answer = (await home.post("slow")).json()
        await until_event(home, answer["streaming_url"], 6)
        asked = time()
        stopped = (await home.client.post(answer["streaming_url"] + "/cancel")).json()
        record = await request_of(home, "stop")
        assert record["closed_at"] - asked < 1
        assert (stopped["success"], stopped["session_status"], stopped["upstream_closed"]) == (True, "cancelled", True)
        assert 0 <= stopped["upstream_close_ms"] < 1000
        frames = await read_stream(home.client, answer["streaming_url"])
        assert stopped["last_event_id"] == frames[-1].number
        assert kinds(frames) == ["stream_start", "flow_start", "token", "flow_end", "message", "stream_end"]
        assert only(frames, "flow_end")["finish_reason"] == "cancelled"
        end = only(frames, "stream_end")
        assert end["status"] == "cancelled"
        assert "error" not in end
        row = await home.database.fetchrow("select status, content from messages where role = 'assistant'")
        assert row is not None
        assert tuple(row) == ("partial", text(frames))
        assert await home.database.fetchval("select outcome from usage_ledger") == "cancelled"
        assert await home.database.fetchval("select status from conversation_sessions") == "idle"
        assert await home.count("error_logs") == 0


async def test_what_a_stopped_answer_has_cost_is_recorded_as_far_as_it_was_told(house: Open) -> None:
    async with house() as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS) | {"provider": "claude"}}})
        url = (await home.post("slow")).json()["streaming_url"]
        await until_event(home, url, 6)
        await home.client.post(url + "/cancel")
        told = only(await read_stream(home.client, url), "stream_end")["usage"]
        assert told["prompt_tokens"] > 0
        row = await home.database.fetchrow("select prompt_tokens, completion_tokens from usage_ledger")
        assert row is not None
        assert dict(row) == told


async def test_k10_cancel_twice_and_after_the_end(house: Open) -> None:
    async with house() as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS)}})
        answer = (await home.post("slow")).json()
        url = answer["streaming_url"] + "/cancel"
        both = await asyncio.gather(home.client.post(url), home.client.post(url, json={}))
        again = await home.client.post(url)
        told = [response.json() for response in (*both, again)]
        assert {(t["session_status"], t["upstream_closed"], t["last_event_id"]) for t in told} == {
            ("cancelled", True, told[0]["last_event_id"])
        }
        done, frames = await home.ask()
        after = (await home.client.post(done["streaming_url"] + "/cancel")).json()
        assert (after["session_status"], after["last_event_id"]) == ("completed", frames[-1].number)
        assert len(await read_stream(home.client, done["streaming_url"])) == len(frames)


async def test_a_stop_between_the_last_token_and_the_saving_leaves_the_answer_whole(house: Open) -> None:
    flows = {"main": flow("Hello.", wishes={"first_ms": 500}), "next": flow("Ask more?")}
    shop = {"flows": flows, "plan": [["answer"], ["next"]]}
    async with house() as home:
        await home.apply(shop=shop)
        async with home.database.transaction():
            answer = (await home.post("shop")).json()
            url = answer["streaming_url"]
            await home.database.execute("lock table messages in share row exclusive mode")
            await until_event(home, url, 4)
            stopped = (await home.client.post(url + "/cancel")).json()
            assert (stopped["session_status"], stopped["upstream_closed"]) == ("active", True)
        frames = await asyncio.wait_for(read_stream(home.client, url), 10)
        assert kinds(frames) == ["stream_start", "flow_start", "token", "flow_end", "message", "stream_end"]
        assert only(frames, "stream_end")["status"] == "completed"
        assert (await home.client.post(url + "/cancel")).json()["session_status"] == "completed"
        assert await home.database.fetchval("select status from messages where role = 'assistant'") == "complete"


async def test_a_stop_ends_the_wait_for_the_next_try_at_once(house: Open) -> None:
    busy = {"fault": "status", "status": 429, "retry_after": 9, "key": "busy"}
    async with house() as home:
        await home.apply(slow={"flows": {"main": flow("Hello.", wishes=busy)}})
        url = (await home.post("slow")).json()["streaming_url"]
        await request_of(home, "busy")
        asked = time()
        stopped = (await home.client.post(url + "/cancel")).json()
        assert (stopped["session_status"], stopped["upstream_closed"]) == ("cancelled", True)
        assert time() - asked < 3
        frames = await read_stream(home.client, url)
        assert kinds(frames) == ["stream_start", "flow_start", "flow_end", "stream_end"]


async def test_cancel_of_what_is_not_there(house: Open) -> None:
    async with house() as home:
        for stream_id in ("01a1fcf2-a3fd-7e2e-9ef4-ed04db06a447", "x", "%00"):
            response = await home.client.post(f"/api/stream-events/{stream_id}/cancel")
            assert (response.status_code, response.json()["code"]) == (404, "stream_unknown")
        answer, _ = await home.ask()
        for body in (b"[]", b"{", b'{"flow": 7}'):
            response = await home.client.post(answer["streaming_url"] + "/cancel", content=body)
            assert response.status_code in (400, 422)


async def test_one_flow_may_be_stopped_and_the_others_go_on(house: Open) -> None:
    flows = {"main": flow("Hello.", wishes={"first_ms": 300}), "side": flow(wishes=ENDLESS | {"key": "side"})}
    async with house() as home:
        await home.apply(shop={"flows": flows})
        answer = (await home.post("shop")).json()
        await until_event(home, answer["streaming_url"], 3)
        stopped = (await home.client.post(answer["streaming_url"] + "/cancel", json={"flow": "side"})).json()
        assert (stopped["session_status"], stopped["upstream_closed"]) == ("active", True)
        assert (await request_of(home, "side"))["closed_at"] is not None
        frames = await read_stream(home.client, answer["streaming_url"])
        assert only(frames, "flow_end", "side")["finish_reason"] == "cancelled"
        assert data_of(frames, "flow_output") == []
        assert only(frames, "stream_end")["status"] == "completed"
        assert text(frames) == "Hello."


async def test_a_flow_that_has_not_begun_can_be_stopped_too(house: Open) -> None:
    flows = {"main": flow("Hello.", wishes={"first_ms": 200}), "next": flow("Ask more?")}
    async with house() as home:
        await home.apply(shop={"flows": flows, "plan": [["answer"], ["next"]]})
        answer = (await home.post("shop")).json()
        assert (await home.client.post(answer["streaming_url"] + "/cancel", json={"flow": "next"})).status_code == 200
        frames = await read_stream(home.client, answer["streaming_url"])
        assert data_of(frames, "flow_output") == []
        assert only(frames, "stream_end")["status"] == "completed"


async def test_however_many_flows_are_asked_to_stop_few_are_kept(house: Open) -> None:
    async with house() as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS)}})
        url = (await home.post("slow")).json()["streaming_url"] + "/cancel"
        for number in range(120):
            assert (await home.client.post(url, json={"flow": f"nobody{number % 60}"})).status_code == 200
        kept = await home.database.fetchval("select cancel_flows from streaming_sessions")
        assert kept == [f"nobody{number}" for number in range(50)]


async def test_any_replica_may_be_asked(house: Open, database: str) -> None:
    async with house(scan_s=0.1) as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS | {"key": "far"})}})
        async with serving(database, drain_s=0) as other:
            answer = (await home.post("slow")).json()
            await until_event(home, answer["streaming_url"], 5)
            stopped = (await other.post(answer["streaming_url"] + "/cancel")).json()
            assert (stopped["session_status"], stopped["upstream_closed"]) == ("cancelled", True)
            assert (await request_of(home, "far"))["closed_at"] is not None


async def test_an_owner_that_does_not_look_is_told_of_honestly(house: Open, database: str) -> None:
    async with house(scan_s=60, poll_s=60, bus="poll") as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS)}})
        async with serving(database, drain_s=0) as other:
            answer = (await home.post("slow")).json()
            await until_event(home, answer["streaming_url"], 5)
            stopped = (await other.post(answer["streaming_url"] + "/cancel", timeout=_PATIENCE_S + 5)).json()
            assert (stopped["session_status"], stopped["upstream_closed"]) == ("active", False)
            assert stopped["upstream_close_ms"] is None
            assert await home.database.fetchval("select cancel_flows from streaming_sessions") == []


async def test_an_owner_is_told_at_once_through_the_bus(house: Open, database: str) -> None:
    async with house(scan_s=60, poll_s=60) as home, serving(database, drain_s=0, poll_s=60) as other:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS)}})
        answer = (await home.post("slow")).json()
        await until_event(home, answer["streaming_url"], 5)
        stopped = (await other.post(answer["streaming_url"] + "/cancel")).json()
        assert (stopped["session_status"], stopped["upstream_closed"]) == ("cancelled", True)
        assert stopped["upstream_close_ms"] < 1000


async def test_a_takeover_ends_a_stopped_answer_as_cancelled(house: Open) -> None:
    async with house(beat_s=0.1, scan_s=0.1) as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS)}})
        answer = (await home.post("slow")).json()
        await until_event(home, answer["streaming_url"], 5)
        await home.database.execute("update replicas set alive = false")
        await home.database.execute("update streaming_sessions set cancel_flows = '{}'")
        frames = await asyncio.wait_for(read_stream(home.client, answer["streaming_url"]), 20)
        assert only(frames, "stream_end")["status"] == "cancelled"
        assert text(frames)


# -- U18: after many stops everything is as before

CANCELS = int(os.environ.get("PARLEY_TEST_CANCELS", "300"))
_AT_ONCE = 50


async def _stopped_at_some_point(home: House, number: int) -> None:
    while (response := await home.post("slow")).status_code == 503:  # too many at once for a busy machine
        await asyncio.sleep(0.1)
    answer = response.json()
    if number % 3:
        await home.client.get(answer["streaming_url"], params={"after": number % 3, "wait": 5})
    stopped = (await home.client.post(answer["streaming_url"] + "/cancel")).json()
    assert stopped["upstream_closed"], stopped
    # On a busy machine its end may be written after the answer to the stop was due.
    frames = await read_stream(home.client, answer["streaming_url"])
    assert only(frames, "stream_end")["status"] == "cancelled"


def _memory_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def _held() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())


async def test_u18_many_stops_leave_nothing_behind(house: Open) -> None:
    async with house() as home:
        await home.apply(slow={"flows": {"main": flow(wishes=ENDLESS), "side": flow(wishes=ENDLESS)}})
        await home.ask()
        before, memory = _held(), [0.0]
        for start in range(0, CANCELS, _AT_ONCE):
            memory.append(_memory_mb())
            async with asyncio.TaskGroup() as tasks:
                for number in range(start, start + _AT_ONCE):
                    tasks.create_task(_stopped_at_some_point(home, number))
        _, frames = await home.ask()
        assert only(frames, "stream_end")["status"] == "completed"
        async with asyncio.timeout(20):
            # The test's own client keeps up to its pool's connections, each with a server's end in this process.
            while _held()[0] > before[0] + 2 * 2 * _AT_ONCE or _held()[1] > before[1] + _AT_ONCE:
                await asyncio.sleep(0.05)
        # Caches and pools fill up in the first half; what grows in the second would never end.
        assert _memory_mb() - memory[len(memory) // 2] < 32
        ended = "select count(*) from streaming_sessions where status = 'cancelled'"
        assert await home.database.fetchval(ended) == CANCELS
        assert await home.database.fetchval("select count(*) from conversation_sessions where status <> 'idle'") == 0
        metrics = (await home.client.get("/metrics")).text
        assert "parley_active_streams 0.0" in metrics


# -- cancel_when_abandoned_s


async def test_an_answer_nobody_reads_goes_on_unless_its_chatbot_says_otherwise(house: Open) -> None:
    async with house(scan_s=0.05) as home:
        bot = {"flows": {"main": flow(wishes=ENDLESS)}}
        await home.apply(kept=bot, left=bot | {"cancel_when_abandoned_s": 0.3})
        kept, left = (await home.post("kept")).json(), (await home.post("left")).json()
        async with asyncio.timeout(10):
            while await home.database.fetchval(STATUS, left["streaming_session_id"]) != "cancelled":
                await asyncio.sleep(0.02)
        assert await home.database.fetchval(STATUS, kept["streaming_session_id"]) == "active"


async def test_a_reader_anywhere_keeps_the_answer_going(house: Open, database: str) -> None:
    bot = {"flows": {"main": flow(wishes={"tokens": 100, "delay_ms": 10})}, "cancel_when_abandoned_s": 0.5}
    async with house(scan_s=0.05) as home, serving(database, drain_s=0, scan_s=0.05) as other:
        await home.apply(here=bot, there=bot)
        here, there = (await home.post("here")).json(), (await home.post("there")).json()
        ends = await asyncio.gather(
            read_stream(home.client, here["streaming_url"]), read_stream(other, there["streaming_url"])
        )
        assert [only(frames, "stream_end")["status"] for frames in ends] == ["completed", "completed"]
