"""News of the index: tell those who show lists which conversations have changed, whoever changed them and wherever.

One look at the index serves all readers of a replica. It is begun by topics that whoever changes the index tells
of after the commit, on whichever replica, and made now and then all the same (G16). A look names what was said just
now. What it cannot name, as what is gone or was read from a source, is told as "all": to the user whose it is where
that is known, and to those who see everybody's.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple
from uuid import UUID

from app.commits import note
from app.postgres import Pool, prompt_connection
from app.streams.topics import Topics

# Topics: something was said; something has changed that cannot be named.
_SAVED, _CHANGED = UUID("0d7c1b52-9f53-4c8e-8f0a-55c3f0a9f001"), UUID("0d7c1b52-9f53-4c8e-8f0a-55c3f0a9f002")

# Between two looks, and between two times of telling "all", in seconds: whoever is told reads a list.
_PACE_S, _ALL_S = 0.25, 5.0
# How long a look may take, and how long the transaction of a message may last, which is as old as its beginning.
_LOOK_S, _OVERLAP_S = 3, 10
# Conversations that one look names, and one reader is told of; of more it is told "all". And users that one statement
# looks for.
_MOST, _TOLD, _USERS = 2_000, 100, 1_000

# What changes where nobody tells of it: other programs' tables are read by commands, too.
_STATE = """
select extract(epoch from now())::float8 as at, concat_ws(' ', changed_at, synced_at,
    (select coalesce(sum(rows), 0) from conversation_source_state),
    (select coalesce(sum(drift), 0) from conversation_rounds),
    (select count(*) from conversation_sources)) as told
from conversation_index
"""
# Whose chats have changed, whatever it was.
_HEADS = "select user_id, epoch || '.' || seq from sync_head where user_id = any($1::text[])"
# Times in the future are somebody's wrong clock, and would be looked at for ever.
_RECENT = """
select id, xmin::text::bigint as version, conversation_id, source, username from conversations
where message_count >= 0 and last_message_at >= to_timestamp($1) and last_message_at < now() + interval '1 minute'
order by last_message_at desc, id desc limit $2
"""


def saved() -> None:
    """Note that this transaction has saved what is said now, or what a run has cost."""
    note(_SAVED, 1)


def changed() -> None:
    """Note that this transaction has changed something else of the index: what is older, or gone."""
    note(_CHANGED, 1)


class Conversation(NamedTuple):
    """A row of the index by its name."""

    id: str
    source: str
    username: str


@dataclass(frozen=True, slots=True)
class Told:
    """What has changed since the last time; `is_all`: perhaps anything, and then none is named."""

    conversations: list[Conversation]
    is_all: bool = False


@dataclass(frozen=True, slots=True)
class _Seen:
    """The index as a look has found it: at what time, what cannot be named, where users' chats are, recent rows."""

    at: float
    state: str
    heads: dict[str, str]
    versions: dict[int, int]
    rows: dict[int, Conversation]

    def since(self, before: "_Seen") -> list[Conversation]:
        """Recent rows that are not as they were."""
        return [row for id_, row in self.rows.items() if before.versions.get(id_) != self.versions[id_]]


