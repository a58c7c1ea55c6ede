"""Any interleaving of appends, flushes, broken connections and readers that drop and resume anywhere gives every
reader exactly the events after its cursor, once and in order; and ids 1..n without a gap in the table."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from app.streams.appending import Appender, Events
from app.streams.log import Limits, Writer
from tests.streams.engine import Engine, engine
from tests.streams.test_log import say

T = TypeVar("T")
STREAMS = 2


class BreakingAppender(Appender):
    """The real one, whose connection breaks just before or just after a commit when told to."""

    breaks: list[str]

    async def append(self, events: Events, *, again: bool) -> None:
        fault = self.breaks.pop() if self.breaks else ""
        if fault == "before":
            raise ConnectionResetError
        await super().append(events, again=again)
        if fault == "after":
            raise ConnectionResetError


class Reader:
    """One connection of a client: what it got, from which cursor on."""

    def __init__(self, parts: Engine, writer: Writer, cursor: int) -> None:
        self.stream_id, self.cursor = writer.stream_id, cursor
        self.got: list[int] = []
        self.task = asyncio.ensure_future(self._follow(parts))

    async def _follow(self, parts: Engine) -> None:
        async for batch in parts.tail.follow(self.stream_id, self.cursor, 600):
            self.got += range(batch.first, batch.last + 1)

    def check(self) -> None:
        assert self.got == list(range(self.cursor + 1, self.cursor + 1 + len(self.got)))


class LogMachine(RuleBasedStateMachine):
    dsn: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.readers: list[Reader] = []
        self.writers: list[Writer] = []
        self.appended: list[int] = []

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def start(self) -> None:
        self.context = engine(self.dsn, limits=Limits(flush_events=5), lane=False, appender_type=BreakingAppender)
        self.parts = self.run(self.context.__aenter__())
        assert isinstance(self.parts.appender, BreakingAppender)
        self.parts.appender.breaks = []
        self.writers = [self.run(self.parts.writer()) for _ in range(STREAMS)]
        self.appended = [1] * STREAMS

    @rule(stream=st.integers(0, STREAMS - 1), count=st.integers(1, 12))
    def append(self, stream: int, count: int) -> None:
        say(self.writers[stream], count)
        self.appended[stream] += count

    @rule()
    def flush(self) -> None:
        self.run(self.parts.log.flush())

    # Each costs a pause that doubles up to a second, so not too many in a row.
    @precondition(lambda self: len(self.parts.appender.breaks) < 4)
    @rule(fault=st.sampled_from(["before", "after"]))
    def break_connection(self, fault: str) -> None:
        assert isinstance(self.parts.appender, BreakingAppender)
        self.parts.appender.breaks.append(fault)

    @rule(stream=st.integers(0, STREAMS - 1), back=st.integers(0, 1000))
    def connect(self, stream: int, back: int) -> None:
        """A reader appears, or resumes, at any id that was committed."""
        writer = self.writers[stream]
        if len(self.readers) < 8:
            self.run(self._connect(writer, back % (writer.last_id + 1)))

    async def _connect(self, writer: Writer, cursor: int) -> None:
        self.readers.append(Reader(self.parts, writer, cursor))

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 7), resume=st.booleans())
    def drop(self, which: int, resume: bool) -> None:
        """A reader is cut off; its client may come back with the last id it saw."""
        reader = self.readers.pop(which % len(self.readers))
        reader.task.cancel()
        self.run(_settled(reader))
        reader.check()
        if resume:
            writer = next(w for w in self.writers if w.stream_id == reader.stream_id)
            self.run(self._connect(writer, reader.got[-1] if reader.got else reader.cursor))

    @rule(steps=st.integers(1, 5))
    def let_readers_run(self, steps: int) -> None:
        self.run(_turns(steps))

    @rule()
    def look_around(self) -> None:
        self.parts.hub.look_around(lambda _: False)

    @rule()
    def save_something_alone(self) -> None:
        self.run(self._alone())

    async def _alone(self) -> None:
        writer = self.writers[0]
        saving = asyncio.ensure_future(self.parts.streams.conclude(writer, "message", {"flow": "main"}, work=_nothing))
        while not saving.done():
            await self.parts.log.flush()
            await asyncio.sleep(0)
        await saving
        self.appended[0] += 1

    @invariant()
    def readers_see_no_gap_and_no_double(self) -> None:
        for reader in self.readers:
            reader.check()

    def teardown(self) -> None:
        if self.writers:
            self.run(self._end())
            self.run(self.context.__aexit__(None, None, None))
        self.loop.close()

    async def _end(self) -> None:
        lane = asyncio.ensure_future(self.parts.log.run())
        for writer, appended in zip(self.writers, self.appended, strict=True):
            await self.parts.end(writer)
            assert await self.parts.stored(writer.stream_id) == list(range(1, appended + 2))
        for reader in self.readers:
            await asyncio.wait_for(reader.task, 10)
            reader.check()
            end = dict(zip((w.stream_id for w in self.writers), self.appended, strict=True))[reader.stream_id] + 1
            assert reader.cursor + len(reader.got) == end
        lane.cancel()
        await asyncio.wait([lane])


async def _settled(reader: Reader) -> None:
    await asyncio.wait([reader.task])


async def _turns(steps: int) -> None:
    for _ in range(steps):
        await asyncio.sleep(0.001)


async def _nothing(_: object) -> None:
    return None


@pytest.fixture
def machine(database: str) -> type[LogMachine]:
    LogMachine.dsn = database
    return LogMachine


def test_every_reader_gets_exactly_what_follows_its_cursor(machine: type[LogMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
