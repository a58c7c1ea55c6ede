"""Pages of a conversation of ours: bounded in bytes, with one message at least, and none left out."""

import asyncpg

from app.conversations import transcript
from app.conversations.index import OWN
from app.conversations.transcript import Named


async def test_a_page_ends_where_its_text_is_enough_but_has_one_message_at_least(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "insert into messages (user_id, id, chat_id, content, role, position) "
        "select 'ann', n::text, 'c', repeat('x', $1), 'user', n from generate_series(1, 3) n",
        transcript._BYTES - 3,
    )
    named, after = Named(OWN, "ann", "c", 3), 0
    seen: list[list[str]] = []
    while True:
        page = await transcript.own_messages(connection, named, after=after, size=50)
        seen.append([row["id"] for row in page.rows])
        if page.behind is None:
            break
        after = page.behind
    await connection.close()
    assert seen == [["1", "2"], ["3"]]
