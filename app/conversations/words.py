"""The words that a search finds a conversation by, and the facets that filters find it by: one tsvector beside each.

Who saves a conversation writes them in the same statement (`saved`), with the time of its last message: searches find
and order conversations by this table alone. A facet's lexeme begins with a capital letter:
those of a text are small, whatever it says, so no text can hold a facet.
"""

from collections.abc import Mapping

# What the words of a conversation are made of, and whose they are.
WRITTEN = "id, source, username, chatbot_id, model, first_question, last_question, last_message_at"

# As much of a name as a facet holds: a lexeme is bounded. The conversation's own columns are asked as well.
_NAME = 100
_LETTERS: Mapping[str, str] = {"model": "M", "chatbot_id": "C", "source": "S"}
# Which facets are written together as one, so that two filters that are seldom met together are found at once.
_TOGETHER = (("model", "chatbot_id"), ("model", "source"), ("chatbot_id", "source"), ("model", "chatbot_id", "source"))
_BETWEEN = "\x1f"

# Punctuation would make PostgreSQL's parser see addresses, paths, tags and signed numbers where people write words.
_PLAIN = r"""translate({text}, '!"#$%&''()*+,-./:;<=>?@[\]^_`{{|}}~', repeat(' ', 32))"""
# Chinese and Japanese are written without spaces: each character is a word, and a word is a phrase of them.
_WIDE = r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
_SPACED = rf"regexp_replace({_PLAIN}, '({_WIDE})', ' \1 ', 'g')"

# Both questions, with a gap between them that no phrase spans. 'Q' is of no text either.
_QUESTIONS = """
case when first_question = last_question then {first}
    else ts_delete({first} || 'Q:2'::tsvector || {last}, 'Q') end
"""
_SAVED = """
insert into conversation_words as w (conversation, username, said_at, words)
select id, username, last_message_at, {vector} from {rows}
on conflict (conversation) do update set said_at = excluded.said_at, words = excluded.words
    where (w.said_at, w.words) is distinct from (excluded.said_at, excluded.words)
"""


def tokens(text: str) -> str:
    """SQL: the words of a text, with their positions."""
    return f"to_tsvector('pg_catalog.simple', {_SPACED.format(text=text)})"


def vector() -> str:
    """SQL: words and facets of a row of `conversations`."""
    named = ", ".join(
        ["'U:' || " + _named("username"), *map(_facet_sql, [*((name,) for name in _LETTERS), *_TOGETHER])]
    )
    questions = _QUESTIONS.format(first=tokens("first_question"), last=tokens("last_question"))
    return f"array_to_tsvector(array_remove(array[{named}], null)) || {questions}"


def _facet_sql(names: tuple[str, ...]) -> str:
    """Null where one of them is empty: nobody can ask for those."""
    letters = "".join(_LETTERS[name] for name in names)
    return f"'{letters}:' || " + " || E'\\x1f' || ".join(map(_named, names))


def _named(column: str) -> str:
    return f"left(nullif({column}, ''), {_NAME})"


def saved(rows: str) -> str:
    """SQL that writes the words of `rows`: what a statement that has just written conversations returns of them.

    They need the columns of WRITTEN. Whoever deletes a conversation deletes its words; without it they take up room,
    but are found by nobody.
    """
    return _SAVED.format(vector=vector(), rows=rows)


def facets(given: Mapping[str, str]) -> list[str]:
    """The lexemes that all conversations have which have these in their columns; one for all but the user."""
    named = {name: given[name] for name in _LETTERS if name in given}
    found = [f"U:{given['username'][:_NAME]}"] if "username" in given else []
    if named:
        letters = "".join(_LETTERS[name] for name in named)
        found.append(f"{letters}:" + _BETWEEN.join(value[:_NAME] for value in named.values()))
    return found
