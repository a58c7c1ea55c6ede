"""The one loop around every periodic job: a failed pass is recorded and the next one comes all the same."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

log = structlog.get_logger(__name__)

# A rare job that failed is tried again this soon, in seconds.
_SOON_S = 30


async def every(seconds: float, run_once: Callable[[], Awaitable[object]], *, name: str, failing: set[str]) -> None:
    """Call `run_once` now and then `seconds` after each pass has ended (sooner after a failure), until cancelled.

    Its name is in `failing` from a failed pass to the next good one.
    """
    while True:
        try:
            await run_once()
            failing.discard(name)
        except Exception as error:  # noqa: BLE001  one pass of a job; the next may do better
            level = log.debug if name in failing else log.warning
            level("job_failed", job=name, error=type(error).__name__, detail=str(error)[:300])
            failing.add(name)
        await asyncio.sleep(min(seconds, _SOON_S) if name in failing else seconds)
