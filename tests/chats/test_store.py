"""The history of a chat as it is read: the longest tail within both bounds, and no text beyond it."""

import asyncpg

from app.chats import store

_INSERT = """
insert into messages (user_id, id, chat_id, content, role, position)
select 'ann', n::text, 'c', $1[n], 'user', n from generate_subscripts($1::text[], 1) n
"""


async def test_a_history_is_the_longest_tail_within_both_bounds(database: str) -> None:
    connection = await asyncpg.connect(database)
    texts = ["a" * 9, "", "é" * 3, "b" * 5, "", "c"]
    await connection.execute(_INSERT, texts)
    tails = [texts[start:] for start in range(len(texts) + 1)]
    for limit in range(len(texts) + 2):
        for most in range(24):
            told = await store.history(connection, user_id="ann", chat_id="c", limit=limit, max_bytes=most)
            fits = (tail for tail in tails if len(tail) <= limit and sum(len(one.encode()) for one in tail) <= most)
            assert [one.content for one in told] == next(fits)
    before = await store.history(connection, user_id="ann", chat_id="c", limit=9, max_bytes=5, before=5)
    assert [one.content for one in before] == ["b" * 5]
    await connection.close()
