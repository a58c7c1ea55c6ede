"""The statements of lists and searches: one shape for each way of finding, so that its plan needs no estimates."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from app.conversations.index import OWN
from app.conversations.pages import Place, Slice, Wanted
from app.conversations.search import Look
from app.conversations.terms import ENTRY, EVERY, OWN_IDS, Terms

_COUNT = "select count(*) from (select from conversations where {where} limit {far}) counted"
# Only the index is walked to where the page begins, and rows are read for the page alone. A subquery in a condition is
# asked row by row: what has an order keeps it, and is left where the page is full.
_WALK = """
page as materialized (
    select id, last_message_at as at from conversations where {where}
    order by last_message_at {way}, id {way} limit {limit} offset {offset})
"""
_HAS = "(select w.words @@ {query} from conversation_words w where w.conversation = {id})"
# So far and no further, along the conversations of one filter or along the words of all.
_NEARBY = """
select id, last_message_at as at, model, chatbot_id, source from conversations where {nearby}
order by last_message_at {way}, id {way} limit {far}
"""
_SPOKEN = """
select conversation as id, said_at as at, words from conversation_words where {nearby}
order by said_at {way}, conversation {way} limit {far}
"""
_STROLL = """
page as materialized (
    select id, at from ({walk}) walked where {where} order by at {way}, id {way} limit {limit} offset {offset})
"""
_COUNT_NEWEST = "select count(*) filter (where {where}) as found, count(*) as walked from ({walk}) walked"
# What the index of words finds is put in order by what stands beside the words; `offset 0` keeps another index out of
# it, which would find half of all. Whether a conversation is gone, or has a longer name than a facet, says its own row.
_IS = "(select {named} from conversations c where c.id = {of}.id)"
_ASKED = """
    select conversation, said_at, username, words, ctid from conversation_words where words @@ {asked}{among} offset 0
"""
_MATCHING = """
matching as materialized (
    select conversation as id, said_at as at, ctid as place from ({found}) all_of_it where {where}),
page as materialized (
    select id, at from (select id, at from matching order by at {way}, id {way}) found where {is_it}
    limit {limit} offset {offset})
"""
# Asked once: behind the end no conversation is looked at, where otherwise all that are found would be.
_IS_AS_LONG = "(select count(*) from matching) > {skip}"
# Only what is among so many conversations: the index of times is put beside the index of words before any row is read.
# Times are asked for from both ends, as only then a plan without values takes them for selective.
_EDGE = """
edge as materialized (
    select said_at from conversation_words where {where}
    order by said_at {way}, conversation {way} limit 1 offset {far})
