"""Reading changes: by their index, also behind the second wall, and bounded in bytes."""

import asyncpg
import pytest

from app.conversations import transcript
from app.errors import TooLarge
from app.postgres import open_pool
from app.sync import chats, claim, edits, looks, pages, rows
from app.sync.cursor import Cursor, read
from app.sync.merge import AddMessage, DeleteMessage, stamp_at
from app.wall import Reach, Wall, within


@pytest.mark.parametrize(
    ("query", "index", "values"),
    [
        (pages._CHATS, "chats_changed", (5, 9, "phone", 0)),
        (pages._MESSAGES, "messages_changed", (5, 9, "phone", 0, False)),
        (looks._LOOK_TOGETHER, "chats_changed", (["c"], ["m"], 5)),
        (looks._LOOK_TOGETHER, "messages_changed", (["c"], ["m"], 5)),
    ],
)
async def test_changes_are_found_by_their_number(
    database: str, query: str, index: str, values: tuple[object, ...]
) -> None:
    pool = await open_pool(database, 2)
    async with Wall(pool, demand="require").open(database, 2) as wall:
        async with pool.acquire() as connection:
            await wall.look_for_role(connection)
        with within(Reach("ann")):
            async with wall.connection() as connection:
                await connection.execute("set local enable_seqscan = off")
                plan = [row[0] for row in await connection.fetch(f"explain (costs off) {query}", "ann", *values)]
    pool.terminate()
    assert any(index in line for line in plan), plan
    assert any("Index Cond" in line and "seq > " in line for line in plan), plan


@pytest.mark.parametrize("analysed", [True, False])
async def test_what_a_push_names_is_found_by_its_key_whatever_is_known_of_users(database: str, analysed: bool) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("""
        insert into messages (user_id, id, chat_id, content, role, position)
        select 'user-' || n % 500, n::text, 'c', '', 'user', n from generate_series(1, 3000) n;
        insert into chats (user_id, id, title) select 'user-' || n, 'c', '' from generate_series(0, 499) n;
        set plan_cache_mode = force_generic_plan
    """)
    await connection.execute("analyze messages, chats" if analysed else "truncate messages, chats")
    await connection.execute(f"prepare find (text, text[], text[]) as {rows._FIND}")
    plan = [row[0] for row in await connection.fetch("explain (costs off) execute find('ann', '{c}', '{7}')")]
    await connection.close()
    assert any("messages_pkey" in line for line in plan), plan
    assert any("chats_pkey" in line for line in plan), plan
    assert not any("Filter" in line for line in plan), plan


async def test_a_page_ends_where_its_text_is_enough_but_has_one_change_at_least(database: str) -> None:
    connection = await asyncpg.connect(database)
    text = "x" * (pages.BYTES - 1 - len("[]"))
    for seq in (1, 2, 3):
        await connection.execute(
            "insert into messages (user_id, id, chat_id, content, role, position, seq) "
            "values ('ann', $1, 'c', $2, 'user', 1, $3)",
            *(f"m{seq}", text, seq),
        )
    cursor, seen = Cursor("0" * 12, 0), []
    while True:
        page = await pages.read(connection, "ann", cursor, client="phone", last=3)
        seen.append([message.id for message in page.messages])
        cursor = page.cursor
        if not page.more:
            break
    await connection.close()
    assert seen == [["m1", "m2"], ["m3"]]


@pytest.mark.parametrize(
    ("query", "values", "most"),
    [
        (pages._MESSAGES, (0, 9, "phone", 0, False), pages.BYTES),
        (chats._FORWARD, ("c", 0, 9, False), chats._BYTES),
        (chats._BACKWARD, ("c", 9, 9, False), chats._BYTES),
        (edits._PAST, ("c", 0, 9), edits._BYTES),
        (claim._MESSAGES, ("c", 0), claim._BYTES),
        (transcript._MESSAGES, ("c", 0, 9), transcript._BYTES),
    ],
)
async def test_texts_and_attachments_together_are_bounded_wherever_messages_are_read(
    database: str, query: str, values: tuple[object, ...], most: int
) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "insert into messages (user_id, id, chat_id, content, role, position, seq, attachments) "
        "select 'ann', n::text, 'c', repeat('x', $1), 'user', n, n, repeat(' ', $1) from generate_series(1, 4) n",
        most // 4,
    )
    read = [row for row in await connection.fetch(query, "ann", *values) if row["content"] or row["attachments"]]
    await connection.close()
    assert len(read) == 2


def test_cursors_are_read_as_they_were_told() -> None:
    for cursor in (Cursor("0a" * 6, 5), Cursor("0a" * 6, 5, 9, 3), Cursor("0a" * 6, 5, failed=True)):
        assert read(str(cursor)) == cursor


async def test_what_a_push_names_is_read_within_bounds_and_what_it_deletes_without_its_text(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        await connection.execute(
            "insert into messages (user_id, id, chat_id, content, role, position)"
            " select 'ann', n::text, 'c', repeat('x', 1 << 20), 'user', n from generate_series(1, 65) n"
        )
        adds = [AddMessage(str(n), "c", "user", "y", stamp_at(1)) for n in range(1, 66)]
        assert len((await rows.load(connection, "ann", adds[:63])).state.messages) == 63
        with pytest.raises(TooLarge, match="fewer"):
            await rows.load(connection, "ann", adds)
        deletes = [DeleteMessage(str(n)) for n in range(1, 66)]
        assert rows.deleted([*adds[:1], *deletes]) == {str(n) for n in range(2, 66)}
        names = [op.id for op in deletes]
        row = await connection.fetchrow(f"select {rows.found('$4::text[]')}", "ann", [], names, names)
        assert row is not None
        assert len(row["messages"]) < 20_000
    finally:
        await connection.close()
