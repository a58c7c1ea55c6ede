"""What a search looks for, and how common that is: the words of a query as PostgreSQL's own parser sees them.

A tsquery is put together here from lexemes that the parser has found, never from what somebody wrote.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import prod
from operator import itemgetter

import asyncpg

from app.conversations.words import tokens
from app.postgres import Connection

# A phrase in quotes, or what stands between spaces. A quote that nothing closes is a space.
_PART = re.compile(r'"([^"]*)"|([^\s"]+)')
# Letters before a star. With one it would be a tenth of all words, which no index finds quickly.
_STEM = 2
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
        where oid = 'conversation_words'::regclass), 'conversation_words', 'words'))
select t.n, t.lexeme, t.position, t.is_stem, coalesce(
    case when t.is_stem then (select sum(share) from common, unnest(words, shares) as s(word, share)
        where starts_with(word, t.lexeme)) end,
    (select coalesce(shares[array_position(words, t.lexeme)],
        shares[cardinality(words) + 1] / case when t.n > 0 then 10 else 3 end) from common),
    0)::float8 as share
from terms t order by t.n, t.position, t.lexeme
"""
_ALL = """
select greatest(reltuples, 0)::float8 as conversations, row_security_active(oid) as is_bound
from pg_class where oid = 'conversation_words'::regclass
"""


@dataclass(frozen=True, slots=True)
class Part:
    """Words that stand next to each other; with `is_stem` the last one is the beginning of a word."""

    text: str
    is_stem: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """What to look for and what to expect. Shares are of all conversations, from 0 to 1.

    `words` is the tsquery of the words alone, empty where none was given; `query` has the facets as well. No more match
    than `rarest` says, and `share` if terms meet by chance; `within` is then the share of those that have the facet one
    walks along. `is_bound`: a user's rows alone can be seen.
    """

    words: str
    query: str
    rarest: float
    share: float
    within: float
    terms: int
    conversations: float
    is_bound: bool


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
    rows = await connection.fetch(_LOOK.replace(_TABLE, table), *values)
    overall = await connection.fetchrow(_ALL.replace(_TABLE, table))
    assert overall is not None
    phrases = [_phrase(list(words)) for n, words in groupby(rows, itemgetter("n")) if n > 0]
    shares = [row["share"] for row in rows if row["n"] >= 0]
    walked = prod(row["share"] for row in rows if row["n"] < 0)
    return Look(
        words=" & ".join(phrases),
        query=" & ".join([*map(_quoted, facets), *phrases]),
        rarest=min(shares, default=1.0),
        share=prod(shares),
        within=min(prod(shares) / walked, 1.0) if walked else 0.0,
        terms=len(shares),
        conversations=overall["conversations"],
        is_bound=overall["is_bound"],
    )


def _phrase(words: list[asyncpg.Record]) -> str:
    """Words at the distances at which they stand."""
    terms = [_quoted(word["lexeme"]) for word in words]
    if words[-1]["is_stem"]:
        terms[-1] += ":*"
    gaps = [f" <{later['position'] - earlier['position']}> " for earlier, later in pairwise(words)]
    joined = "".join(term + gap for term, gap in zip(terms, [*gaps, ""], strict=True))
    return f"({joined})"


def _quoted(lexeme: str) -> str:
    """As a tsquery's text takes any lexeme."""
    return "'" + lexeme.replace("\\", "\\\\").replace("'", "''") + "'"
