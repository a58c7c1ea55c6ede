"""What is in the index of a source that was removed, or reads another table by now, goes; all else stays."""

import asyncpg

from app.conversations import index, source_state
from app.conversations.forgetting import forget_stale
from app.conversations.sources.source import Source, apply_sources, remove_source
from app.conversations.summary import Said, fold

HERE = Source("here", "env:X", "t", code="here")
THERE = Source("there", "env:X", "t", code="there")


async def test_only_what_is_stale_is_forgotten(database: str) -> None:
    connection = await asyncpg.connect(database)

    async def indexed() -> list[str]:
        """The sources in each of the four tables."""
        tables = ("conversations", "conversation_days", "conversation_counts", "conversation_source_state")
        rows = [await connection.fetch(f"select distinct source from {table} order by 1") for table in tables]
        return [",".join(row["source"] for row in found) for found in rows]

    async def discover(source: str) -> None:
        await source_state.load(connection, source)
        said = [Said(f"c{number}", "ann", number, str(number), "user", question="Why?") for number in range(5)]
        await index.merge(connection, source, fold(said))

    await index.answered(connection, index.Chat("ann", "c0", "bot"), model="m")
    await index.ended(connection, index.Chat("ann", "c0", "bot"), {"m": index.Share(1, 1, 0, 0)})
    await apply_sources(connection, [HERE, THERE])
    assert await forget_stale(connection) == {}
    for source in ("here", "there"):
        await discover(source)
    assert await forget_stale(connection) == {}
    assert await indexed() == ["here,parley,there"] * 3 + ["here,there"]

    # Another code is nothing, another table everything.
    await apply_sources(connection, [Source("here", "env:X", "t", code="other")])
    assert await forget_stale(connection) == {}
    await apply_sources(connection, [Source("here", "env:X", "u", code="other")])
    assert await forget_stale(connection) == {"here": 5}
    assert await indexed() == ["parley,there"] * 3 + ["there"]
    assert await forget_stale(connection) == {}
    await discover("here")
    assert await forget_stale(connection) == {}

    await remove_source(connection, "there")
    assert await forget_stale(connection) == {"there": 5}
    assert await indexed() == ["here,parley"] * 3 + ["here"]
    await connection.close()
