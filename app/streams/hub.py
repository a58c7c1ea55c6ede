"""Wakes the readers of this process: each committed batch is framed once and handed to all who follow its stream."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Container, KeysView, Sequence
from dataclasses import dataclass
from time import monotonic
from uuid import UUID

from app.streams.event import TERMINAL, kind_of, to_frames

# Beyond every id: whoever is told this position looks into the table.
SOMEWHERE = 2**31 - 1
# Streams remembered for replicas that ask late.
_LATELY = 4096


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring events first..last of one stream as SSE frames; `ended` if the last one is terminal."""

    stream_id: UUID
    first: int
    last: int
    frames: bytes
    ended: bool


def batch_of(stream_id: UUID, first: int, payloads: Sequence[str]) -> Batch:
    """`payloads` must not be empty."""
    last = first + len(payloads) - 1
    return Batch(stream_id, first, last, to_frames(stream_id, first, payloads), kind_of(payloads[-1]) == TERMINAL)


class Subscription:
    """What one reader has not taken yet: at most `max_events` and `max_bytes`, else it must read the table again."""

    __slots__ = (
        "_batches",
        "_bytes",
        "_events",
        "_max_bytes",
        "_max_events",
        "_poked",
        "_waiter",
        "behind",
        "last",
        "quiet",
    )

    def __init__(self, max_events: int, max_bytes: int, cursor: int) -> None:
        self._batches: deque[Batch] = deque()
        self._events = self._bytes = 0
        self._max_events, self._max_bytes = max_events, max_bytes
        # One reader, so one waiter: less to do per event than asyncio.Event, which keeps a queue of them.
        self._waiter: asyncio.Future[None] | None = None
        self._poked = False
        # behind: something may be in the table that is not in here. True at first: nothing was read yet.
        self.behind = True
        # quiet: no batch came since the last look around, so the table is worth a look.
        self.quiet = False
        # The last id that the reader has, or will find in here.
        self.last = cursor

    def push(self, batch: Batch) -> None:
        self.quiet = False
        if not self.behind:
            self._batches.append(batch)
            self._events += batch.last - batch.first + 1
            self._bytes += len(batch.frames)
            self.last = batch.last
            if self._events > self._max_events or self._bytes > self._max_bytes:
                self.fall_behind()
        self.poke()

    def fall_behind(self) -> None:
        """Forget what is buffered and have the reader look into the table."""
        self._batches.clear()
        self._events = self._bytes = 0
        self.behind = True
        self.poke()

    def has_read(self, cursor: int) -> None:
        self.last = max(self.last, cursor)

    def take(self) -> Batch | None:
        if not self._batches:
            return None
        batch = self._batches.popleft()
        self._events -= batch.last - batch.first + 1
        self._bytes -= len(batch.frames)
        return batch

    def poke(self) -> None:
        self._poked = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return when there is something to do: a batch, a fall behind, or a poke."""
        if not self._poked:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._poked = False


class Hub:
    """The subscriptions of this process by stream. Bounded by the readers the endpoints admit."""

    def __init__(self, *, max_events: int, max_bytes: int) -> None:
        self._max_events, self._max_bytes = max_events, max_bytes
        self._subscriptions: dict[UUID, set[Subscription]] = {}
        self._polled: dict[UUID, float] = {}
        # What ended here lately, or was stirred, and where: for replicas whose question crosses it.
        self.lately: OrderedDict[UUID, int] = OrderedDict()
        self.readers = 0
        self.closing = False
        # Filled in by the bus: the streams that readers of other replicas follow, and how these hear of a commit.
        self.abroad: Container[UUID] = ()
        self.on_commit: Callable[[UUID, int], None] = lambda stream_id, last: None
        self.on_follow: Callable[[UUID], None] = lambda stream_id: None

    def subscribe(self, stream_id: UUID, cursor: int = 0) -> Subscription:
        subscription = Subscription(self._max_events, self._max_bytes, cursor)
        if (followers := self._subscriptions.get(stream_id)) is None:
            followers = self._subscriptions[stream_id] = set()
            self.on_follow(stream_id)
        followers.add(subscription)
        self.readers += 1
        return subscription

    def unsubscribe(self, stream_id: UUID, subscription: Subscription) -> None:
        followers = self._subscriptions[stream_id]
        followers.discard(subscription)
        self.readers -= 1
        if not followers:
            del self._subscriptions[stream_id]

    @property
    def followed(self) -> KeysView[UUID]:
        """The streams that have readers here."""
        return self._subscriptions.keys()

    def publish(self, stream_id: UUID, first: int, payloads: Sequence[str]) -> None:
        """After the commit of the lane: hand the events to whoever follows the stream, here or elsewhere."""
        if followers := self._subscriptions.get(stream_id):
            batch = batch_of(stream_id, first, payloads)
            for subscription in followers:
                subscription.push(batch)
        if stream_id in self.abroad:
            self.on_commit(stream_id, first + len(payloads) - 1)

    def polled(self, stream_id: UUID) -> None:
        """Somebody has read a page of the stream. Bounded by the requests between two calls of `read_lately`."""
        self._polled[stream_id] = monotonic()

    def read_lately(self, within_s: float) -> set[UUID]:
        """The streams that have readers here now, or were polled so lately; forgets what was polled before that."""
        since = monotonic() - within_s
        self._polled = {stream_id: at for stream_id, at in self._polled.items() if at >= since}
        return self._subscriptions.keys() | self._polled.keys()

    def over(self, stream_id: UUID, last_id: int) -> None:
        """A stream has ended here, or was stirred: who asks for it from now on is told so."""
        self.lately[stream_id] = last_id
        if len(self.lately) > _LATELY:
            self.lately.popitem(last=False)

    def let_go(self, stream_id: UUID) -> None:
        """This process does not write a stream any more that has not ended: its readers are another replica's now."""
        if stream_id in self._subscriptions:
            self.on_follow(stream_id)

    def stir(self, stream_id: UUID) -> None:
        """Send all readers of a stream to the table: something was committed there outside of the lane."""
        self.reread(stream_id)
        self.over(stream_id, SOMEWHERE)
        if stream_id in self.abroad:
            self.on_commit(stream_id, SOMEWHERE)

    def reread(self, stream_id: UUID) -> None:
        """Send the readers of a stream here to the table."""
        for subscription in self._subscriptions.get(stream_id, ()):
            subscription.fall_behind()

    def lacking(self, stream_id: UUID, last_id: int, *, most: int) -> int:
        """Behind which id events up to `last_id` are to be delivered; `last_id` where nobody here waits for any.

        Readers that lack more than `most`, or look into the table anyway, are sent there.
        """
        start = last_id
        for subscription in self._subscriptions.get(stream_id, ()):
            if subscription.behind or last_id - subscription.last > most:
                subscription.fall_behind()
            else:
                start = min(start, subscription.last)
        return start

    def deliver(self, stream_id: UUID, first: int, payloads: Sequence[str]) -> None:
        """Hand events that were committed elsewhere to whoever lacks them here; most lack the same."""
        batches: dict[int, Batch] = {}
        for subscription in self._subscriptions.get(stream_id, ()):
            start = max(first, subscription.last + 1)
            if start < first + len(payloads):
                if start not in batches:
                    batches[start] = batch_of(stream_id, start, payloads[start - first :])
                subscription.push(batches[start])

    def look_around(self, owned: Callable[[UUID], bool]) -> None:
        """Send readers that heard nothing since the last call to the table: publishing is only a hint (G16).

        Streams this process owns are published here without fail; their readers are only woken, to see whether
        it is time to leave.
        """
        for stream_id, followers in self._subscriptions.items():
            for subscription in followers:
                if not subscription.quiet:
                    subscription.quiet = True
                elif owned(stream_id):
                    subscription.poke()
                else:
                    subscription.fall_behind()

    def close(self) -> None:
        """Have every reader leave at its next frame boundary."""
        self.closing = True
        for followers in self._subscriptions.values():
            for subscription in followers:
                subscription.poke()
