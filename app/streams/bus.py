"""The bus: tells other replicas what was committed here, and the readers here what was committed there.

It is a hint and may lose anything (G16): ids without gaps make every loss visible, and whoever hears nothing polls.
Replicas broadcast which foreign streams they have readers for; the writer of a stream notifies those channels after
its commits; one read of the table serves all readers of a replica. Topics (topics.py) travel the same way, but for the
reading: that is done by whoever follows them.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from math import inf
from time import monotonic, perf_counter
from typing import Any, Protocol
from uuid import UUID, uuid4

import structlog

from app.streams import signals
from app.streams.hub import Hub
from app.streams.interests import Interests
from app.streams.lines import Listener, Speaker
from app.streams.log import Log
from app.streams.signals import Ask, Echo, Message, Poke, Poked, Wake, Want
from app.streams.topics import Topics
from app.telemetry import Metrics
from app.ticker import every, whenever

log = structlog.get_logger(__name__)

# Streams by replicas that we remember others' interest in.
_MOST_INTERESTS = 50_000
# A reader further behind reads the table by itself; and how many events are read at once for all of them.
_FAR = 256
_ROWS = 2000

# The limit is never reached. It keeps the planner from joining whole partitions when these look small.
_RANGES = f"""
select r.s, e.payload from unnest($1::uuid[], $2::int[], $3::int[]) as r(s, a, z)
cross join lateral (
    select id, payload from streaming_events where stream_id = r.s and id > r.a and id <= r.z
    order by id limit {_FAR}) e
