"""A real browser's EventSource reads an answer, is cut in the middle, resumes and ends by itself.

Debian's chromium through its own driver. PARLEY_REQUIRE_BROWSER=1 makes their absence a failure.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import httpx2
import pytest
from selenium.webdriver import Chrome, ChromeOptions, ChromeService

from app.demo import demo_provider
from app.streams.event import Kind
from tests.reader import ask, assert_whole, poll
from tests.serving import apply_demo, serving
from tests.wire import Wire

# Reconnecting after a tenth of a second, and a heartbeat between nearly all events: it must not disturb them.
PACE = {"sse_retry_ms": 100, "sse_heartbeat_s": 0.02, "poll_s": 0.2, "drain_s": 0}
MODELS = {"calm": "demo?delay_ms=20&tokens=150", "short": "demo?delay_ms=20&tokens=20"}

# EventSource hands named events to listeners of that name only. Ours called `message` would hear nameless ones, too.
OPEN = """
const [url, kinds] = arguments;
window.seen = []; window.ids = []; window.opened = 0;
window.source = new EventSource(url);
source.onopen = () => { opened += 1; };
for (const kind of kinds) source.addEventListener(kind, (event) => {
    ids.push(event.lastEventId);
    seen.push(JSON.parse(event.data));
});
"""
# Calls back when the condition holds, with everything that was seen.
WHEN = """
const done = arguments[arguments.length - 1];
const look = () => (%s) ? done({seen, ids, opened, state: source.readyState}) : setTimeout(look, 5);
look();
"""
CLOSED = 2


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
        assert os.environ.get("PARLEY_REQUIRE_BROWSER") != "1", reason
        pytest.skip(reason)
    # Both paths are given: selenium would else look for them, and download what it does not find.
    folder = tmp_path_factory.mktemp("browser")
    service = ChromeService(driver, env={**os.environ, "TMPDIR": str(folder)})
    browser = Chrome(_options(chromium, folder / "profile"), service)
    browser.set_script_timeout(30)
    yield browser
    browser.quit()


def _options(chromium: str, profile: Path) -> ChromeOptions:
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "no-proxy-server",
        "disable-background-networking", "disable-component-update", "disable-sync", f"user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    return options


class Page:
    """A page of the gateway's own origin with one EventSource. Called in threads: the gateway needs the loop."""

    def __init__(self, browser: Chrome, origin: str) -> None:
        self._browser = browser
        self._origin = origin

    async def open(self, url: str) -> None:
        await asyncio.to_thread(self._browser.get, f"{self._origin}/livez")
        await asyncio.to_thread(self._browser.execute_script, OPEN, url, list(get_args(Kind)))

    async def when(self, condition: str) -> dict[str, Any]:
        found: dict[str, Any] = await asyncio.to_thread(self._browser.execute_async_script, WHEN % condition)
        return found

    async def close(self) -> None:
        await asyncio.to_thread(self._browser.execute_script, "source.close()")


class Way:
    """The one address the browser knows, and the gateway that is behind it at the moment."""

    def __init__(self) -> None:
        self.wire = Wire(lambda: asyncio.open_connection("127.0.0.1", self._port))
        self._port = 0

    def lead_to(self, client: httpx2.AsyncClient) -> None:
        assert client.base_url.port is not None
        self._port = client.base_url.port


@asynccontextmanager
async def way_to(client: httpx2.AsyncClient, browser: Chrome) -> AsyncGenerator[tuple[Way, Page], None]:
    way = Way()
    way.lead_to(client)
    async with await asyncio.start_server(way.wire.accept, "127.0.0.1", 0) as server:
        page = Page(browser, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield way, page
        await page.close()
        server.close()
        way.wire.cut()


@pytest.fixture
async def demo(database: str) -> AsyncGenerator[None, None]:
    async with demo_provider() as url:
        await apply_demo(database, url, MODELS)
        yield


def assert_read(found: dict[str, Any], accepted: dict[str, Any], events: list[dict[str, Any]], *, opened: int) -> None:
    """Every event once and in order, over so many connections, the last of which told the browser to stop."""
    assert found["seen"] == events
    assert found["ids"] == [f"{accepted['streaming_session_id']}:{event['id']}" for event in events]
    assert (found["opened"], found["state"]) == (opened, CLOSED)


async def test_an_answer_is_read_to_its_end_and_not_again(browser: Chrome, database: str, demo: None) -> None:
    async with serving(database, **PACE) as client, way_to(client, browser) as (_, page):
        accepted = await ask(client, "short")
        await page.open(accepted["streaming_url"])
        found = await page.when(f"source.readyState === {CLOSED}")
        events = await poll(client, accepted["streaming_url"])
    assert_whole(events, "completed")
    assert_read(found, accepted, events, opened=1)


async def test_a_cut_in_the_middle_loses_and_doubles_nothing(browser: Chrome, database: str, demo: None) -> None:
    async with serving(database, **PACE) as client, way_to(client, browser) as (way, page):
        accepted = await ask(client, "calm")
        await page.open(accepted["streaming_url"])
        for count in (10, 40, 70):
            await page.when(f"seen.length >= {count} && source.readyState === 1")
            way.wire.cut()
        found = await page.when(f"source.readyState === {CLOSED}")
        events = await poll(client, accepted["streaming_url"])
    assert_whole(events, "completed")
    assert_read(found, accepted, events, opened=4)


async def test_several_streams_over_one_connection_are_cut_and_resumed_together(
    browser: Chrome, database: str, demo: None
) -> None:
    async with serving(database, **PACE) as client, way_to(client, browser) as (way, page):
        streams = [(await ask(client, chatbot))["streaming_session_id"] for chatbot in ("calm", "short", "calm")]
        await page.open(f"/api/stream?streams={','.join(streams)}")
        for count in (20, 80, 140):
            await page.when(f"seen.length >= {count} && source.readyState === 1")
            way.wire.cut()
        found = await page.when(f"source.readyState === {CLOSED}")
        for stream in streams:
            events = await poll(client, f"/api/stream-events/{stream}")
            assert_whole(events, "completed")
            seen = zip(found["ids"], found["seen"], strict=True)
            assert [event for event_id, event in seen if event_id.startswith(stream)] == events
    assert found["opened"] == 4


async def test_a_server_that_stops_sends_its_readers_to_another(browser: Chrome, database: str, demo: None) -> None:
    async with serving(database, **PACE) as owner, AsyncExitStack() as leaving:
        accepted = await ask(owner, "calm")
        other = await leaving.enter_async_context(serving(database, **PACE))
        async with way_to(other, browser) as (way, page):
            await page.open(accepted["streaming_url"])
            await page.when("seen.length >= 10")
            way.lead_to(owner)
            await leaving.aclose()
            found = await page.when(f"source.readyState === {CLOSED}")
        events = await poll(owner, accepted["streaming_url"])
    assert_whole(events, "completed")
    assert_read(found, accepted, events, opened=2)
