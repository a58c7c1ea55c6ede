"""A message goes in, a durable answer streams out; each fault ends it the way the fault list says."""

import asyncio
from time import monotonic

import pytest

from app.demo.server import demo_provider
from tests.house import House, Open, flow
from tests.serving import apply_demo, client_of, serving
from tests.sse import Frame, read_stream


def kinds(frames: list[Frame]) -> list[str]:
    """Event kinds in order, neighbouring tokens once."""
    names = [frame.event for frame in frames]
    return [name for before, name in zip([None, *names], names, strict=False) if name != "token" or before != "token"]


def text(frames: list[Frame]) -> str:
    return "".join(frame.data["data"]["token"] for frame in frames if frame.event == "token")


async def saved(home: House, session_id: str) -> list[tuple[str, str, str]]:
    rows = await home.database.fetch(
        "select role, status, content from messages where chat_id = $1 order by position", session_id
    )
    return [(row["role"], row["status"], row["content"]) for row in rows]


async def test_the_whole_way(house: Open) -> None:
    async with house() as home:
        answer, frames = await home.ask(message_text="What is this?")
        assert answer["success"] is True
        assert answer["flow_type"] == "main"
        assert answer["streaming_url"] == f"/api/stream-events/{answer['streaming_session_id']}"
        assert kinds(frames) == ["stream_start", "flow_start", "token", "flow_end", "message", "stream_end"]
        assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
        assert frames[0].id == f"{answer['streaming_session_id']}:1"
        assert frames[-1].data["data"] == {
            "status": "completed",
            "usage": {"prompt_tokens": 4, "completion_tokens": 20},
        }
        assert await saved(home, answer["session_id"]) == [
            ("user", "complete", "What is this?"),
            ("assistant", "complete", text(frames)),
        ]
        message = frames[-2].data["data"]["message_id"]
        assert await home.database.fetchval("select content from messages where id = $1", message) == text(frames)


async def test_the_rows_that_existing_users_query(house: Open) -> None:
    async with house() as home:
        answer, frames = await home.ask()
        row = await home.database.fetchrow(
            "select * from streaming_sessions where id = $1", answer["streaming_session_id"]
        )
        assert row is not None
        assert (row["status"], row["last_event_id"]) == ("completed", len(frames))
        assert await home.database.fetchval("select status from conversation_sessions") == "idle"
        figures = await home.database.fetchrow("select * from conversation_processing_metrics")
        assert figures is not None
        assert (figures["status"], figures["events"], figures["completion_tokens"]) == ("completed", len(frames), 20)
        assert await home.database.fetchval("select outcome from usage_ledger") == "completed"


FAULTS = {
    "u3": ("fault=json_error", "upstream_", False),
    "u6": ("fault=reset&after=5", "upstream_unavailable", True),
    "u7": ("fault=eof&after=5", "upstream_unavailable", True),
    "u8": ("fault=error&after=5", "upstream_", True),
    "u12": ("fault=deep&after=0", "upstream_protocol", False),
    "u14": ("fault=redirect", "upstream_", False),
}


@pytest.mark.parametrize("name", FAULTS)
async def test_upstream_faults_end_the_stream_failed_and_keep_the_partial_text(house: Open, name: str) -> None:
    wishes, code, partial = FAULTS[name]
    async with house({"broken": f"demo?delay_ms=0&tokens=20&{wishes}"}, provider_retries=0) as home:
        answer, frames = await home.ask("broken")
        end = frames[-1].data["data"]
        assert (frames[-1].event, end["status"]) == ("stream_end", "failed")
        assert end["error"]["code"].startswith(code), end
        assert [frame.event for frame in frames].count("stream_end") == 1
        assert [frame.event for frame in frames].count("flow_error") == 1
        messages = await saved(home, answer["session_id"])
        assert messages[1:] == ([("assistant", "partial", text(frames))] if partial else [])
        assert bool(text(frames)) is partial
        assert await home.database.fetchval("select status from conversation_sessions") == "idle"
        found = "select count(*) from conversation_processing_metrics where error_code = $1"
        assert await home.database.fetchval(found, end["error"]["code"]) == 1


async def test_u1_nobody_listens(house: Open) -> None:
    async with house(provider_retries=0) as home:
        await home.database.execute(
            "update chatbots set configuration = replace(configuration, $1, 'http://127.0.0.1:9/v1')", home.demo
        )
        _, frames = await home.ask()
        assert frames[-1].data["data"]["error"]["code"] == "upstream_unavailable"


