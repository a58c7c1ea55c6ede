"""Stopping a run, or one flow of it, from any replica: the owner closes the provider's connection, the text is kept."""

import asyncio
from dataclasses import dataclass
from time import perf_counter
from uuid import UUID

from app.errors import NotFound
from app.flows import queue
from app.flows.run import CANCELLED, ms_since
from app.flows.runner import Runner
from app.flows.waiting import Waiting
from app.streams.bus import Bus
from app.streams.event import TERMINAL, Status, data_of, kind_of
from app.streams.stream import Streams
from app.streams.tail import Tail
from app.wall import Wall

# How long the caller waits for what the owner records, in seconds.
_PATIENCE_S = 2
_PER_PASS = 500


@dataclass(frozen=True, slots=True)
class Stopped:
    """What became of it. `close_ms`: until no connection to a provider was open; None where nobody could say."""

    status: Status
    closed: bool
    close_ms: int | None
    last_event_id: int


class Stopping:
    """The owner is told directly where it is this process; elsewhere it is poked, and sees the flag in a pass."""

    def __init__(self, wall: Wall, streams: Streams, *, bus: Bus, tail: Tail, runner: Runner, waiting: Waiting) -> None:
        self._wall = wall
        self._streams = streams
        self._bus = bus
        self._tail = tail
        self._runner = runner
        self._waiting = waiting

    async def run_once(self) -> int:
        """Stop what others have asked this replica to stop; returns how many runs."""
        asked = await self._streams.asked_to_stop(_PER_PASS)
        for stream_id, flows in asked:
            if not flows:
                self._runner.stop(stream_id, CANCELLED)
            for flow in flows:
                self._runner.stop(stream_id, CANCELLED, flow)
        return len(asked)

    async def stop(self, stream_id: UUID, flow: str | None = None, *, owner: str | None) -> Stopped:
        """As often as anybody likes: what has ended stays as it is.

        Raises NotFound for a stream that is unknown, or not this user's; with None anybody's is stopped.
        """
        began = perf_counter()
        state = await self._tail.state(stream_id, owner=owner)
        if state.status == "queued" and flow is None and await self._taken_out(stream_id, owner):
            state = await self._tail.state(stream_id, owner=owner)
        if state.ended:
            return Stopped(state.status, True, 0, state.tail)
        here = self._runner.runs(stream_id)
        for call in self._runner.stop(stream_id, CANCELLED, flow):
            await call.over.wait()
        closed_ms = ms_since(began)
        # Also where the run is here: should this process die before the end is written, the takeover writes this one.
        async with self._wall.connection() as connection:
            await self._streams.ask_to_stop(connection, stream_id, flow, owner=owner)
        if here:
            await self._runner.ended(stream_id, _PATIENCE_S if flow is None else 0)
        else:
            self._bus.poke("stop")
            if await self._seen_to_end(stream_id, flow, state.tail):
                here, closed_ms = True, ms_since(began)
        state = await self._tail.state(stream_id, owner=owner)
        return Stopped(state.status, here, closed_ms if here else None, state.tail)

    async def _taken_out(self, stream_id: UUID, owner: str | None) -> bool:
        """Out of the queue; false where its turn has just come."""
        async with self._wall.connection() as connection:
            place = await queue.of_stream(connection, stream_id, owner=owner)
        if place is None:
            return False
        user_id, session_id, message_id = place
        try:
            await self._waiting.remove(user_id=user_id, session_id=session_id, message_id=message_id)
        except NotFound:
            return False
        return True

    async def _seen_to_end(self, stream_id: UUID, flow: str | None, cursor: int) -> bool:
        """Watch the log for what the owner, another replica, writes of it."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                while True:
                    payloads = await self._tail.wait(stream_id, cursor, _PATIENCE_S)
                    cursor += len(payloads)
                    if any(_ends(payload, flow) for payload in payloads):
                        return True
        except TimeoutError:
            return False


def _ends(payload: str, flow: str | None) -> bool:
    kind = kind_of(payload)
    if kind in ("flow_end", "flow_error") and flow is not None:
        return bool(data_of(payload)["flow"] == flow)
    return kind == TERMINAL
