"""The pause between flushes: none while little arrives, the whole gap under load."""

import asyncio
from time import perf_counter

import pytest

from app.streams.pace import Pace


async def test_a_calm_log_flushes_at_once() -> None:
    pace = Pace(60)
    async with asyncio.timeout(5):
        for _ in range(20):
            await pace.wait()
            pace.flushed(1)


async def test_a_busy_log_keeps_the_gap_between_the_starts_of_flushes() -> None:
    pace, begun = Pace(0.02), perf_counter()
    await pace.wait()
    pace.flushed(10_000)
    for flushes in range(1, 6):
        await pace.wait()
        # One that wakes up late does not keep the next one: only the whole is never too soon.
        assert perf_counter() - begun > flushes * 0.019
        pace.flushed(100)


async def test_a_pause_is_over_when_the_gap_has_passed_anyway() -> None:
    pace = Pace(1e-9)
    await pace.wait()
    pace.flushed(10_000)
    with pytest.raises(StopIteration):  # it does not wait at all
        pace.wait().send(None)