class News:
    """Of one replica. Bounded by the readers that the endpoint admits, and by what one look names."""

    def __init__(self, pool: Pool, topics: Topics) -> None:
        self._pool = pool
        self._topics = topics
        self._readers: set[_Reader] = set()
        self._seen: _Seen | None = None
        # Whether something was heard of that cannot be named.
        self._is_stirred = False
        # Whether readers have to be told "all", whosever they are, and when they last were.
        self._is_all = False
        self._all_at = -_ALL_S
        self.wanted = asyncio.Event()
        self.closing = False

    async def follow(self, username: str | None, *, max_age_s: float) -> AsyncGenerator[Told, None]:
        """What changes of this user's conversations, or of everybody's: "all" at once, as soon as none is missed any
        more, then after each look that has found something. Ends early at `max_age_s` and when the server closes.
        """
        leave_at = monotonic() + max_age_s
        with self._joined(username) as reader:
            while not self.closing and monotonic() < leave_at:
                if (told := reader.take()) is not None:
                    yield told
                else:
                    await reader.wait(leave_at - monotonic())

    @contextmanager
    def _joined(self, username: str | None) -> Generator["_Reader", None, None]:
        if not self._readers:
            self._topics.follow(_SAVED, self.wanted.set)
            self._topics.follow(_CHANGED, self._stir)
        self._readers.add(reader := _Reader(username))
        self.wanted.set()
        try:
            yield reader
        finally:
            self._readers.discard(reader)
            if not self._readers:
                self._topics.leave(_SAVED)
                self._topics.leave(_CHANGED)
                # What changes while nobody is here is told to nobody.
                self._seen, self._is_stirred, self._is_all = None, False, False

    def _stir(self) -> None:
        self._is_stirred = True
        self.wanted.set()

    def look_around(self) -> None:
        """Look whether anything has changed that was not heard of."""
        if self._readers:
            self.wanted.set()

    async def look_once(self) -> None:
        """Look at the index, and tell the readers; not to be called sooner than this returns."""
        new = [reader for reader in self._readers if not reader.is_informed]
        if self._readers:
            # Where this fails something is missed, and there is nothing to compare the next look with.
            before, self._seen = self._seen, None
            is_stirred, self._is_stirred = self._is_stirred, False
            now = await self._look(before)
            if self._readers:
                self._seen = now
                self._tell(before, now, is_stirred=is_stirred)
            for reader in new:
                reader.begin()
            await asyncio.sleep(_PACE_S)

    async def _look(self, before: _Seen | None) -> _Seen:
        users = sorted({reader.username for reader in self._readers if reader.username})
        heads: dict[str, str] = {}
        async with (
            prompt_connection(self._pool, _LOOK_S) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            state = await connection.fetchrow(_STATE)
            assert state is not None
            since = state["at"] if before is None else before.at
            found = await connection.fetch(_RECENT, since - _OVERLAP_S, _MOST)
            for start in range(0, len(users), _USERS):
                heads |= {row[0]: row[1] for row in await connection.fetch(_HEADS, users[start : start + _USERS])}
        versions = {row["id"]: row["version"] for row in found}
        return _Seen(state["at"], state["told"], heads, versions, {row["id"]: Conversation(*row[2:]) for row in found})

    def _tell(self, before: _Seen | None, now: _Seen, *, is_stirred: bool) -> None:
        if before is None:
            self._is_all = any(reader.is_informed for reader in self._readers)
        else:
            self._tell_each(before, now, is_stirred=is_stirred)
            self._is_all = self._is_all or before.state != now.state or len(now.rows) >= _MOST
        behind = [reader for reader in self._readers if self._is_all or reader.is_behind]
        if behind and monotonic() - self._all_at >= _ALL_S:
            self._is_all, self._all_at = False, monotonic()
            for reader in behind:
                reader.tell_all()

    def _tell_each(self, before: _Seen, now: _Seen, *, is_stirred: bool) -> None:
        changed = now.since(before)
        of_users = defaultdict[str, list[Conversation]](list)
        for one in changed:
            of_users[one.username].append(one)
        for reader in self._readers:
            if reader.username is None:
                reader.tell(changed)
                reader.is_behind = reader.is_behind or is_stirred
                continue
            mine = of_users.get(reader.username, [])
            reader.tell(mine)
            moved = before.heads.get(reader.username) != now.heads.get(reader.username)
            # What stirs comes after the commit, so perhaps after a look that has seen it.
            if (moved and not mine) or (is_stirred and (moved or reader.has_moved)):
                reader.tell_all()
            reader.has_moved = moved

    def close(self) -> None:
        """Have everybody leave."""
        self.closing = True
        for reader in self._readers:
            reader.poke()


class _Reader:
    """One connection, and what it has not been told yet."""

    __slots__ = ("_changed", "_is_all", "_poked", "has_moved", "is_behind", "is_informed", "username")

    def __init__(self, username: str | None) -> None:
        self.username = username
        self.is_informed = False
        # Whether "all" is to be told, when it is time for that.
        self.is_behind = False
        # Whether the last look found that the user's chats had changed.
        self.has_moved = False
        self._changed: dict[Conversation, None] = {}
        self._is_all = False
        self._poked = asyncio.Event()

    def begin(self) -> None:
        """A look that began after this reader came has ended: from here on nothing is missed."""
        self.is_informed = True
        self.tell_all()

    def tell(self, changed: list[Conversation]) -> None:
        if not changed or not self.is_informed or self._is_all:
            return
        self._changed.update(dict.fromkeys(changed))
        if len(self._changed) > _TOLD:
            self.tell_all()
        self.poke()

    def tell_all(self) -> None:
        if self.is_informed:
            self._is_all, self.is_behind = True, False
            self._changed.clear()
            self.poke()

    def take(self) -> Told | None:
        if not self._is_all and not self._changed:
            return None
        told = Told([] if self._is_all else list(self._changed), self._is_all)
        self._is_all, self._changed = False, {}
        return told

    def poke(self) -> None:
        self._poked.set()

    async def wait(self, seconds: float) -> None:
        """Until there is something to tell, or time is up."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._poked.wait()
        self._poked.clear()