order by r.s, e.id
"""
_Range = tuple[UUID, int, int]


@dataclass(frozen=True, slots=True)
class Times:
    """In seconds."""

    # New interests are gathered for so long; all are repeated, and forgotten where they are not.
    gather: float = 0.02
    repeat: float = 10
    forget: float = 30
    # We hear ourselves speak every so often, within so long, or connect anew; after a failure so soon.
    probe: float = 10
    echo: float = 3
    again: float = 1


class Bus(Protocol):
    """What the rest of a gateway has to do with other replicas."""

    # Set when another replica has gone, or wants a run to stop; whoever waits for it clears it.
    gone: asyncio.Event
    stop: asyncio.Event

    async def run(self) -> None: ...

    def poke(self, why: Poke) -> None:
        """Have the other replicas look at once, soon."""

    async def tell_gone(self) -> None:
        """Say that this replica was declared dead by itself. Raises what a broken connection raises."""

    def state(self) -> dict[str, Any]:
        """For operators."""


class PollBus:
    """No bus: readers look at the table by themselves. For databases that are reached through a pooler only."""

    def __init__(self) -> None:
        self.gone, self.stop = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """There is nothing to keep going."""

    def poke(self, why: Poke) -> None:
        """The others look once a second."""

    async def tell_gone(self) -> None:
        """They see it in their next pass."""

    def state(self) -> dict[str, Any]:
        return {"kind": "poll"}


class NotifyBus:
    """PostgreSQL's LISTEN and NOTIFY. Its buffers are bounded by the streams that are followed, here and elsewhere."""

    def __init__(
        self,
        dsn: str,
        *,
        hub: Hub,
        event_log: Log,
        metrics: Metrics,
        failing: set[str],
        topics: Topics | None = None,
        times: Times | None = None,
    ) -> None:
        self._topics = topics = topics or Topics()
        self._id = uuid4()
        self._hub = hub
        self._log = event_log
        self._metrics = metrics
        self._failing = failing
        self._times = times or Times()
        self.gone, self.stop = asyncio.Event(), asyncio.Event()
        self._speaker = Speaker(dsn)
        self._lost = asyncio.Event()
        channels = [signals.COMMON, signals.channel_of(self._id)]
        self._listener = Listener(dsn, channels, heard=self._hear, lost=self._lost.set)
        self._numbers = count(1)
        self._echo: asyncio.Future[int] | None = None
        self._proven = False
        self._echo_s: float | None = None
        # What others want, and what is to be told to them.
        self._interests = Interests(lasts_s=self._times.forget, most=_MOST_INTERESTS)
        self._news: dict[UUID, int] = {}
        self._pokes: set[Poke] = set()
        self._speak = asyncio.Event()
        # What we want: not announced yet, and announced when.
        self._fresh: set[UUID] = set()
        self._announced: dict[UUID, float] = {}
        self._announce, self._repeat = asyncio.Event(), asyncio.Event()
        # What was committed elsewhere.
        self._heard: dict[UUID, int] = {}
        self._read = asyncio.Event()
        hub.abroad, hub.on_commit, hub.on_follow = self._interests.channels, self._committed, self._followed
        topics.abroad, topics.on_change, topics.on_follow = self._interests.channels, self._committed, self._followed

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for loop in self._loops():
                    tasks.create_task(loop)
        finally:
            self._listener.disconnect()
            self._speaker.disconnect()

    def _loops(self) -> list[Coroutine[None, None, None]]:
        times, failing, lost, repeat = self._times, self._failing, self._lost, self._repeat
        return [
            every(times.probe, self.probe_once, name="listener", failing=failing, sooner=lost, again_s=times.again),
            every(times.repeat, self.repeat_once, name="interests", failing=failing, sooner=repeat),
            whenever(self._announce, self.announce_once, name="announcing", failing=failing),
            whenever(self._speak, self.tell_once, name="notifying", failing=failing),
            whenever(self._read, self.read_once, name="reading for others", failing=failing),
        ]

    def state(self) -> dict[str, Any]:
        return {
            "kind": "notify",
            "listening": self._proven,
            "echo_ms": None if self._echo_s is None else round(self._echo_s * 1000, 1),
            "followed_elsewhere": len(self._interests.channels),
            "followed_here": len(self._foreign(self._followed_here())),
        }

    # -- hearing: the connection, and the proof that it works

    async def probe_once(self) -> None:
        """Hear ourselves speak, on a new connection where there is none or it is mute. Raises where it fails."""
        try:
            if not self._listener.connected:
                self._proven = False
                await self._listener.connect()
            await self._hear_ourselves()
        except BaseException:
            self._proven = False
            self._listener.disconnect()
            self._speaker.disconnect()
            raise
        if not self._proven:
            self._proven = True
            log.info("bus_listening")
            await self._catch_up()

    async def _hear_ourselves(self) -> None:
        number, began = next(self._numbers), perf_counter()
        self._echo = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self._times.echo):
                await self._say([signals.echo(self._id, number)])
                while await self._echo != number:
                    self._echo = asyncio.get_running_loop().create_future()
        except TimeoutError:
            raise TimeoutError(f"no echo of a notification within {self._times.echo} s: readers poll") from None
        self._echo_s = perf_counter() - began
        self._metrics.bus_echo.observe(self._echo_s)

    async def _catch_up(self) -> None:
        """What was said meanwhile is lost: readers look into the table, and interests are exchanged anew."""
        for stream_id in self._foreign(self._hub.followed):
            self._hub.reread(stream_id)
        self._topics.stir()
        await self._say([signals.ask(self._id)])
        self._repeat.set()

    def _hear(self, payload: str) -> None:
        self._metrics.bus_notifications.labels("received").inc()
        match signals.read(payload):
            case Wake(positions):
                self._wake(positions.items())
            case Want(bus, streams) if bus != self._id:
                self._wanted(signals.channel_of(bus), streams)
            case Ask(bus) if bus != self._id:
                self._repeat.set()
            case Poked(bus, why) if bus != self._id:
                (self.gone if why == "gone" else self.stop).set()
            case Echo(number) if self._echo is not None and not self._echo.done():
                self._echo.set_result(number)

    # -- telling others what was committed here

    def _wanted(self, channel: str, streams: list[UUID]) -> None:
        """New interests are answered at once: the reader may have looked before the last commit."""
        for stream_id in self._interests.note(channel, streams):
            if (last_id := self._position(stream_id)) is not None:
                self._committed(stream_id, last_id)

    def _position(self, stream_id: UUID) -> int | None:
        last_id = self._log.last_id(stream_id)
        lately = self._hub.lately.get(stream_id, self._topics.lately.get(stream_id))
        return lately if last_id is None else last_id

    def _committed(self, stream_id: UUID, last_id: int) -> None:
        self._news[stream_id] = max(last_id, self._news.get(stream_id, 0))
        self._speak.set()

    def poke(self, why: Poke) -> None:
        self._pokes.add(why)
        self._speak.set()

    async def tell_gone(self) -> None:
        await self._say([signals.poke(self._id, "gone")])

    async def tell_once(self) -> None:
        """Everything that was committed since the last statement, in one."""
        news, self._news = self._news, {}
        pokes, self._pokes = self._pokes, set()
        try:
            await self._say([*self._wakes(news), *(signals.poke(self._id, why) for why in pokes)])
        except BaseException:
            self._pokes |= pokes
            for stream_id, last_id in news.items():
                self._committed(stream_id, last_id)
            raise

    def _wakes(self, news: dict[UUID, int]) -> Iterator[Message]:
        by_channel: dict[str, dict[UUID, int]] = {}
        for stream_id, last_id in news.items():
            for channel in self._interests.channels.get(stream_id, ()):
                by_channel.setdefault(channel, {})[stream_id] = last_id
        for channel, positions in by_channel.items():
            yield from signals.wakes(channel, positions)

    async def _say(self, messages: list[Message]) -> None:
        if messages:
            await self._speaker.say(messages)
            self._metrics.bus_notifications.labels("sent").inc(len(messages))

    # -- saying what is followed here

    def _followed(self, stream_id: UUID) -> None:
        if monotonic() - self._announced.get(stream_id, -inf) > self._times.repeat:
            self._fresh.add(stream_id)
            self._announce.set()

    async def announce_once(self) -> None:
        """Streams and topics that have got their first reader here."""
        await asyncio.sleep(self._times.gather)
        fresh, self._fresh = self._fresh, set()
        try:
            await self._want(self._foreign(fresh & self._followed_here()))
        except BaseException:
            self._fresh |= fresh
            raise

    async def repeat_once(self) -> None:
        """Everything that is followed here; what others did not repeat in time is forgotten."""
        self._interests.forget_old()
        old = monotonic() - self._times.repeat
        self._announced = {stream_id: at for stream_id, at in self._announced.items() if at >= old}
        await self._want(self._foreign(self._followed_here()))

    def _followed_here(self) -> set[UUID]:
        return self._hub.followed | self._topics.followed

    async def _want(self, streams: list[UUID]) -> None:
        await self._say(list(signals.wants(self._id, streams)))
        self._announced |= dict.fromkeys(streams, monotonic())

    def _foreign(self, streams: Iterable[UUID]) -> list[UUID]:
        return [stream_id for stream_id in streams if not self._log.owns(stream_id)]

    # -- reading for all readers here

    def _wake(self, positions: Iterable[tuple[UUID, int]]) -> None:
        followed = self._hub.followed
        for stream_id, last_id in positions:
            if stream_id in followed and not self._log.owns(stream_id):
                self._heard[stream_id] = max(last_id, self._heard.get(stream_id, 0))
                self._read.set()
            self._topics.heard(stream_id)

    async def read_once(self) -> None:
        """Read what was committed elsewhere, and hand it to the readers here as if it had been committed here."""
        heard, self._heard = self._heard, {}
        ranges, rows = list[_Range](), 0
        try:
            for stream_id, start, last_id in self._ranges(heard):
                ranges.append((stream_id, start, last_id))
                rows += last_id - start
                if rows >= _ROWS:
                    await self._deliver(ranges)
                    ranges, rows = [], 0
            if ranges:
                await self._deliver(ranges)
        except Exception:
            for stream_id in heard:
                self._hub.reread(stream_id)
            raise

    def _ranges(self, heard: dict[UUID, int]) -> Iterator[_Range]:
        """What readers here wait for."""
        for stream_id, last_id in heard.items():
            start = self._hub.lacking(stream_id, last_id, most=_FAR)
            if start < last_id:
                yield stream_id, start, last_id

    async def _deliver(self, ranges: list[_Range]) -> None:
        payloads: dict[UUID, list[str]] = {stream_id: [] for stream_id, _, _ in ranges}
        for stream_id, payload in await self._listener.fetch(_RANGES, *map(list, zip(*ranges, strict=True))):
            payloads[stream_id].append(payload)
        for stream_id, start, last_id in ranges:
            # Ids are distinct, so as many as there should be are all of them.
            if len(payloads[stream_id]) == last_id - start:
                self._hub.deliver(stream_id, start + 1, payloads[stream_id])
            else:
                self._hub.reread(stream_id)
