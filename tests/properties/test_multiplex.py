"""Several streams over one connection that is cut anywhere, also in the middle of a frame, and resumed with the last id
it saw: every stream gives exactly 1..n, once and in order, whatever is written meanwhile and by whom."""

import asyncio
import re
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from starlette.datastructures import Headers, QueryParams

from app.streams.cursors import cursors_of
from app.streams.log import Limits, Writer
from app.streams.multiplex import follow_all
from app.streams.stream import Stream
from tests.streams.engine import Engine, engine
from tests.streams.test_log import say

T = TypeVar("T")
STREAMS = 3
FRAME = re.compile(rb"id: (?P<own>[^,\n]+)(?P<others>(?:,[^,\n]+)*)\nevent: [a-z_]+\ndata: \{\"id\":(?P<id>\d+),.*\n\n")


class Client:
    """An EventSource: it knows whole frames only, and the id of the last one."""

    def __init__(self, parts: Engine, streams: list[UUID]) -> None:
        self._parts = parts
        self._query = QueryParams(streams=",".join(map(str, streams)))
        self._streams = streams
        self.last_id = ""
        self.got: dict[UUID, int] = dict.fromkeys(streams, 0)
        self.connection: asyncio.Task[None] | None = None
        self._wire = b""
        self._room = asyncio.Event()

    async def connect(self) -> bool:
        """False where the server says that there is nothing more to come."""
        self.cut()
        headers = Headers({"last-event-id": self.last_id} if self.last_id else {})
        cursors = cursors_of(headers, self._query, most=STREAMS)
        assert cursors == self.got
        states = await self._parts.tail.states(cursors, owner=None)
        ended = {stream_id for stream_id, cursor in cursors.items() if states[stream_id].ended_at(cursor)}
        if len(ended) == len(cursors):
            return False
        self.connection = asyncio.ensure_future(self._receive(cursors, ended))
        return True

    async def _receive(self, cursors: dict[UUID, int], ended: set[UUID]) -> None:
        async with aclosing(follow_all(self._parts.tail, cursors, 600, ended=ended)) as batches:
            async for batch in batches:
                self._wire += batch.frames
                self._room.clear()
                await self._room.wait()

    def read(self, size: int) -> None:
        """Take so many bytes off the wire; what they complete is seen."""
        taken, end = self._wire[:size], 0
        for frame in FRAME.finditer(self._wire, 0, len(taken)):
            assert frame.start() == end
            end = frame.end()
            self._see(frame)
        self._wire = self._wire[end:]
        if not self._wire:
            self._room.set()

    def _see(self, frame: re.Match[bytes]) -> None:
        stream, number = frame["own"].decode().split(":")
        stream_id = UUID(stream)
        assert int(number) == int(frame["id"]) == self.got[stream_id] + 1
        self.got[stream_id] += 1
        others = [f",{other}:{last}" for other, last in self.got.items() if last and other != stream_id]
        assert frame["others"].decode() == "".join(others)
        self.last_id = (frame["own"] + frame["others"]).decode()

    def cut(self) -> None:
        self._wire = b""
        if self.connection is not None:
            self.connection.cancel()


class MultiplexMachine(RuleBasedStateMachine):
    dsn: str

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.writers: list[Writer] = []
        self.ended: set[int] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize()
    def start(self) -> None:
        self.context = engine(self.dsn, limits=Limits(flush_events=5))
        self.parts = self.run(self.context.__aenter__())
        self.streams: list[Stream] = [self.run(self.parts.begin()) for _ in range(STREAMS)]
        self.writers = [self.parts.log.open(stream.id, last_id=1) for stream in self.streams]
        self.client = Client(self.parts, [stream.id for stream in self.streams])

    @rule(which=st.integers(0, STREAMS - 1), count=st.integers(1, 300))
    def append(self, which: int, count: int) -> None:
        if which not in self.ended:
            say(self.writers[which], count)

    @rule(which=st.integers(0, STREAMS - 1))
    def end(self, which: int) -> None:
        if which not in self.ended:
            self.ended.add(which)
            self.run(self.parts.end(self.writers[which]))
            self.parts.log.close(self.writers[which])

    @rule(milliseconds=st.integers(0, 5))
    def let_them_work(self, milliseconds: int) -> None:
        self.run(asyncio.sleep(milliseconds / 1000))

    @rule(size=st.integers(1, 2000))
    def read(self, size: int) -> None:
        self.client.read(size)

    @rule()
    def read_all(self) -> None:
        self.client.read(1 << 30)

    @rule()
    def cut_and_come_back(self) -> None:
        self.run(self.client.connect())

    @rule()
    def cut(self) -> None:
        self.client.cut()
        self.run(asyncio.sleep(0))

    @invariant()
    def nothing_of_a_closed_connection_is_left(self) -> None:
        if self.writers and (self.client.connection is None or self.client.connection.done()):
            assert self.parts.hub.readers == 0

    def teardown(self) -> None:
        if self.writers:
            self.run(self._finish())
            self.run(self.context.__aexit__(None, None, None))
        self.loop.close()

    async def _finish(self) -> None:
        for which in {*range(STREAMS)} - self.ended:
            await self.parts.end(self.writers[which])
        async with asyncio.timeout(20):
            while await self.client.connect():
                while self.client.connection is not None and not self.client.connection.done():
                    self.client.read(1 << 30)
                    await asyncio.sleep(0.001)
                self.client.read(1 << 30)
        for stream in self.streams:
            assert await self.parts.stored(stream.id) == [*range(1, self.client.got[stream.id] + 1)]
        assert self.parts.hub.readers == 0
        assert [task for task in asyncio.all_tasks() if "_pump" in repr(task)] == []


@pytest.fixture
def machine(database: str) -> type[MultiplexMachine]:
    MultiplexMachine.dsn = database
    return MultiplexMachine


def test_every_stream_gives_each_event_once_wherever_the_connection_is_cut(machine: type[MultiplexMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
