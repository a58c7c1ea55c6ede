"""What the index says of another program's conversations beside what its table says now, a piece at a time.

One walk is along the index: rows may have been deleted or changed since they were counted. The other is along the
table, as far as it was counted: conversations may be missing from the index, or rows from a conversation. Whatever is
written is written by comparing and swapping the source's state, so that it is of the very rows that were counted.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import Any

import asyncpg

from app.conversations import index, source_state
from app.conversations.batch import Batch
from app.conversations.foreign import Extent, Foreign, Standing
from app.conversations.ranges import LEAST
from app.conversations.rounds import Piece, Place
from app.conversations.serial import is_shrunk
from app.conversations.source_state import Outrun, State
from app.conversations.sources.shape import Skipped
from app.conversations.summary import KEYS, Ranked, Said, Summaries, Summary, fold
from app.conversations.sweep import Sweep, is_known, known_keys
from app.postgres import CONFLICT, Pool

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# A conversation of a source, as its user and its id.
Name = tuple[str, str]

# Conversations of the index that are compared at once, and how many that look wrong are gathered before they are read
# whole: where sessions have no index, each reading is of the whole table.
_BATCH, _SUSPECTS = 200, 500
# Keys of a conversation are up to 200; where rows are found by them, those of so many conversations are asked for.
_BY_KEYS = 25
# How often something is tried again that a pass of discovery has overtaken.
_TRIES = 5

_NAMES = """
select username, conversation_id, message_ids from conversations
where source = $1 and (username, conversation_id) > ($2, $3) order by username, conversation_id limit $4
"""
_KEPT = """
select username, conversation_id from conversations
where source = $1 and (username, conversation_id) in (select * from unnest($2::text[], $3::text[]))
"""
_INDEXED = """
select username, conversation_id, first_message_at, last_message_at, message_ids, message_count, total_tokens,
    chatbot_id, chatbot_id_rank, model, model_rank, client_ip, client_ip_rank,
    first_question, first_question_rank, last_question, last_question_rank,
    exists (select from conversation_words w where w.conversation = c.id and w.said_at = c.last_message_at) as is_found
