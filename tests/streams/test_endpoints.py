"""GET /api/stream-events/{id}, as wire.md says it: pollers and EventSource on one URL."""

import asyncio
import ctypes
import re
import socket
import struct
import sys
from typing import Any

import pytest

from tests.house import House, Open
from tests.serving import client_of
from tests.sse import Frame, frames, read_stream

SSE = {"Accept": "text/event-stream"}
SLOW = {"slow": "demo?delay_ms=5&tokens=60", "mute": "demo?fault=silent"}


async def poll(home: House, url: str, **query: Any) -> dict[str, Any]:
    response = await home.client.get(url, params=query)
    assert response.status_code == 200, response.text
    page: dict[str, Any] = response.json()
    return page


async def poll_all(home: House, url: str, **query: Any) -> list[dict[str, Any]]:
    """Every event from the start, page by page, to the end of the stream."""
    events: list[dict[str, Any]] = []
    while True:
        page = await poll(home, url, after=len(events), **query)
        events += page["events"]
        assert page["last_event_id"] == len(events)
        if not page["has_more"]:
            return events


async def raw(home: House, url: str, **headers: str) -> bytes:
    async with home.client.stream("GET", url, headers=SSE | headers) as response:
        return b"".join([data async for data in response.aiter_raw()])


async def read_with_own_client(base_url: str, url: str) -> bytes:
    async with client_of(base_url) as client, client.stream("GET", url, headers=SSE) as response:
        return b"".join([data async for data in response.aiter_raw()])


# -- both readers


async def test_k8_poll_and_sse_give_the_same_events(house: Open) -> None:
    async with house(SLOW) as home:
        answer = (await home.post("slow")).json()
        url = answer["streaming_url"]
        polled, long_polled, streamed = await asyncio.gather(
            poll_all(home, url), poll_all(home, url, wait=5, limit=7), read_stream(home.client, url)
        )
        assert polled == long_polled == [frame.data for frame in streamed]
        assert [event["id"] for event in polled] == list(range(1, len(polled) + 1))


async def test_k1_a_reader_cut_at_every_event_gets_the_exact_remainder(house: Open) -> None:
    async with house({"short": "demo?delay_ms=2&tokens=12"}) as home:
        url = (await home.post("short")).json()["streaming_url"]
        got: list[Frame] = []
        while not got or got[-1].event != "stream_end":
            headers = SSE | ({"Last-Event-ID": got[-1].id} if got else {})
            async with home.client.stream("GET", url, headers=headers) as response:
                async for frame in frames(response):
                    got.append(frame)
                    break
        assert [frame.number for frame in got] == list(range(1, len(got) + 1))
        whole = await read_stream(home.client, url)
        assert [frame.data for frame in got] == [frame.data for frame in whole]


