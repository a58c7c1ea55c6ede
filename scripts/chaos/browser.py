"""Chromium's EventSource as a reader, where there is a Chromium with its driver."""

import asyncio
import os
import shutil
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

from app.streams.event import Kind
from scripts.chaos.readers import Seen

_OPEN = """
const [path, kinds] = arguments;
window.sources = window.sources || {};
const source = new EventSource(path), seen = [];
sources[path] = {source, seen};
for (const kind of kinds) source.addEventListener(kind, (event) => seen.push(JSON.parse(event.data)));
"""
_TAKE = """
const {source, seen} = sources[arguments[0]];
return {seen: seen.slice(arguments[1]), state: source.readyState};
"""
_CLOSE = "sources[arguments[0]].source.close(); delete sources[arguments[0]];"
_CLOSED = 2
_LOOK_S = 0.2


class Browser:
    """One page with any number of EventSources. Its driver is called in a thread, one call at a time."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._turn = asyncio.Lock()
        self._page = ""

    async def open(self, origin: str) -> None:
        """A page of this origin; EventSources of others would be strangers."""
        if self._page != origin:
            await self._call(self._driver.get, f"{origin}/livez")
            self._page = origin

    async def read(self, seen: Seen, path: str) -> None:
        """Until the browser stops by itself: after the end, or for good where it was refused."""
        await self._call(self._driver.execute_script, _OPEN, path, list(get_args(Kind)))
        try:
            while True:
                found = await self._call(self._driver.execute_script, _TAKE, path, len(seen.events))
                for event in found["seen"]:
                    seen.take(event)
                if found["state"] == _CLOSED:
                    break
                await asyncio.sleep(_LOOK_S)
        finally:
            await asyncio.shield(self._call(self._driver.execute_script, _CLOSE, path))
        if not seen.ended:
            seen.refusals.append(f"the browser gave up at {seen.last}")

    async def _call(self, function: Any, *arguments: Any) -> Any:
        async with self._turn:
            return await asyncio.to_thread(function, *arguments)


@asynccontextmanager
async def running_browser(folder: Path) -> AsyncGenerator[Browser | None, None]:
    """None on a machine without one."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        yield None
        return
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run", "no-proxy-server",
        "disable-background-networking", "disable-component-update", "disable-sync",
        f"user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    service = ChromeService(driver, env={**os.environ, "TMPDIR": str(folder)})
    chrome = await asyncio.to_thread(Chrome, options, service)
    try:
        yield Browser(chrome)
    finally:
        await asyncio.to_thread(chrome.quit)
