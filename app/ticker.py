"""The one loop around every periodic job: a failed pass is recorded and the next one comes all the same."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

# A rare job that failed is tried again this soon, in seconds.
_SOON_S = 30


async def every(
    seconds: float,
    run_once: Callable[[], Awaitable[object]],
    *,
    name: str,
    failing: set[str],
    sooner: asyncio.Event | None = None,
    again_s: float = _SOON_S,
) -> None:
    """Call `run_once` now and then `seconds` after each pass has ended, or `sooner`, until cancelled.

    After a failure it is called again after `again_s` at the latest. Its name is in `failing` from a failed pass to
    the next good one.
    """
    sooner = sooner or asyncio.Event()
    while True:
        sooner.clear()
        good = await _pass(run_once, name, failing)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds if good else min(seconds, again_s)):
                await sooner.wait()


async def whenever(
    wanted: asyncio.Event,
    run_once: Callable[[], Awaitable[object]],
    *,
    name: str,
    failing: set[str],
    again_s: float = 1,
) -> None:
    """Call `run_once` when it is wanted, until cancelled; after a failure it is wanted again, but not at once."""
    while True:
        await wanted.wait()
        wanted.clear()
        if not await _pass(run_once, name, failing):
            await asyncio.sleep(again_s)
            wanted.set()


async def _pass(run_once: Callable[[], Awaitable[object]], name: str, failing: set[str]) -> bool:
    try:
        await run_once()
    except Exception as error:  # noqa: BLE001  one pass of a job; the next may do better
        level = log.debug if name in failing else log.warning
        level("job_failed", job=name, error=type(error).__name__, detail=str(error)[:300])
        failing.add(name)
        return False
    failing.discard(name)
    return True