async def test_k1_a_finished_stream_replays_from_every_cursor(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
        url = answer["streaming_url"]
        for cursor in range(len(whole)):
            rest = await read_stream(home.client, url, str(cursor))
            assert [frame.data for frame in rest] == [frame.data for frame in whole[cursor:]]
            page = await poll(home, url, after=cursor)
            assert page["events"] == [frame.data for frame in whole[cursor:]]


# -- the frames


async def test_the_first_frame_carries_retry_and_ids_name_the_stream(house: Open) -> None:
    async with house(sse_retry_ms=2000) as home:
        answer, whole = await home.ask()
        assert whole[0].retry is not None
        assert 2000 <= whole[0].retry <= 3000
        assert all(frame.retry is None for frame in whole[1:])
        assert {frame.id.rpartition(":")[0] for frame in whole} == {answer["streaming_session_id"]}


async def test_headers_forbid_caching_buffering_and_compressing(house: Open) -> None:
    async with house() as home:
        answer, _ = await home.ask()
        headers = SSE | {"Accept-Encoding": "gzip, br"}
        async with home.client.stream("GET", answer["streaming_url"], headers=headers) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["cache-control"] == "no-cache, no-transform"
            assert response.headers["x-accel-buffering"] == "no"
            assert "content-encoding" not in response.headers


async def test_g15_first_bytes_at_once_then_heartbeats_without_a_blank_line(house: Open) -> None:
    async with house(SLOW, sse_heartbeat_s=0.05) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        while (await poll(home, url))["last_event_id"] < 2:
            pass
        async with home.client.stream("GET", url, headers=SSE | {"Last-Event-ID": "2"}) as response:
            read = b""
            async for data in response.aiter_raw():
                read += data
                if read.count(b"\n") >= 4:
                    break
        assert read == b": hb\n" * read.count(b"\n")


async def test_a_connection_ends_at_its_greatest_age_at_a_frame_boundary(house: Open) -> None:
    async with house(SLOW, sse_max_age_s=0.2, poll_s=0.05) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        await read_stream(home.client, url)


async def test_g13_a_closing_server_sends_readers_away_with_a_retry(house: Open) -> None:
    async with house(SLOW) as home:
        url = (await home.post("slow", message_text="x")).json()["streaming_url"]
        reading = asyncio.ensure_future(read_with_own_client(str(home.client.base_url), url))
        while b"parley_readers 1" not in (await home.client.get("/metrics")).content:
            pass
    text = (await reading).decode()
    assert "event: stream_end" not in text, "its next owner ends it"
    last = text.removesuffix("\n").rpartition("\n")[2]
    assert text.endswith(f"}}\n\n{last}\n")
    assert 1000 <= int(last.removeprefix("retry: ")) <= 1500


# -- where a cursor may stand


async def test_the_header_wins_over_the_query_and_all_names_are_known(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
        url, last = answer["streaming_url"], len(whole)
        for name in ("after", "last_event_id", "starting_after"):
            assert len((await poll(home, url, **{name: last - 1}))["events"]) == 1
            assert len((await poll(home, url, **{name: f"{answer['streaming_session_id']}:{last - 1}"}))["events"]) == 1
        headers = {"Last-Event-ID": f"{answer['streaming_session_id']}:{last - 2}"}
        response = await home.client.get(url, params={"after": 1}, headers=headers)
        assert len(response.json()["events"]) == 2


async def test_k7_204_400_404_410(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
        url, last = answer["streaming_url"], len(whole)

        async def status(path: str, cursor: str = "", accept: str = "text/event-stream") -> tuple[int, str]:
            headers = {"Accept": accept} | ({"Last-Event-ID": cursor} if cursor else {})
            async with home.client.stream("GET", path, headers=headers) as response:
                body = await response.aread()
                return response.status_code, response.json()["code"] if response.status_code >= 400 else str(len(body))

        assert await status(url, whole[-1].id) == (204, "0")
        for accept in ("text/event-stream", "application/json"):
            assert await status(url, str(last + 1), accept) == (400, "cursor_beyond_end")
            assert await status(url, "-1", accept) == (400, "bad_cursor")
            assert await status(url, "9" * 30, accept) == (400, "bad_cursor")
            assert await status(url, "9999999999", accept) == (400, "cursor_beyond_end")
            assert await status(url, f"{url}:3", accept) == (400, "bad_cursor")
            unknown = url[:-4] + "0000"
            assert await status(unknown, "", accept) == (404, "stream_unknown")
            for odd in ("x", "%00", "..%2fx", "a" * 10_000, url[-36:].replace("-", "")):
                assert (await status(f"/api/stream-events/{odd}", "", accept))[0] == 404
        await home.database.execute("delete from streaming_events")
        for accept in ("text/event-stream", "application/json"):
            assert await status(url, "3", accept) == (410, "stream_cleaned")
        assert await status(url, whole[-1].id) == (204, "0")
        page = await poll(home, url, after=last)
        assert (page["events"], page["has_more"], page["session_status"]) == ([], False, "completed")


async def test_g5_the_end_is_the_same_after_everything_was_restarted(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
    async with house() as home:
        page = await poll(home, answer["streaming_url"], after=len(whole))
        assert (page["session_status"], page["has_more"]) == ("completed", False)
        async with home.client.stream(
            "GET", answer["streaming_url"], headers=SSE | {"Last-Event-ID": whole[-1].id}
        ) as response:
            assert response.status_code == 204


# -- polling


async def test_pages_are_bounded_whatever_is_asked(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
        url = answer["streaming_url"]
        assert len((await poll(home, url, limit=3))["events"]) == 3
        assert (await poll(home, url, limit=3))["has_more"] is True
        for odd in ("0", "-5"):
            assert len((await poll(home, url, limit=odd))["events"]) == 1
        for odd in ("1e9", "inf", "nan"):
            assert len((await poll(home, url, limit=odd))["events"]) == len(whole)
        refused = await home.client.get(url, params={"limit": "many"})
        assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")


async def test_a_finished_page_has_an_etag_and_is_cached_privately(house: Open) -> None:
    async with house(SLOW) as home:
        answer, _ = await home.ask()
        response = await home.client.get(answer["streaming_url"])
        assert response.headers["cache-control"] == "private, max-age=3600"
        assert "Accept" in response.headers["vary"]
        etag = response.headers["etag"]
        again = await home.client.get(answer["streaming_url"], headers={"If-None-Match": etag})
        assert (again.status_code, again.content) == (304, b"")
        other = await home.client.get(answer["streaming_url"], params={"after": 3}, headers={"If-None-Match": etag})
        assert other.status_code == 200
        running = (await home.post("mute")).json()["streaming_url"]
        response = await home.client.get(running)
        assert response.headers["cache-control"] == "no-store"
        assert "etag" not in response.headers
        assert response.json()["has_more"] is True


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_k9_head_and_options_are_answered_at_once(house: Open, accept: str) -> None:
    async with house(SLOW) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        async with asyncio.timeout(2):
            head = await home.client.head(url, params={"wait": 30}, headers={"Accept": accept})
            options = await home.client.options(url, headers={"Accept": accept})
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"].startswith(accept)
        assert options.status_code == 204
        assert "GET" in options.headers["allow"]


async def test_events_are_counted_as_stored_and_delivered_and_none_as_lost_or_doubled(house: Open) -> None:
    async with house() as home:
        answer, whole = await home.ask()
        page = await poll(home, answer["streaming_url"])
        metrics = (await home.client.get("/metrics")).text.splitlines()
    assert f"parley_events_stored_total {len(whole) - 1}.0" in metrics  # the first one comes with the accept
    assert f"parley_events_delivered_total {len(whole) + len(page['events'])}.0" in metrics
    assert "parley_events_lost_total 0.0" in metrics
    assert "parley_events_doubled_total 0.0" in metrics


# -- overload and absence


async def test_g14_a_reader_too_many_is_told_to_come_back(house: Open) -> None:
    async with house(SLOW, max_readers=1) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        async with home.client.stream("GET", url, headers=SSE) as first:
            await anext(frames(first))
            text = await raw(home, url)
            assert text.startswith(b"retry: ")
            assert text.count(b"\n") == 1
            assert (await home.client.get("/api/conversation-health")).status_code == 200
        assert len((await poll(home, url))["events"]) >= 1


@pytest.mark.parametrize(("limit", "other"), [("stream_readers", False), ("user_readers", True), ("max_readers", True)])
async def test_g14_readers_are_counted_by_stream_by_user_and_by_replica(house: Open, limit: str, other: bool) -> None:
    """`other`: whether the first reader takes the place of one of another stream of the same user, too."""
    async with house(SLOW, **{limit: 1}) as home:
        url, second = [(await home.post("mute")).json()["streaming_url"] for _ in range(2)]
        strangers = (await home.post("mute", user_id="bob")).json()["streaming_url"]
        async with home.client.stream("GET", url, headers=SSE) as first:
            reading = frames(first)  # kept: it closes the connection when it is forgotten
            await anext(reading)
            assert (await raw(home, url)).startswith(b"retry: ")
            assert await admitted(home, second) is not other
            assert await admitted(home, strangers) is (limit != "max_readers")
        async with asyncio.timeout(5):
            while not await admitted(home, url):
                pass


async def admitted(home: House, url: str) -> bool:
    """Whether a reader of a stream gets its events and not only a time to come back."""
    async with home.client.stream("GET", url, headers=SSE) as response:
        assert response.status_code == 200
        text = b""
        async for data in response.aiter_raw():
            text += data
            if b"stream_start" in text:
                return True
    assert re.fullmatch(rb"retry: \d+\n", text)
    return False


async def test_g14_a_long_poll_is_a_reader_and_does_not_wait_where_there_are_too_many(house: Open) -> None:
    async with house(SLOW, stream_readers=1) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        while (last := (await poll(home, url))["last_event_id"]) < 2:
            pass
        polls = [
            asyncio.ensure_future(home.client.get(url, params={"after": last, "wait": 30}, timeout=60))
            for _ in range(2)
        ]
        done, waiting = await asyncio.wait(polls, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        (at_once,) = [poll.result() for poll in done]
        assert (at_once.json()["events"], at_once.headers["retry-after"]) == ([], "1")
        assert not await admitted(home, url)
        for poll_that_waits in waiting:
            poll_that_waits.cancel()


def deafen(connection: socket.socket) -> None:
    """Have the kernel drop whatever comes in, so that nothing is acknowledged: to the server its client is gone."""
    drop_all = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # one instruction: return 0
    program = struct.pack("@HP", 1, ctypes.addressof(drop_all))
    connection.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a half-open client is kept until the kernel gives up")
async def test_k11_a_half_open_client_is_freed_within_heartbeat_and_send_timeout(house: Open) -> None:
    async with house(SLOW, sse_send_timeout_s=0.5, sse_heartbeat_s=0.1) as home:
        url = (await home.post("mute")).json()["streaming_url"]
        reader, writer = await asyncio.open_connection(home.client.base_url.host, home.client.base_url.port)
        writer.write(f"GET {url} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
        await reader.readuntil(b"flow_start")
        deafen(writer.get_extra_info("socket"))
        async with asyncio.timeout(10):
            while b"parley_readers 0" not in (await home.client.get("/metrics")).content:
                pass
        writer.transport.abort()


async def test_k11_a_reader_that_takes_nothing_is_freed(house: Open) -> None:
    async with house({"flood": "demo?delay_ms=0&tokens=100000"}, sse_send_timeout_s=0.3, sse_heartbeat_s=0.1) as home:
        url = (await home.post("flood")).json()["streaming_url"]
        reader, writer = await asyncio.open_connection(home.client.base_url.host, home.client.base_url.port)
        writer.write(f"GET {url} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode())
        await reader.readline()
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        async with asyncio.timeout(60):
            while b"parley_readers 1" not in (await home.client.get("/metrics")).content:
                pass
            while b"parley_readers 0" not in (await home.client.get("/metrics")).content:
                pass
        writer.transport.abort()
        assert (await poll(home, url))["last_event_id"] > 0
