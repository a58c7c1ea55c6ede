"""A bounded number of something at once: others wait for it, not for ever, and everything comes back."""

import asyncio

import pytest

from app.chats.allowance import Allowance
from app.errors import Unavailable


async def test_units_are_taken_and_returned() -> None:
    allowance = Allowance(10, of="uploads", wait_s=0.01)
    async with allowance.take(7), allowance.take(3):
        with pytest.raises(Unavailable, match="Too many uploads") as refused:
            async with allowance.take(1):
                raise AssertionError
        assert (refused.value.code, refused.value.retry_after) == ("overloaded", 2)
    async with allowance.take(10):
        pass


async def test_whoever_waits_gets_what_others_return() -> None:
    allowance, order = Allowance(10, of="uploads"), []

    async def work(units: int) -> None:
        async with allowance.take(units):
            order.append(units)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for units in (6, 5, 4, 10, 1):
            tasks.create_task(work(units))
    assert sorted(order) == [1, 4, 5, 6, 10]
    assert order.index(5) > order.index(6)


async def test_one_holds_its_share_and_whoever_acts_for_many_leaves_one() -> None:
    allowance = Allowance(30, of="uploads", each=10, wait_s=0.01)
    async with allowance.take(6, user="ann"):
        with pytest.raises(Unavailable):
            async with allowance.take(5, user="ann"):
                raise AssertionError
        async with allowance.take(4, user="ann"), allowance.take(10, agent="shop"):
            with pytest.raises(Unavailable):
                async with allowance.take(11, agent="shop"):
                    raise AssertionError
            async with allowance.take(10, user="bob"):
                pass
    async with allowance.take(20, agent="shop"), allowance.take(10, user="ann"):
        pass
    async with allowance.take(10, agent="shop", user="ann"), allowance.take(10, agent="shop", user="bob"):
        for others in ({"agent": "shop", "user": "eve"}, {"user": "ann"}, {"agent": "other", "user": "bob"}):
            with pytest.raises(Unavailable):
                async with allowance.take(1, **others):
                    raise AssertionError
        async with allowance.take(10, agent="other", user="eve"):
            pass
    async with allowance.take(30):
        assert not allowance._held, "of those who hold nothing nothing is remembered"
    async with Allowance(1, of="pictures", each=1).take(agent="shop"):
        pass


async def test_whoever_leaves_the_queue_or_fails_takes_nothing_along() -> None:
    allowance = Allowance(1, of="uploads", wait_s=10)
    inside = asyncio.Event()

    async def wait() -> None:
        async with allowance.take():
            raise AssertionError

    async def fail() -> None:
        async with allowance.take():
            inside.set()
            await asyncio.Event().wait()

    failing = asyncio.create_task(fail())
    await inside.wait()
    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    for task in (waiting, failing):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(1), allowance.take():
        pass


async def test_settling_waits_for_all_of_it_and_not_for_ever() -> None:
    allowance, enough = Allowance(2, of="uploads"), asyncio.Event()
    await allowance.settle(60)

    async def hold() -> None:
        async with allowance.take(2):
            await enough.wait()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(hold())
        await asyncio.sleep(0)
        await allowance.settle(0.01)
        settled = tasks.create_task(allowance.settle(60))
        await asyncio.sleep(0)
        assert not settled.done()
        enough.set()
    await settled