"""
_AMONG = " and said_at between {first} and {last}"
_AT_EDGE = "coalesce((select said_at from edge), {end})"
_COUNT_WORDS = "select count(*) from (select from ({found}) all_of_it where {where} limit {far}) counted"
_MATCHED = "count(*) as matching, min(place) as first, max(place) as last"
_IS_ALL = "not exists (select from edge) as is_all"
_ROWS = "page cross join lateral (select * from conversations where id = page.id offset 0) c"
# What is told of all that was found stands beside each row, and beside an empty one where the page has none.
_TOLD = f"(select {{told}} from matching) told left join ({_ROWS}) on true"
_PAGE = f"""
with {{page}}
select {ENTRY}, case when c.source = '{OWN}' then {OWN_IDS} else c.message_ids end as message_ids{{more}}
from {{rows}}
order by page.at {{way}}, page.id {{way}}
"""


def walking(wanted: Wanted, slice_: Slice, *, words: str = "") -> tuple[str, list[Any]]:
    """What walks along an index to the page and one row more, with its values."""
    terms = _Terms()
    where = terms.all_of(terms.named(wanted.facets) or [EVERY], terms.between(wanted, slice_.after), terms.has(words))
    return terms.page(_WALK, wanted, slice_, where=where)


def strolling(wanted: Wanted, slice_: Slice, seen: Look | None = None, *, far: int) -> tuple[str, list[Any]]:
    """Likewise, but only so far along the index of one filter, or along the words."""
    terms = _Terms()
    walk, where = terms.nearby(wanted, slice_.after, seen, far)
    if not wanted.along:
        where += f" and {terms.is_it(wanted, 'walked')}"
    return terms.page(_STROLL, wanted, slice_, walk=walk, where=where)


def matching(wanted: Wanted, slice_: Slice, seen: Look, *, far: int | None = None) -> tuple[str, list[Any]]:
    """What finds by words and facets: all, or so many, whichever those are.

    Each row has how many those are (`matching`) and the blocks of the first and the last of them (`first`, `last`);
    without any there is one without an id.
    """
    terms = _Terms()
    found, where = terms.found(wanted, slice_.after, seen)
    if far is not None:
        where += f" limit {terms.add(far)}"
    is_it = terms.is_it(wanted)
    if slice_.skip:
        is_it = f"{_IS_AS_LONG.format(skip=terms.add(slice_.skip))} and {is_it}"
    return terms.page(_MATCHING, wanted, slice_, _MATCHED, found=found, where=where, is_it=is_it)


def near(wanted: Wanted, slice_: Slice, seen: Look, *, far: int) -> tuple[str, list[Any]]:
    """What finds by words and facets among so many conversations; `is_all` says that no more are behind the place."""
    terms = _Terms()
    edge = terms.edge(wanted, slice_, far)
    since, until = _span(wanted, slice_.after)
    first, last = terms.add(since) if since else "'-infinity'", terms.add(until) if until else "'infinity'"
    if wanted.newest_first:
        first = _AT_EDGE.format(end=first)
    else:
        last = _AT_EDGE.format(end=last)
    found, where = terms.found(wanted, slice_.after, seen, among=_AMONG.format(first=first, last=last))
    which, told = f"{edge},{_MATCHING}", f"{_MATCHED}, {_IS_ALL}"
    return terms.page(which, wanted, slice_, told, found=found, where=where, is_it=terms.is_it(wanted))


def _span(wanted: Wanted, after: Place | None) -> tuple[datetime | None, datetime | None]:
    """From when until when there can be anything behind a place; None where that is open."""
    since, until = wanted.since, wanted.until
    if after is not None and wanted.newest_first:
        until = min(until or after.at, after.at)
    elif after is not None:
        since = max(since or after.at, after.at)
    return since, until


def counting_walked(wanted: Wanted, *, words: str, far: int) -> tuple[str, list[Any]]:
    """What counts those that a walk would come to, up to so many."""
    terms = _Terms()
    where = terms.all_of(terms.named(wanted.facets) or [EVERY], terms.between(wanted, None), terms.has(words))
    return _COUNT.format(where=where, far=terms.add(far)), terms.values


def counting(wanted: Wanted, seen: Look, *, far: int) -> tuple[str, list[Any]]:
    """What counts how many the index of words finds, up to so many."""
    terms = _Terms()
    found, where = terms.found(wanted, None, seen)
    return _COUNT_WORDS.format(found=found, where=where, far=terms.add(far)), terms.values


def counting_newest(wanted: Wanted, seen: Look | None = None, *, far: int) -> tuple[str, list[Any]]:
    """What counts among so many of those that a walk would come to first."""
    terms = _Terms()
    walk, where = terms.nearby(wanted, None, seen, far)
    return _COUNT_NEWEST.format(walk=walk, where=where), terms.values


@dataclass(slots=True)
class _Terms(Terms):
    """Those that ask for words, and along which index a list is walked."""

    def has(self, words: str, id_: str = "conversations.id") -> list[str]:
        return [_HAS.format(query=self.add(words), id=id_)] if words else []

    def spoken(self, wanted: Wanted, after: Place | None) -> str:
        """Of words. A facet holds the beginning of a name; whose they are is never left to that."""
        user = {name: value for name, value in wanted.facets.items() if name == "username"}
        return self.all_of(self.named(user), self.between(wanted, after, "said_at", "conversation"))

    def edge(self, wanted: Wanted, slice_: Slice, far: int) -> str:
        """The one behind so many conversations; none where there are fewer."""
        way = "desc" if wanted.newest_first else "asc"
        return _EDGE.format(where=self.spoken(wanted, slice_.after), way=way, far=self.add(far))

    def found(self, wanted: Wanted, after: Place | None, seen: Look, among: str = "") -> tuple[str, str]:
        """What the index of words finds, and which of it is wanted."""
        found = _ASKED.format(asked=self.add(seen.asked), among=among)
        rest = [f"words @@ {self.add(seen.query)}"] if seen.query != seen.asked else []
        return found, self.all_of([self.spoken(wanted, after)], rest)

    def is_it(self, wanted: Wanted, of: str = "found") -> str:
        rest = {name: value for name, value in wanted.facets.items() if name != "username"}
        return _IS.format(named=self.all_of(self.named(rest)), of=of)

    def nearby(self, wanted: Wanted, after: Place | None, seen: Look | None, far: int) -> tuple[str, str]:
        """A walk, and which of its rows are wanted. Words are asked for in what was seen of them."""
        way = "desc" if wanted.newest_first else "asc"
        if not wanted.along:
            assert seen is not None
            walk = _SPOKEN.format(nearby=self.spoken(wanted, after), way=way, far=self.add(far))
            return walk, f"words @@ {self.add(seen.query)}"
        nearby = self.all_of(self.named(wanted.along), self.between(wanted, after))
        rest = {name: value for name, value in wanted.facets.items() if name not in wanted.along}
        where = self.all_of(self.named(rest), self.has(seen.words if seen else "", "walked.id"))
        return _NEARBY.format(nearby=nearby, way=way, far=self.add(far)), where

    def page(self, which: str, wanted: Wanted, slice_: Slice, told: str = "", **given: str) -> tuple[str, list[Any]]:
        way = "desc" if wanted.newest_first else "asc"
        limit, offset = self.add(slice_.size + 1), self.add(slice_.skip)
        chosen = which.format(way=way, limit=limit, offset=offset, **given)
        more, rows = (", told.*", _TOLD.format(told=told)) if told else ("", _ROWS)
        return _PAGE.format(page=chosen, way=way, more=more, rows=rows), self.values