async def test_u2_failed_tries_before_the_first_token_leave_no_trace(house: Open) -> None:
    async with house({"busy": "demo?delay_ms=0&tokens=9&fault=status&status=529&times=2&key=u2&retry_after=0"}) as home:
        _, frames = await home.ask("busy")
        assert kinds(frames) == ["stream_start", "flow_start", "token", "flow_end", "message", "stream_end"]
        assert len([frame for frame in frames if frame.event == "token"]) == 9


@pytest.mark.parametrize(
    ("wishes", "settings"),
    [("fault=silent", {"first_token_timeout_s": 0.3}), ("fault=stall&after=5", {"gap_timeout_s": 0.3})],
)
async def test_u4_u5_silence_is_ended(house: Open, wishes: str, settings: dict[str, float]) -> None:
    async with house({"silent": f"demo?delay_ms=0&tokens=20&{wishes}"}, provider_retries=0, **settings) as home:
        answer, frames = await home.ask("silent")
        assert frames[-1].data["data"]["error"]["code"] == "upstream_timeout"
        assert bool(text(frames)) is ("stall" in wishes)
        assert len(await saved(home, answer["session_id"])) == (2 if "stall" in wishes else 1)


async def test_a_run_has_a_deadline(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=20&tokens=500"}, run_timeout_s=0.3) as home:
        _, frames = await home.ask("slow")
        assert frames[-1].data["data"]["error"]["code"] == "run_timeout"


async def test_the_deadline_ends_a_side_flow_that_runs_on_and_the_answer_stays_complete(house: Open) -> None:
    async with house(run_timeout_s=0.6) as home:
        await home.apply(shop={"flows": {"main": flow("Hello."), "side": flow(wishes={"first_ms": 60_000})}})
        answer, frames = await home.ask("shop")
        order = kinds(frames)
        assert order.index("message") < order.index("flow_error") == len(order) - 2
        assert frames[-2].data["data"]["code"] == "run_timeout"
        assert frames[-1].data["data"]["status"] == "completed"
        assert (await saved(home, answer["session_id"]))[1] == ("assistant", "complete", "Hello.")


async def test_the_deadline_ends_the_wait_for_the_next_try(house: Open) -> None:
    busy = {"fault": "status", "status": 429, "retry_after": 9}
    async with house(run_timeout_s=0.6) as home:
        await home.apply(shop={"flows": {"main": flow("Hello.", wishes=busy)}})
        began = monotonic()
        _, frames = await home.ask("shop")
        assert monotonic() - began < 5
        assert frames[-1].data["data"]["error"]["code"] == "run_timeout"


async def test_p12_a_huge_answer_is_cut(house: Open) -> None:
    async with house({"huge": "demo?delay_ms=0&tokens=5000"}, answer_limit=2048) as home:
        _, frames = await home.ask("huge")
        assert frames[-1].data["data"]["status"] == "completed"
        end = next(frame for frame in frames if frame.event == "flow_end")
        assert end.data["data"]["finish_reason"] == "length"
        assert 2048 <= len(text(frames).encode()) < 2048 + 8192


async def test_a_missing_key_is_told_without_naming_it(house: Open) -> None:
    async with house() as home:
        replace = "update chatbots set configuration = replace(configuration, $1, $2)"
        await home.database.execute(replace, '"api_key":null', '"api_key":"env:NO_SUCH_KEY"')
        _, frames = await home.ask()
        error = frames[-1].data["data"]["error"]
        assert error["code"] == "flow_misconfigured"
        assert "NO_SUCH_KEY" not in error["message"]


async def test_g9_a_reader_leaving_does_not_end_the_run(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=10&tokens=40"}) as home:
        answer = (await home.post("slow")).json()
        url = answer["streaming_url"]
        async with home.client.stream("GET", url, headers={"Accept": "text/event-stream"}) as response:
            async for _ in response.aiter_raw():
                break
        frames = await read_stream(home.client, url)
        assert frames[-1].data["data"]["status"] == "completed"
        assert len([frame for frame in frames if frame.event == "token"]) == 40


async def test_a_log_that_cannot_write_is_degraded_and_goes_on_where_it_was(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=10&tokens=60"}, poll_s=0.05) as home:
        url = (await home.post("slow")).json()["streaming_url"]
        await until_event(home, url, 5)
        await home.database.execute("alter table streaming_events rename to away")
        async with asyncio.timeout(10):
            while (await home.client.get("/api/conversation-health")).json()["status"] != "degraded":
                pass
        assert (await home.client.get("/readyz?verbose")).json()["failing"] == ["log"]
        await home.database.execute("alter table away rename to streaming_events")
        frames = await asyncio.wait_for(read_stream(home.client, url), 20)
        assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
        assert frames[-1].data["data"]["status"] == "completed"
        assert (await home.client.get("/api/conversation-health")).json()["status"] == "healthy"


# -- U17: whatever ends a run early, the provider sees the close within a second


async def seen_closed(base_url: str, key: str) -> None:
    """Return when the provider has seen that its connection was closed before its answer was whole."""
    async with client_of(base_url.removesuffix("/v1")) as demo:
        response = await demo.get("/demo/requests", params={"key": key, "wait": 1})
    (record,) = response.json()["requests"]
    assert record["closed_at"] is not None


async def test_u17_deadline(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=20&tokens=5000&key=deadline"}, run_timeout_s=0.5) as home:
        started = monotonic()
        await home.ask("slow")
        await seen_closed(home.demo, "deadline")
        assert monotonic() - started < 1.5


async def test_u17_fence(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=20&tokens=5000&key=fence"}) as home:
        answer = (await home.post("slow")).json()
        await until_event(home, answer["streaming_url"], 5)
        await home.database.execute("update replicas set alive = false")
        fenced = monotonic()
        await seen_closed(home.demo, "fence")
        assert monotonic() - fenced < 1.5


async def test_u17_fence_where_nothing_is_written(house: Open) -> None:
    async with house({"mute": "demo?fault=silent&key=mute"}, beat_s=0.1) as home:
        await home.post("mute")
        await home.database.execute("update replicas set alive = false")
        fenced = monotonic()
        await seen_closed(home.demo, "mute")
        assert monotonic() - fenced < 1.5


async def test_u17_fence_while_the_likely_answer_is_held_back(house: Open) -> None:
    endless = {"tokens": 5000, "delay_ms": 20}
    names = ("intent", "main", "side")
    flows = {name: flow(wishes=endless | {"key": name}) for name in names} | {"other": flow("No.")}
    router = {"flow": "intent", "outcomes": {"yes": "other"}, "default": "main", "speculative": True}
    async with house(beat_s=0.1, scan_s=60) as home:
        await home.apply(shop={"flows": flows, "router": router, "plan": [["intent", "side"], ["answer"]]})
        answer = (await home.post("shop")).json()
        # All have been asked where the router's and the side flow's start can be read.
        await until_event(home, answer["streaming_url"], 3)
        await home.database.execute("update replicas set alive = false")
        fenced = monotonic()
        for name in names:
            await seen_closed(home.demo, name)
        assert monotonic() - fenced < 1.5
        assert await home.count("usage_ledger") == 0


async def test_u17_drain(house: Open, database: str) -> None:
    async with demo_provider() as url:
        await apply_demo(database, url, {"slow": "demo?delay_ms=20&tokens=5000&key=drain"})
        async with serving(database, drain_s=0) as client:
            body = {"user_id": "ann", "chatbot_id": "slow", "message_text": "Hello"}
            answer = (await client.post("/api/process-message", json=body)).json()
            while (await client.get(answer["streaming_url"])).json()["last_event_id"] < 5:
                pass
            left = monotonic()
        await seen_closed(url, "drain")
        assert monotonic() - left < 2


async def until_event(home: House, url: str, number: int) -> None:
    async with asyncio.timeout(10):
        while (await home.client.get(url)).json()["last_event_id"] < number:
            pass


async def test_a_fenced_server_goes_on_as_a_new_replica(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=5&tokens=100"}, beat_s=0.1, scan_s=0.1) as home:
        lost = (await home.post("slow")).json()
        await until_event(home, lost["streaming_url"], 5)
        await home.database.execute("update replicas set alive = false")
        frames = await asyncio.wait_for(read_stream(home.client, lost["streaming_url"]), 20)
        assert frames[-1].data["data"]["status"] == "completed"
        assert [frame.event for frame in frames].count("flow_restart") == 1
        assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
        async with asyncio.timeout(5):
            while (await home.post()).status_code != 200:
                pass
        assert await home.database.fetchval("select count(*) from replicas where alive") == 1


async def test_a_fenced_server_that_has_nothing_to_write_finds_out_too(house: Open) -> None:
    async with house(beat_s=0.1) as home:
        await home.database.execute("update replicas set alive = false")
        async with asyncio.timeout(5):
            while (await home.post()).status_code != 200:
                pass


async def test_p14_two_servers_in_one_process_stop_for_themselves(house: Open, database: str) -> None:
    async with house({"slow": "demo?delay_ms=10&tokens=60"}) as home:
        async with serving(database, drain_s=0) as other:
            assert (await other.get("/readyz")).status_code == 200
            url = (await home.post("slow")).json()["streaming_url"]
            reading = asyncio.ensure_future(read_stream(home.client, url))
            await until_event(home, url, 5)
        frames = await reading
        assert frames[-1].data["data"]["status"] == "completed"
        assert (await home.client.get("/readyz")).status_code == 200
