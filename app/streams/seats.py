"""How many readers this replica has, and of what: each takes a seat for as long as it is connected, or gets none."""

from collections import Counter
from collections.abc import Collection, Generator, Hashable
from contextlib import contextmanager
from typing import TypeVar
from uuid import UUID

Key = TypeVar("Key", bound=Hashable)


class Seats:
    """Bounded per replica, per user and per stream. A connection for several streams takes one seat of the replica and
    of its user, and one of each stream; long polls that wait take seats, too."""

    def __init__(self, *, most: int, per_user: int, per_stream: int) -> None:
        self._most, self._per_user, self._per_stream = most, per_user, per_stream
        self._taken = 0
        self._users: Counter[str] = Counter()
        self._streams: Counter[UUID] = Counter()

    @property
    def full(self) -> bool:
        """Whether nobody at all gets a seat; asked before anything is looked up."""
        return self._taken >= self._most

    @contextmanager
    def taken(self, streams: Collection[UUID], users: Collection[str]) -> Generator[bool, None, None]:
        """A seat while the block runs; False where there is none, and then nothing is taken."""
        if not self._free(streams, users):
            yield False
            return
        self._taken += 1
        # Not the collections themselves: a mapping would be taken for counts.
        self._users.update(iter(users))
        self._streams.update(iter(streams))
        try:
            yield True
        finally:
            self._taken -= 1
            _leave(self._users, users)
            _leave(self._streams, streams)

    def _free(self, streams: Collection[UUID], users: Collection[str]) -> bool:
        return (
            not self.full
            and all(self._users[user] < self._per_user for user in users)
            and all(self._streams[stream_id] < self._per_stream for stream_id in streams)
        )


def _leave(counts: Counter[Key], left: Collection[Key]) -> None:
    for key in left:
        counts[key] -= 1
        if not counts[key]:  # nobody is remembered who is not here
            del counts[key]
