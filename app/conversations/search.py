"""What a search looks for, and how common that is: the words of a query as PostgreSQL's own parser sees them.

A tsquery is put together here from lexemes that the parser has found, never from what somebody wrote.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod, sqrt
from operator import itemgetter

import asyncpg

from app.conversations.words import tokens
from app.postgres import Connection

# A phrase in quotes, or what stands between spaces. A quote that nothing closes is a space.
_PART = re.compile(r'"([^"]*)"|([^\s"]+)')
# Letters before a star. With one it would be a tenth of all words, which no index finds quickly.
_STEM = 2
# What nearly all have is not asked of the index where there is something rarer: "how do I" is in every other question.
# Reading the list of a word costs so many µs for each that has it. Without it more rows have to be looked at until what
# they say is enough, one for each that has not, and a thousand that have cost so many µs.
_LISTED_US, _ENOUGH_US = 0.01, 2_500
_TABLE = "conversation_words"

# The words of each part, in their order, and each one's share of all conversations, as the last ANALYZE has seen it.
# A word that is not among the thousand most common is taken for a tenth as common as the last of them; a facet for a
# third, as there are fewer. Without statistics nothing is known.
_LOOK = f"""
with terms as (
    select n, lexeme, position, is_stem
    from unnest($1::text[], $2::boolean[]) with ordinality as parts(part, is_stem, n),
        unnest({tokens("part")}) as word(lexeme, positions, weights), unnest(positions) as position
    union all select 0, facet, 0, false from unnest($3::text[]) as facet
    union all select -1, nearby, 0, false from unnest($4::text[]) as nearby),
common as (
    select most_common_elems::text::text[] as words, most_common_elem_freqs as shares
    from pg_stats where (schemaname, tablename, attname) = ((select relnamespace::regnamespace::text from pg_class
        where oid = 'conversation_words'::regclass), 'conversation_words', 'words')),
overall as (
    select greatest(reltuples, 0)::float8 as conversations, row_security_active(oid) as is_bound,
        pg_relation_size(oid) / current_setting('block_size')::int as blocks
    from pg_class where oid = 'conversation_words'::regclass)
select conversations, is_bound, blocks, t.n, t.lexeme, t.position, t.is_stem, seen.share is null as is_guess, coalesce(
    seen.share,
    (select shares[cardinality(words) + 1] / case when t.n > 0 then 10 else 3 end from common),
    0)::float8 as share
from overall left join terms t on true cross join lateral (select coalesce(
    case when t.is_stem then (select sum(share) from common, unnest(words, shares) as s(word, share)
        where starts_with(word, t.lexeme)) end,
    (select shares[array_position(words, t.lexeme)] from common)) as share) seen
order by t.n, t.position, t.lexeme
"""


@dataclass(frozen=True, slots=True)
class Part:
    """Words that stand next to each other; with `is_stem` the last one is the beginning of a word."""

    text: str
    is_stem: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """What to look for and what to expect. Shares are of all conversations, from 0 to 1.

    `words` is the tsquery of the words alone, empty where none was given; `query` has the facets as well, and `asked`
    is that part of it which the index is asked for. No more match than `rarest` says, as far as statistics know, and
    `share` if terms meet by chance; the index finds `share_asked`. `within` is the share of those that have the facet
    one walks along. `is_guess`: statistics do not name each term. `is_bound`: a user's rows alone can be seen. The
    table has so many `blocks`.
    """

    words: str
    query: str
    asked: str
    rarest: float
    share: float
    share_asked: float
    within: float
    terms: int
    conversations: float
    blocks: int
    is_guess: bool
    is_bound: bool

    @property
    def most(self) -> float:
        """How many have the rarest term: no more match."""
        return self.rarest * self.conversations


def parts(query: str) -> list[Part]:
    """A query's phrases and words; all of them have to be found."""
    return [_part(phrase, word) for phrase, word in _PART.findall(query)]


def _part(phrase: str, word: str) -> Part:
    stem = word.rstrip("*")
    return Part(phrase or stem, is_stem=stem != word and len(stem) >= _STEM)


async def look(
    connection: Connection, query: str, facets: Sequence[str], along: Sequence[str] = (), *, table: str = _TABLE
) -> Look:
    """Read what there is to know before looking for these words and facets, or walking along one of those.

    `words` is empty where the query has no word, too. In another `table`, `conversations` are its rows.
    """
    given = parts(query)
    values = ([part.text for part in given], [part.is_stem for part in given], facets, along)
    overall, *_ = found = await connection.fetch(_LOOK.replace(_TABLE, table), *values)
    rows = [row for row in found if row["n"] is not None]
    phrases = [_term(list(words)) for n, words in groupby(rows, itemgetter("n")) if n > 0]
    terms = [_Term(_quoted(row["lexeme"]), row["share"], row["share"]) for row in rows if row["n"] == 0] + phrases
    rarest = min((term.rarest for term in terms), default=1.0)
    common = sqrt(_ENOUGH_US / _LISTED_US / max(overall["conversations"], 1))
    asked = [term for term in terms if term.rarest <= max(rarest, common)]
    share = prod(term.share for term in terms)
    walked = prod(row["share"] for row in rows if row["n"] < 0)
    return Look(
        words=_all_of(phrases),
        query=_all_of(terms),
        asked=_all_of(asked),
        rarest=rarest,
        share=share,
        share_asked=prod(term.share for term in asked),
        within=min(share / walked, 1.0) if walked else 0.0,
        terms=sum(row["n"] >= 0 for row in rows),
        conversations=overall["conversations"],
        blocks=overall["blocks"],
        is_guess=any(row["is_guess"] for row in rows if row["n"] >= 0),
        is_bound=overall["is_bound"],
    )


@dataclass(frozen=True, slots=True)
class _Term:
    """A facet or a phrase of a tsquery. No more have it than `rarest` says, and `share` if its words meet by chance."""

    text: str
    rarest: float
    share: float


def _term(words: Sequence[asyncpg.Record]) -> _Term:
    """Words at the distances at which they stand."""
    texts, shares = [_quoted(word["lexeme"]) for word in words], [word["share"] for word in words]
    if words[-1]["is_stem"]:
        texts[-1] += ":*"
    gaps = [f" <{later['position'] - earlier['position']}> " for earlier, later in pairwise(words)]
    joined = "".join(text + gap for text, gap in zip(texts, [*gaps, ""], strict=True))
    return _Term(f"({joined})", min(shares), prod(shares))


def _all_of(terms: Sequence[_Term]) -> str:
    return " & ".join(term.text for term in terms)


def _quoted(lexeme: str) -> str:
    """As a tsquery's text takes any lexeme."""
    return "'" + lexeme.replace("\\", "\\\\").replace("'", "''") + "'"
