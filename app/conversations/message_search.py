"""Search over all messages of our own chats: conversations in which one message has all the words, with that message.

Two ways, as for questions: what is rare is looked for in the index of words; what is common is looked for in one
conversation after the other, from the end where the list begins, until the page is full. A user behind the second wall
goes the second way along their own.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from app.conversations.index import OWN
from app.conversations.listing import require_index
from app.conversations.message_words import MOST
from app.conversations.pages import Page, Place, Slice, Total, Wanted
from app.conversations.search import Look, look
from app.conversations.terms import ENTRY, EVERY, OWN_IDS, Terms
from app.postgres import Connection

# Characters around a match that are shown of it: before, and in all.
_BEFORE, _AROUND = 60, 200
# What it costs, in µs: to find a message by its words, to look one up that has the rarest of them, and to look through
# the messages of a conversation.
_FOUND_US, _LOOKED_US, _ASKED_US = 12.0, 0.2, 40.0
# A walk goes as far as costs what the index of words would, within these; one that would have to be luckier than likely
# is not begun.
_SHORT, _LONG, _LIKELY = 500, 20_000, 1.5
# Farther than any list. Without a number the planner would sort all of it first.
_END = 1 << 40

_TABLE = "message_words"
_CONVERSATIONS = "select coalesce(sum(conversations), 0)::bigint from conversation_counts where source = $1"
# Words follow a little behind messages: what is not shown any more is not found.
_MATCH = """
from (select message_id, words from message_words
    where username = {of}.username and conversation_id = {of}.conversation_id offset 0) w
join messages m on m.user_id = {of}.username and m.id = w.message_id
where w.words @@ {query} and not m.is_deleted and m.status <> 'failed'
"""
# A subquery in a condition is asked row by row: what has an order keeps it, and is left where the page is full.
_HAS = f"(select true {_MATCH} limit 1)"
_NEARBY = """
select id, username, conversation_id, last_message_at as at, model, chatbot_id, source from conversations c
where {nearby} order by last_message_at {way}, id {way} limit {far}
"""
_WALK = f"""
page as materialized (
    select id, at from ({_NEARBY}) walked where {{where}} and {_HAS.replace("{of}", "walked")}
    order by at {{way}}, id {{way}} limit {{limit}} offset {{offset}})
"""
_WALKED = f"select count(*) from ({_NEARBY}) walked"
# `offset 0` keeps other indexes out of it.
_MATCHING = f"""
hits as materialized (
    select distinct username, conversation_id from (
        select username, conversation_id from message_words where words @@ {{query}} offset 0) found where {{whose}}),
matching as materialized (
    select c.id, c.username, c.conversation_id, c.last_message_at as at from hits
    cross join lateral (select * from conversations where source = '{OWN}' and username = hits.username
        and conversation_id = hits.conversation_id offset 0) c where {{where}}),
page as materialized (
    select id, at from (select * from matching order by at {{way}}, id {{way}}) found
    where {_HAS.replace("{of}", "found")} limit {{limit}} offset {{offset}})
"""
_PAGE = f"""
with {{page}}
select {ENTRY}, {OWN_IDS} as message_ids,
    hit.id as match_id, hit.role as match_role, hit.snippet{{more}}
from page cross join lateral (select * from conversations where id = page.id offset 0) c
cross join lateral (
    select id, role, concat(case when since > 1 then '…' end, substr(content, since, {_AROUND}),
        case when length(content) >= since + {_AROUND} then '…' end) as snippet
    from (
        select m.id, m.role, m.content,
            greatest(strpos(lower(left(m.content, {MOST})), {{word}}) - {_BEFORE}, 1) as since
        {_MATCH.replace("{of}", "c")} order by m.position desc limit 1) newest) hit
