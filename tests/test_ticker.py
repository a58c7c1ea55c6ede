"""Jobs that fail come again, in time and when they are wanted."""

import asyncio
from collections.abc import Callable

from app.ticker import every, whenever


class Job:
    """Fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.passes = 0

    async def run_once(self) -> None:
        self.passes += 1
        if self.passes <= self.failures:
            raise OSError("not now")


async def test_a_job_comes_sooner_when_asked_and_soon_after_a_failure() -> None:
    job, failing, sooner = Job(failures=1), set[str](), asyncio.Event()
    loop = asyncio.ensure_future(every(600, job.run_once, name="x", failing=failing, sooner=sooner, again_s=0.001))
    await _until(lambda: job.passes == 2 and not failing)
    sooner.set()
    await _until(lambda: job.passes == 3)
    loop.cancel()


async def test_a_job_that_nobody_wants_is_left_alone_and_one_that_failed_is_wanted_again() -> None:
    job, failing, wanted = Job(failures=2), set[str](), asyncio.Event()
    loop = asyncio.ensure_future(whenever(wanted, job.run_once, name="x", failing=failing, again_s=0.001))
    await asyncio.sleep(0)
    assert job.passes == 0
    wanted.set()
    await _until(lambda: "x" in failing)
    await _until(lambda: job.passes == 3 and not failing)
    loop.cancel()


async def _until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0)
