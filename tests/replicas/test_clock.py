"""Replicas whose clocks are wrong, or whose versions differ, and one that leaves a hundred answers to another."""

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.command import PARLEY
from tests.reader import assert_whole, poll, reading, text_of
from tests.replicas.test_kill import TAKEOVER_S, Replica, demo, listening, look  # noqa: F401
from tests.serving import until_ready

CLOCK = Path(__file__).parents[2] / "scripts" / "chaos" / "clock"
# Wrong by hours to either side; jumping; and two that are ten minutes apart.
CLOCKS = {"t1 ahead": ("7200", "0"), "t1 behind": ("-3600", "0"), "t1 stepping": ("5400~", "0"), "t2": ("-300", "300")}


def told(seconds: str) -> dict[str, str]:
    """What makes a replica's wall clock wrong by so many seconds."""
    path = os.pathsep.join(filter(None, (str(CLOCK), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "PARLEY_CHAOS_CLOCK_S": seconds}


@pytest.mark.parametrize("clocks", CLOCKS.values(), ids=CLOCKS)
async def test_wrong_clocks_change_nothing(database: str, look: Any, clocks: tuple[str, str]) -> None:  # noqa: F811
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(listening(database, **told(clock))) for clock in clocks]
        for replica in both:
            await until_ready(replica.client)
        wrong, other = both
        answers = [await replica.ask("short") for replica in (wrong, other, wrong)]
        for accepted in answers:
            events = await poll(other.client, accepted["streaming_url"])
            assert_whole(events, "completed")
            assert await poll(wrong.client, accepted["streaming_url"]) == events
        # A chat that both answer: its messages stand in the order they were sent (T3).
        for number in range(4):
            one = both[number % 2]
            accepted = await one.ask("quick", session_id="chat", message_text=f"number {number}")
            await poll(one.client, accepted["streaming_url"])
        said = await look.fetch("select role, content from messages where chat_id = 'chat' order by position")
        assert [row["content"] for row in said if row["role"] == "user"] == [f"number {number}" for number in range(4)]
        assert [row["role"] for row in said] == ["user", "assistant"] * 4
        # Neither has taken the other for dead, and nothing was cleaned up.
        assert await look.fetchval("select count(*) from replicas where alive") == 2
        assert await look.fetchval("select count(*) from streaming_sessions") == 7
        # The one with the wrong clock notices a death as anybody does.
        left = await other.ask("slow")
        async with reading(wrong.client, left["streaming_url"]) as reader:
            await reader.has(10)
            other.command.send(signal.SIGKILL)
            await _begun_again(look, left)


async def _begun_again(look: Any, accepted: dict[str, Any]) -> None:  # noqa: F811
    async with asyncio.timeout(TAKEOVER_S):
        while (
            await look.fetchval(
                "select attempt from streaming_sessions where id = $1", accepted["streaming_session_id"]
            )
            == 1
        ):
            await asyncio.sleep(0.05)


async def test_p10_two_versions_serve_side_by_side(database: str, look: Any) -> None:  # noqa: F811
    older = (sys.executable, "-c", "import app; app.__version__ = '0.0.9'; from app.__main__ import main; main()")
    async with listening(database, command=older) as old, listening(database, command=PARLEY) as new:
        await until_ready(old.client)
        await until_ready(new.client)
        versions = await look.fetch("select version from replicas where alive")
        assert len({row["version"] for row in versions}) == 2
        for owner, reader in ((old, new), (new, old)):
            accepted = await owner.ask("short")
            assert_whole(await poll(reader.client, accepted["streaming_url"]), "completed")
        left = await old.ask("slow")
        async with reading(new.client, left["streaming_url"]) as reader_of_it:
            await reader_of_it.has(10)
            await old.command.stop(signal.SIGKILL)
            await _begun_again(look, left)


# -- P1: a hundred answers when it is told to go


async def test_p1_a_hundred_answers_go_on_elsewhere(database: str, look: Any) -> None:  # noqa: F811
    async with (
        listening(database, PARLEY_DRAIN_S="0.5", PARLEY_USER_RUNS="1000") as leaving,
        listening(database, PARLEY_USER_RUNS="1000") as staying,
    ):
        await until_ready(leaving.client)
        await until_ready(staying.client)
        answers = await asyncio.gather(*(_ask(leaving, number) for number in range(100)))
        readers = [asyncio.ensure_future(poll(staying.client, answer["streaming_url"])) for answer in answers]
        async with asyncio.timeout(30):
            while await look.fetchval("select count(*) from streaming_events where id = 10") < 100:
                await asyncio.sleep(0.02)
        done = await leaving.command.stop(signal.SIGTERM, within_s=30)
        assert done.code == 0
        for answer, events in zip(answers, await asyncio.gather(*readers), strict=True):
            assert_whole(events, "completed")
            saved = "select content from messages where chat_id = $1 and role = 'assistant'"
            assert await look.fetchval(saved, answer["session_id"]) == text_of(events)


async def _ask(replica: Replica, number: int) -> dict[str, Any]:
    return await replica.ask("short", user_id=f"user-{number}")