order by page.at {{way}}, page.id {{way}}
"""
_WORD = re.compile(r"\w+")


async def page(connection: Connection, wanted: Wanted, *, size: int, after: Place | None = None, skip: int = 0) -> Page:
    """As `listing.page`, of the conversations with a message that has the words; each row with its newest such message.

    A total is that of what was found, and a lower bound where the list was not walked to its end.
    """
    found = await _page(connection, wanted, Slice(size, after, skip))
    await require_index(connection, found.rows)
    return found


async def _page(connection: Connection, wanted: Wanted, slice_: Slice) -> Page:
    seen = await look(connection, wanted.query or "", [], table=_TABLE)
    if not seen.words:
        return Page([], Total(0), None)
    far = None if seen.is_bound else await _far(connection, slice_, seen)
    if far != 0:
        found = await _walked(connection, wanted, slice_, seen.words, far)
        if found is not None:
            return found
    return await _found(connection, wanted, slice_, seen.words)


async def _far(connection: Connection, slice_: Slice, seen: Look) -> int:
    """How many conversations to look through for a page; 0 where it is not worth it."""
    conversations = max(await connection.fetchval(_CONVERSATIONS, OWN), 1)
    found_us = (_LOOKED_US * seen.rarest + _FOUND_US * seen.share) * seen.conversations
    within = min(seen.share * max(seen.conversations / conversations, 1), 1.0)
    if not within or _LIKELY * slice_.needed / within * _ASKED_US > found_us:
        return 0
    return min(max(_SHORT, int(found_us / _ASKED_US)), _LONG)


async def _walked(connection: Connection, wanted: Wanted, slice_: Slice, words: str, far: int | None) -> Page | None:
    """So far along the list, or to its end; None where that was too short for a page and not the end."""
    sql, values = walking(wanted, slice_, words=words, far=far)
    rows = await connection.fetch(sql, *values)
    is_end = len(rows) <= slice_.size
    if is_end and far is not None:
        sql, values = reaching(wanted, slice_, far=far)
        if await connection.fetchval(sql, *values) >= far:
            return None
    if slice_.skip and not rows:
        sql, values = walking(wanted, Slice(slice_.skip - 1), words=words, far=far, counts=True)
        return Page([], Total(await connection.fetchval(sql, *values)), None)
    return Page.of(rows, slice_, Total(slice_.skip + len(rows), exact=is_end))


async def _found(connection: Connection, wanted: Wanted, slice_: Slice, words: str) -> Page:
    sql, values = matching(wanted, slice_, words=words)
    rows = await connection.fetch(sql, *values)
    if slice_.skip and not rows:
        return Page([], (await _found(connection, wanted, Slice(1), words)).total, None)
    return Page.of(rows, slice_, Total(rows[0]["matching"] if rows else 0))


def walking(
    wanted: Wanted, slice_: Slice, *, words: str, far: int | None, counts: bool = False
) -> tuple[str, list[Any]]:
    """What looks through one conversation after the other, with its values; `counts`: how many it finds."""
    terms = _Terms(wanted=wanted)
    nearby, where = terms.nearby(slice_.after)
    query = terms.add(words)
    far_ = terms.add(_END if far is None else far)
    page = terms.chosen(_WALK, slice_, query, nearby=nearby, where=where, far=far_)
    return (f"with {page} select count(*) from page", terms.values) if counts else terms.told(page, query)


def reaching(wanted: Wanted, slice_: Slice, *, far: int) -> tuple[str, list[Any]]:
    """What counts how many conversations a walk has come to."""
    terms = _Terms(wanted=wanted)
    nearby, _ = terms.nearby(slice_.after, alone=True)
    return _WALKED.format(nearby=nearby, way=terms.way, far=terms.add(far)), terms.values


def matching(wanted: Wanted, slice_: Slice, *, words: str) -> tuple[str, list[Any]]:
    """What finds messages by their words, and counts their conversations."""
    terms = _Terms(wanted=wanted)
    query = terms.add(words)
    whose = f"username = {terms.add(wanted.username)}" if wanted.username is not None else "true"
    where = terms.all_of(terms.named(wanted.facets, "c."), terms.behind(slice_.after))
    more = ", (select count(*) from matching) as matching"
    return terms.told(terms.chosen(_MATCHING, slice_, query, whose=whose, where=where), query, more=more)


@dataclass(slots=True)
class _Terms(Terms):
    """Those on conversations `c`."""

    wanted: Wanted = field(kw_only=True)

    @property
    def way(self) -> str:
        return "desc" if self.wanted.newest_first else "asc"

    def behind(self, after: Place | None) -> list[str]:
        return self.between(self.wanted, after, "c.last_message_at", "c.id")

    def nearby(self, after: Place | None, *, alone: bool = False) -> tuple[str, str]:
        """Along which conversations a walk goes, and which of those are wanted."""
        facets = self.wanted.facets
        along = dict(list(facets.items())[:1])
        nearby = self.all_of(self.named(along, "c.") or [f"c.{EVERY}"], self.behind(after))
        if alone:
            return nearby, ""
        rest = {name: value for name, value in facets.items() if name not in along}
        return nearby, self.all_of([f"walked.source = '{OWN}'"], self.named(rest, "walked."))

    def chosen(self, which: str, slice_: Slice, query: str, **given: str) -> str:
        limit, offset = self.add(slice_.size + 1), self.add(slice_.skip)
        return which.format(way=self.way, limit=limit, offset=offset, query=query, **given)

    def told(self, page: str, query: str, *, more: str = "") -> tuple[str, list[Any]]:
        first = _WORD.search(self.wanted.query or "")
        word = f"{self.add(first[0].lower() if first else '')}::text"
        return _PAGE.format(page=page, way=self.way, word=word, more=more, query=query), self.values
