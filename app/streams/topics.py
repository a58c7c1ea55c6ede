"""Topics: names whose things change, as the chats of a user, for those who want to hear of it on any replica.

A change is told after its commit, here and, by the bus, where somebody follows it. Like the bus it is a hint (G16):
what has become of the thing is in the table, and whoever follows one looks there now and then by itself.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Container, KeysView, Mapping
from uuid import UUID

# Topics remembered for replicas whose interest crosses a change.
_LATELY = 4096
# Between two times of telling, in seconds: the first change is told at once, those that follow on it together.
PACE_S = 0.02

Wake = Callable[[], None]


class Topics:
    """Those that are followed here: bounded by the readers that the endpoints admit."""

    def __init__(self, *, pace_s: float = PACE_S) -> None:
        self._pace_s = pace_s
        self._followers: dict[UUID, Wake] = {}
        # What was committed here and not told yet: of one pace.
        self._changed: dict[UUID, int] = {}
        self.wanted = asyncio.Event()
        self.lately: OrderedDict[UUID, int] = OrderedDict()
        # Filled in by the bus: what other replicas follow, and how they and we hear of each other.
        self.abroad: Container[UUID] = ()
        self.on_change: Callable[[UUID, int], None] = lambda topic, position: None
        self.on_follow: Callable[[UUID], None] = lambda topic: None

    @property
    def followed(self) -> KeysView[UUID]:
        return self._followers.keys()

    def follow(self, topic: UUID, wake: Wake) -> None:
        """Have `wake` called after changes, wherever they are made. Once for each topic; `leave` must follow."""
        self._followers[topic] = wake
        self.on_follow(topic)

    def leave(self, topic: UUID) -> None:
        del self._followers[topic]

    def change(self, changes: Mapping[UUID, int]) -> None:
        """After the commit of changes that were made here. What nobody follows is remembered, and wakes nobody."""
        for topic, position in changes.items():
            if topic in self._followers or topic in self.abroad:
                self._changed[topic] = position
                self.wanted.set()
            else:
                self._remember(topic, position)

    async def tell_once(self) -> None:
        """Tell of everything that was changed since the last time; not to be called sooner than this returns."""
        changed, self._changed = self._changed, {}
        for topic, position in changed.items():
            self._remember(topic, position)
            self.heard(topic)
            if topic in self.abroad:
                self.on_change(topic, position)
        await asyncio.sleep(self._pace_s)

    def heard(self, topic: UUID) -> None:
        if (wake := self._followers.get(topic)) is not None:
            wake()

    def stir(self) -> None:
        """Perhaps something was missed."""
        for wake in self._followers.values():
            wake()

    def _remember(self, topic: UUID, position: int) -> None:
        self.lately[topic] = position
        self.lately.move_to_end(topic)
        if len(self.lately) > _LATELY:
            self.lately.popitem(last=False)