from conversations c
where source = $1 and (username, conversation_id) in (select * from unnest($2::text[], $3::text[]))
"""


@dataclass(slots=True)
class _Counted:
    """What the rows of some conversations add up to that were counted; `untimed` have rows without a time."""

    summaries: Summaries
    untimed: set[Name]


@dataclass(frozen=True, slots=True)
class _Differing:
    """What the index should say of conversations of which it says something else, and those that are gone."""

    right: Summaries
    gone: list[Name]

    def __len__(self) -> int:
        return len(self.right) + len(self.gone)


class ForeignDrift:
    """Of one source, over a connection to its table. To be used by one at a time, beside no pass of discovery but
    those of webhooks, which it would be overtaken by."""

    def __init__(self, pool: Pool, source: str, foreign: Foreign) -> None:
        self._pool = pool
        self._source = source
        self._foreign = foreign
        self._shape = shape = foreign.shape
        self._session = shape.session
        self._keeps = Batch.of(shape).most_keys
        self._is_serial = shape.key.is_serial
        self._unsure = 0

    async def piece(self, place: Place, *, until: float) -> Piece:
        """From a place on, to the end of the round or `until`, in monotonic time; a batch at least."""
        standing = await self._foreign.standing()
        self._is_serial = is_serial = self._shape.key.is_serial and not standing.falls
        if not _is_ready(await source_state.load(self._pool, self._source), standing, is_serial=is_serial):
            # What was not read to its end yet, or begins anew, is discovery's.
            return Piece(place)
        if place.get("walk", "index") == "index":
            return await self._along_index(place, until)
        return await (self._along_keys(place, until) if is_serial else self._along_places(place, standing, until))

    # -- the index beside the table

    async def _along_index(self, place: Place, until: float) -> Piece:
        after, compared, suspects = tuple(place.get("after", ("", ""))), 0, set[Name]()
        while True:
            rows = await self._pool.fetch(_NAMES, self._source, *after, _BATCH)
            if not rows:
                break
            suspects |= await self._suspected({(row[0], row[1]): row[2] for row in rows})
            after, compared = (rows[-1][0], rows[-1][1]), compared + len(rows)
            if len(suspects) >= _SUSPECTS or monotonic() > until:
                break
        drift = await self._put_right(suspects)
        return Piece({"walk": "index", "after": after} if rows else {"walk": "rows"}, compared, drift, self._unsure)

    async def _suspected(self, names: dict[Name, list[str]]) -> set[Name]:
        """Of which the index seems to say something else; where it is quick to tell."""
        state = await source_state.load(self._pool, self._source)
        if self._session is not None and self._session.is_indexed:
            return _names(await self._differing(state, names, by_keys=False))
        few = {name: keys for name, keys in names.items() if 0 < len(keys) < KEYS}
        suspects: set[Name] = set()
        for some in _pieces(list(few), _BY_KEYS):
            suspects |= _names(await self._differing(state, {name: few[name] for name in some}, by_keys=True))
        if self._session is None:
            # Nothing finds the older rows of those with more.
            self._unsure += len(names) - len(few)
            return suspects
        return suspects | (names.keys() - few.keys())

    async def _put_right(self, names: Collection[Name]) -> int:
        """Read these whole, and write what the index says wrongly; returns how many that were."""
        drift = 0
        for some in _pieces(sorted(names), _SUSPECTS if self._session else _BY_KEYS):
            try:
                drift += await self._replaced(some)
            except asyncpg.QueryCanceledError:
                # Of a table that takes too long to be read through nothing else is held up.
                self._unsure += len(some)
        return drift

    async def _replaced(self, names: Sequence[Name]) -> int:
        for _ in range(_TRIES):
            state = await source_state.load(self._pool, self._source)
            by_keys = self._session is None
            keys = await self._keys(names) if by_keys else {name: [] for name in names}
            found = await self._differing(state, keys, by_keys=by_keys)
            if not len(found):
                return 0
            try:
                async with self._pool.acquire() as connection, connection.transaction():
                    await source_state.swap(connection, self._source, state, rows=0, skipped={})
                    await index.replace(connection, self._source, found.right, found.gone)
                return len(found)
            except (Outrun, *CONFLICT):
                continue
        self._unsure += len(names)
        return 0

    async def _keys(self, names: Iterable[Name]) -> dict[Name, list[str]]:
        there = await self._pool.fetch(_INDEXED, self._source, *_columns(names))
        return {(row["username"], row["conversation_id"]): row["message_ids"] for row in there}

    async def _differing(self, state: State, names: dict[Name, list[str]], *, by_keys: bool) -> _Differing:
        """`names` with the keys of their rows, as far as they are known."""
        counted = await self._counted(state, names, by_keys=by_keys)
        there = {
            (row["username"], row["conversation_id"]): row
            for row in await self._pool.fetch(_INDEXED, self._source, *_columns(names))
        }
        right: Summaries = {}
        for name, summary in counted.summaries.items():
            if name in counted.untimed:
                summary.first_at = summary.last_at = None
            if name not in there or not self._agrees(there[name], summary):
                right[name] = summary
        return _Differing(right, [name for name in there if name not in counted.summaries])

    def _agrees(self, row: asyncpg.Record, summary: Summary) -> bool:
        said = tuple(row)[5:]
        if self._keeps:
            said += (row["message_ids"],)
        if summary.first_at is not None:
            said += (row["first_message_at"], row["last_message_at"])
        return said == self._told(summary)

    def _told(self, of: Summary) -> tuple[Any, ...]:
        told: tuple[Any, ...] = (
            *(of.messages, of.tokens, *_ranked(of.chatbot_id), *_ranked(of.model), *_ranked(of.client_ip)),
            *(*_ranked(of.first_question), *_ranked(of.last_question), True),
        )
        if self._keeps:
            told += ([key for _, key in of.keys],)
        return told if of.first_at is None else (*told, of.first_at, of.last_at)

    async def _counted(self, state: State, names: dict[Name, list[str]], *, by_keys: bool) -> _Counted:
        shape, counted = self._shape, _Counted({}, set())
        if by_keys:
            where = shape.key.condition.replace("$1", "$2")
            given = [key for keys in names.values() for key in keys]
        else:
            assert self._session is not None
            type_ = self._session.type
            where = f"{self._session.column} = any($2::text[]::{type_}[])"
            given = sorted({name[1] for name in names if _is_of(type_, name[1])})
        since = Sweep(**state.sweep).since
        async with aclosing(self._foreign.chosen(where, given, new=since)) as pages:
            async for rows in pages:
                said = [one for one in await self._of(state, rows) if (one.username, one.conversation_id) in names]
                counted.untimed |= {(one.username, one.conversation_id) for one in said if one.at is None}
                fold(said, into=counted.summaries, most_keys=self._keeps)
        return counted

    async def _of(self, state: State, rows: Sequence[asyncpg.Record]) -> list[Said]:
        """Those of the rows that were counted."""
        read = [(row, said) for row in rows if not isinstance(said := self._shape.said(row), Skipped)]
        if self._is_serial:
            return [said for row, said in read if state.has(row[0])]
        new = [said for row, said in read if row["parley_is_new"]]
        known = await known_keys(self._pool, self._source, new) if new else {}
        return [
            said
            for row, said in read
            if not row["parley_is_new"] or is_known(known.get((said.username, said.conversation_id)), said)
        ]

    # -- the table beside the index

    async def _along_keys(self, place: Place, until: float) -> Piece:
        """Up to the last id that was counted when the walk began; of what is above the watermark, what was counted."""
        state = await source_state.load(self._pool, self._source)
        last = state.seen.last(state.settled)
        after, to = place.get("after", LEAST), min(place.get("to", last), last)
        rows, drift, suspects = 0, 0, set[Name]()
        async with aclosing(self._foreign.pages([(after, to + 1)])) as pages:
            async for page in pages:
                after, rows = page.position, rows + len(page.rows)
                drift += await self._missing([row for row in page.rows if state.has(row[0])], suspects)
                if len(suspects) >= _SUSPECTS or monotonic() > until:
                    break
            else:
                after = to
        drift += await self._put_right(suspects)
        ended = after >= to
        return Piece(None if ended else {"walk": "rows", "after": after, "to": to}, 0, drift, self._unsure)

    async def _along_places(self, place: Place, standing: Standing, until: float) -> Piece:
        """Rows of transactions that had ended before the last sweep began. A table that was rewritten begins anew."""
        since = Sweep(**(await source_state.load(self._pool, self._source)).sweep).since
        if place.get("file") != standing.file:
            place = {"walk": "rows", "at": "(0,0)", "pages": standing.pages, "file": standing.file}
        at, drift, suspects, ended = place["at"], 0, set[Name](), False
        async with aclosing(self._foreign.swept(Extent(at, place["pages"], None, since, None))) as pages:
            async for page in pages:
                at = page.place
                drift += await self._missing([row for row in page.rows if not row["parley_is_new"]], suspects)
                if len(suspects) >= _SUSPECTS or monotonic() > until:
                    break
            else:
                ended = True
        drift += await self._put_right(suspects)
        return Piece(None if ended else {**place, "at": at}, 0, drift, self._unsure)

    async def _missing(self, rows: Sequence[asyncpg.Record], suspects: set[Name]) -> int:
        """Rows that are in no conversation: those of the conversations are read whole, where that can be done, else
        these are counted; returns in how many they were."""
        said = [one for row in rows if not isinstance(one := self._shape.said(row), Skipped)]
        if self._session is not None:
            suspects |= {(one.username, one.conversation_id) for one in await self._uncounted(said)}
            return 0
        for _ in range(_TRIES):
            state = await source_state.load(self._pool, self._source)
            found = fold(await self._uncounted(said))
            if not found:
                return 0
            try:
                async with self._pool.acquire() as connection, connection.transaction():
                    await source_state.swap(connection, self._source, state, rows=0, skipped={})
                    await index.merge(connection, self._source, found)
                return len(found)
            except (Outrun, *CONFLICT):
                continue
        self._unsure += len(found)
        return 0

    async def _uncounted(self, said: Sequence[Said]) -> list[Said]:
        if not said:
            return []
        if self._keeps:
            known = await known_keys(self._pool, self._source, said)
            return [one for one in said if not is_known(known.get((one.username, one.conversation_id)), one)]
        names = {(one.username, one.conversation_id) for one in said}
        there = {tuple(row) for row in await self._pool.fetch(_KEPT, self._source, *_columns(names))}
        return [one for one in said if (one.username, one.conversation_id) not in there]


def _is_ready(state: State, standing: Standing, *, is_serial: bool) -> bool:
    if is_serial:
        return not is_shrunk(state, standing)
    return Sweep(**state.sweep).since > 0


def _names(differing: _Differing) -> set[Name]:
    return {*differing.right, *differing.gone}


def _is_of(type_: str, text: str) -> bool:
    """Whether a text can be of a column's type: of any other one there is nothing."""
    if type_ == "uuid":
        return _UUID.fullmatch(text) is not None
    if type_ in ("int2", "int4", "int8"):
        return text.lstrip("-").isdecimal() and text.isascii() and abs(int(text[:20])) < 1 << (8 * int(type_[3:]) - 1)
    return True


def _pieces(names: Sequence[Name], most: int) -> list[Sequence[Name]]:
    return [names[start : start + most] for start in range(0, len(names), most)]


def _columns(names: Iterable[Name]) -> tuple[list[str], list[str]]:
    listed = list(names)
    return [name[0] for name in listed], [name[1] for name in listed]


def _ranked(value: Ranked | None) -> tuple[str, int | None]:
    return ("", None) if value is None else (value[1], value[0])
