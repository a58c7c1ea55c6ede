"""The pause between flushes: none while little arrives, the whole gap under load."""

import asyncio
import itertools
from time import perf_counter

from app.streams.pace import Pace


async def test_a_calm_log_flushes_at_once() -> None:
    pace = Pace(60)
    async with asyncio.timeout(5):
        for _ in range(20):
            await pace.wait()
            pace.flushed(1)


async def test_a_busy_log_keeps_the_gap_between_the_starts_of_flushes() -> None:
    pace = Pace(0.02)
    await pace.wait()
    pace.flushed(10_000)
    starts = []
    for _ in range(5):
        await pace.wait()
        starts.append(perf_counter())
        pace.flushed(100)
    assert all(later - earlier >= 0.018 for earlier, later in itertools.pairwise(starts))


async def test_a_pause_is_over_when_the_gap_has_passed_anyway() -> None:
    pace = Pace(0.02)
    await pace.wait()
    pace.flushed(10_000)
    await asyncio.sleep(0.03)
    before = perf_counter()
    await pace.wait()
    assert perf_counter() - before < 0.02
