"""Nudges: tell a user's devices that there is something to pull, whoever wrote it on whichever replica.

They say no more than the cursor that a pull would lead to. One look at `sync_head` serves everybody who waits here.
"""

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from time import monotonic

from app.chats.head import chats_of
from app.postgres import Pool, prompt_connection
from app.streams.topics import Topics
from app.sync.cursor import Cursor

_HEADS = "select user_id, epoch, seq from sync_head where user_id = any($1::text[])"
# Users that one statement looks for, and how long it may take, in seconds.
_AT_ONCE = 1000
_LOOK_S = 3
# Where a user stands who has no chats yet. No epoch is ever this.
_NOWHERE = str(Cursor("000000000000", 0))


class Nudges:
    """Of all users, on one replica. Bounded by the readers that the endpoint admits: each waits for its last cursor."""

    def __init__(self, pool: Pool, topics: Topics) -> None:
        self._pool = pool
        self._topics = topics
        self._waiting: dict[str, set[_Follower]] = {}
        # Users whose counter is to be looked at.
        self._stale: set[str] = set()
        self.wanted = asyncio.Event()
        self.closing = False

    async def follow(
        self, user_id: str, *, client: str = "", seen: str | None = None, max_age_s: float
    ) -> AsyncGenerator[str | None, None]:
        """Where a pull of this user would lead to: at once unless that is `seen`, and after each change.

        Ends early at `max_age_s`, when the server closes, and, with None, where the same `client` follows anew.
        """
        leave_at = monotonic() + max_age_s
        with self._joined(user_id, client) as follower:
            while not self.closing and monotonic() < leave_at:
                if follower.replaced:
                    yield None
                    return
                if follower.latest in (None, seen):
                    await follower.wait(leave_at - monotonic())
                else:
                    seen = follower.latest
                    yield seen

    @contextmanager
    def _joined(self, user_id: str, client: str) -> Generator["_Follower", None, None]:
        followers = self._waiting.setdefault(user_id, set())
        for other in followers:
            if client and other.client == client:
                other.replace()
        if not followers:
            self._topics.follow(chats_of(user_id), partial(self._look_at, user_id))
        followers.add(follower := _Follower(client))
        # Only now: what is committed after this look is heard of.
        self._look_at(user_id)
        try:
            yield follower
        finally:
            followers.discard(follower)
            if not followers:
                del self._waiting[user_id]
                self._topics.leave(chats_of(user_id))

    def _look_at(self, user_id: str) -> None:
        self._stale.add(user_id)
        self.wanted.set()

    async def look_once(self) -> None:
        """Look where the users stand of whom something was heard, and tell those who wait."""
        stale, self._stale = self._stale & self._waiting.keys(), set()
        try:
            for users in _pieces(sorted(stale)):
                await self._look(users)
                stale.difference_update(users)
        except BaseException:
            self._stale |= stale
            raise

    async def _look(self, users: Sequence[str]) -> None:
        async with prompt_connection(self._pool, _LOOK_S) as connection:
            heads = {row["user_id"]: row for row in await connection.fetch(_HEADS, users)}
        for user_id in users:
            head = heads.get(user_id)
            cursor = _NOWHERE if head is None else str(Cursor(head["epoch"], head["seq"]))
            for follower in self._waiting.get(user_id, ()):
                follower.tell(cursor)

    def look_around(self) -> None:
        """Look at everybody who is followed here: whatever should have been heard may have been lost (G16)."""
        self._stale.update(self._waiting)
        self.wanted.set()

    def close(self) -> None:
        """Have everybody leave."""
        self.closing = True
        for followers in self._waiting.values():
            for follower in followers:
                follower.poke()


class _Follower:
    """One connection: it is told the latest cursor, and of those in between nothing."""

    __slots__ = ("_poked", "client", "latest", "replaced")

    def __init__(self, client: str) -> None:
        self.client = client
        self.latest: str | None = None
        self.replaced = False
        self._poked = asyncio.Event()

    def tell(self, cursor: str) -> None:
        self.latest = cursor
        self.poke()

    def replace(self) -> None:
        self.replaced = True
        self.poke()

    def poke(self) -> None:
        self._poked.set()

    async def wait(self, seconds: float) -> None:
        """Until there is something to see, or time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poked.wait()
        self._poked.clear()


def _pieces(users: Sequence[str]) -> list[Sequence[str]]:
    return [users[start : start + _AT_ONCE] for start in range(0, len(users), _AT_ONCE)]
