"""GET /api/stream: several streams over one connection, as wire.md says it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import UUID, uuid4

import httpx2
import pytest
from starlette.datastructures import Headers, QueryParams

from app.errors import ParleyError
from app.streams.cursors import cursors_of
from app.streams.hub import Batch
from app.streams.multiplex import follow_all
from app.streams.tail import Tail
from app.wall import Wall
from tests.house import House, Open
from tests.reader import assert_whole
from tests.sse import Frame, frames
from tests.streams.engine import engine
from tests.streams.test_log import say

SSE = {"Accept": "text/event-stream"}
MODELS = {"slow": "demo?delay_ms=5&tokens=40", "mute": "demo?fault=silent"}
A, B = "0197c1a2-7b3c-4def-8a01-23456789abcd", "0197c1a2-7b3c-4def-8a01-000000000000"


async def ask(home: House, *chatbots: str) -> list[str]:
    """The ids of new streams, each in a session of its own."""
    return [(await home.post(chatbot)).json()["streaming_session_id"] for chatbot in chatbots]


async def read(home: House, streams: list[str], last_event_id: str = "") -> list[Frame]:
    """Everything until the server closes."""
    headers = SSE | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    async with home.client.stream("GET", "/api/stream", params={"streams": ",".join(streams)}, headers=headers) as got:
        assert got.status_code == 200
        return [frame async for frame in frames(got, several=True)]


def by_stream(read: list[Frame]) -> dict[str, list[dict[str, Any]]]:
    events: dict[str, list[dict[str, Any]]] = {}
    for frame in read:
        events.setdefault(frame.stream, []).append(frame.data)
    return events


async def test_each_stream_comes_whole_and_the_server_closes_after_the_last(house: Open) -> None:
    async with house(MODELS) as home:
        streams = await ask(home, "slow", "quick", "slow")
        got = await read(home, streams)
        events = by_stream(got)
        assert events.keys() == set(streams)
        for stream in streams:
            assert_whole(events[stream], "completed")
        assert got[0].retry is not None
        assert all(frame.retry is None for frame in got[1:])
        # Side by side, not one after the other: the first slow one still spoke after the second had begun.
        order = [frame.stream for frame in got]
        assert order.index(streams[2]) < len(order) - 1 - order[::-1].index(streams[0])


async def test_an_id_names_the_own_event_first_and_then_where_the_others_stand(house: Open) -> None:
    async with house() as home:
        streams = await ask(home, "quick", "quick")
        seen: dict[str, int] = {}
        for frame in await read(home, streams):
            seen[frame.stream] = frame.number
            own, *others = frame.id.split(",")
            assert own == f"{frame.stream}:{frame.number}"
            assert others == [f"{other}:{last}" for other, last in seen.items() if other != frame.stream]


async def test_one_stream_alone_has_the_frames_of_its_own_url(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
        got = await read(home, [answer["streaming_session_id"]])
        assert [(frame.id, frame.event, frame.data) for frame in got] == [(f.id, f.event, f.data) for f in whole]


async def test_k1_cut_at_every_frame_all_resume_exactly(house: Open) -> None:
    async with house({"short": "demo?delay_ms=2&tokens=8"}) as home:
        streams = await ask(home, "short", "quick", "short")
        params = {"streams": ",".join(streams)}
        got: list[Frame] = []
        while True:
            headers = SSE | ({"Last-Event-ID": got[-1].id} if got else {})
            async with home.client.stream("GET", "/api/stream", params=params, headers=headers) as response:
                if response.status_code == 204:
                    break
                async for frame in frames(response, several=True):
                    got.append(frame)
                    break
        for events in by_stream(got).values():
            assert_whole(events, "completed")
        assert len(by_stream(got)) == 3


async def test_cursors_in_the_url_begin_and_the_header_wins(house: Open) -> None:
    async with house() as home:
        streams = await ask(home, "quick", "quick")
        last = {stream: len(events) for stream, events in by_stream(await read(home, streams)).items()}
        first, second = streams
        got = by_stream(await read(home, [f"{first}:{last[first] - 2}", f"{second}:{last[second]}"]))
        assert {stream: len(events) for stream, events in got.items()} == {first: 2}
        got = by_stream(
            await read(home, [f"{first}:3", f"{second.upper()}:{last[second]}"], f"{first}:{last[first] - 1}")
        )
        assert {stream: len(events) for stream, events in got.items()} == {first: 1}


async def test_k7_204_400_404_410(house: Open) -> None:
    async with house(reader_streams=3) as home:
        streams = await ask(home, "quick", "quick")
        whole = await read(home, streams)
        last = {frame.stream: frame.number for frame in whole}
        first, second = streams

        async def told(asked: str | None, cursor: str = "") -> tuple[int, str, str]:
            params = {} if asked is None else {"streams": asked}
            headers = SSE | ({"Last-Event-ID": cursor} if cursor else {})
            response = await home.client.get("/api/stream", params=params, headers=headers)
            problem = response.json() if response.status_code >= 400 else {}
            return response.status_code, problem.get("code", ""), problem.get("detail", "")

        assert (await told(",".join(streams), whole[-1].id))[0] == 204
        assert (await told(f"{first}:{last[first]},{second}:{last[second]}"))[0] == 204
        for none in (None, "", ","):
            assert (await told(none))[:2] == (400, "bad_streams")
        assert (await told(f"{first},{second},{first}:3"))[:2] == (400, "bad_streams")
        assert (await told(",".join([first, second, A, B])))[:2] == (400, "bad_streams")
        for odd in (f"{first}:", f"{first}:x", f"{first}:-1", f"{first}:{'9' * 11}", f"{first}:3:4"):
            assert (await told(odd))[:2] == (400, "bad_cursor")
        for odd in ("x", "7", f"{first[:-1]}", "%00", "../x"):
            assert (await told(odd))[:2] == (404, "stream_unknown")
        for header in ("7", f"{A}:3", f"{first}:1,{A}:1", f"{first}:1,{first}:2", f"{first}:", f"{first}:1,"):
            assert (await told(",".join(streams), header))[:2] == (400, "bad_cursor")
        status, code, detail = await told(f"{first},{second}:{last[second] + 1}")
        assert (status, code) == (400, "cursor_beyond_end")
        assert second in detail
        status, code, detail = await told(f"{first},{A}")
        assert (status, code) == (404, "stream_unknown")
        assert A in detail
        await home.database.execute("delete from streaming_events where stream_id = $1", UUID(second))
        status, code, detail = await told(f"{first},{second}:3")
        assert (status, code) == (410, "stream_cleaned")
        assert second in detail
        assert (await told(f"{first}:{last[first]},{second}:{last[second]}"))[0] == 204


@pytest.mark.parametrize(
    ("streams", "header", "cursors"),
    [
        (f"{A},{B}", "", {A: 0, B: 0}),
        (f"{A}:17,{B}", "", {A: 17, B: 0}),
        (f"{A}:17,{B}:2", f"{A}:20", {A: 20, B: 2}),
        (f"{A}:17,{B}:2", f"{B}:1, {A}:0", {A: 0, B: 1}),
        (f"{A},,{B},", "", {A: 0, B: 0}),
    ],
)
def test_cursors_are_taken_from_the_header_before_the_url(streams: str, header: str, cursors: dict[str, int]) -> None:
    found = cursors_of(Headers({"last-event-id": header}), QueryParams(streams=streams), most=2)
    assert [*found.items()] == [(UUID(stream), cursor) for stream, cursor in cursors.items()]


def test_endless_cursors_are_refused_without_a_crash() -> None:
    for streams, header in ((f"{A}," * 5000, ""), (A, f"{A}:1," * 5000), (A, f"{'9' * 60_000}:1")):
        with pytest.raises(ParleyError):
            cursors_of(Headers({"last-event-id": header}), QueryParams(streams=streams), most=20)


# -- one connection


async def test_g15_first_bytes_at_once_and_heartbeats_while_all_are_silent(house: Open) -> None:
    async with house(MODELS, sse_heartbeat_s=0.05) as home:
        streams = await ask(home, "mute", "mute")
        for stream in streams:
            while (await home.client.get(f"/api/stream-events/{stream}")).json()["last_event_id"] < 2:
                pass
        params = {"streams": ",".join(f"{stream}:2" for stream in streams)}
        async with home.client.stream("GET", "/api/stream", params=params, headers=SSE) as response:
            assert response.headers["cache-control"] == "no-cache, no-transform"
            got = b""
            async for data in response.aiter_raw():
                got += data
                if got.count(b"\n") >= 4:
                    break
        assert got == b": hb\n" * got.count(b"\n")


async def test_it_is_one_reader_and_closing_it_leaves_nothing_behind(house: Open) -> None:
    async with house(MODELS, max_readers=1) as home:
        streams = await ask(home, "mute", "mute", "mute")
        async with opened(home, streams) as response:
            await anext(frames(response, several=True))
            assert "parley_readers 1.0" in (await home.client.get("/metrics")).text
            assert await retried(home, streams[:1])
        async with asyncio.timeout(5):
            while "parley_readers 0.0" not in (await home.client.get("/metrics")).text:
                pass
        assert [task for task in asyncio.all_tasks() if "_pump" in repr(task)] == []


def opened(home: House, streams: list[str]) -> Any:
    return home.client.stream("GET", "/api/stream", params={"streams": ",".join(streams)}, headers=SSE)


async def retried(home: House, streams: list[str]) -> bool:
    """Whether a reader is told to come back later, and nothing else."""
    response: httpx2.Response = await home.client.get("/api/stream", params={"streams": ",".join(streams)}, headers=SSE)
    return response.status_code == 200 and response.text.startswith("retry: ") and response.text.count("\n") == 1


async def test_it_ends_at_its_greatest_age_and_when_the_server_closes(house: Open) -> None:
    async with house(MODELS, sse_max_age_s=0.2, poll_s=0.05) as home:
        streams = await ask(home, "mute", "mute")
        got = by_stream(await read(home, streams))
        assert {stream: len(events) for stream, events in got.items()} == dict.fromkeys(streams, 2)


async def test_k9_head_and_options_are_answered_at_once(house: Open) -> None:
    async with house(MODELS) as home:
        streams = await ask(home, "mute", "mute")
        async with asyncio.timeout(2):
            head = await home.client.head("/api/stream", params={"streams": ",".join(streams)})
            options = await home.client.options("/api/stream")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"].startswith("text/event-stream")
        assert options.status_code == 204
        assert "GET" in options.headers["allow"]


# -- what is behind it


class Talkative(Tail):
    """Streams that always have something more to say, and say it without a pause."""

    async def follow(self, stream_id: UUID, cursor: int, max_age_s: float) -> AsyncGenerator[Batch, None]:
        while True:
            cursor += 1
            yield Batch(stream_id, cursor, cursor, b"", ended=False)


async def test_streams_that_never_pause_take_turns(database: str) -> None:
    async with engine(database) as parts:
        streams = [uuid4() for _ in range(5)]
        tail = Talkative(Wall(parts.pool), parts.hub, parts.log)
        async with aclosing(follow_all(tail, dict.fromkeys(streams, 0), 60)) as batches:
            order = [(await anext(batches)).stream_id for _ in range(500)]
        assert {order.count(stream) for stream in streams} <= {99, 100, 101}


async def test_what_fails_under_one_stream_ends_the_connection(database: str) -> None:
    async with engine(database) as parts:
        writer, other = await parts.writer(), await parts.writer()
        say(writer, 3)
        await writer.saved()
        following = follow_all(parts.tail, {writer.stream_id: 0, uuid4(): 0, other.stream_id: 0}, 60)
        with pytest.raises(ParleyError, match="no stream"):
            async for _ in following:
                pass
        assert parts.hub.readers == 0
