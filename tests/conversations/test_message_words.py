"""The words of messages: of each that is shown and of no other, whatever becomes of it and whoever is killed."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from random import Random
from time import monotonic

import asyncpg
import pytest

from app.access.audit import Actor
from app.conversations import filling, message_words, upkeep
from app.conversations.index import Chat
from app.conversations.message_words import MOST, MessageWords, status
from app.postgres import open_pool
from app.settings import Settings
from tests.command import run
from tests.conversations.savers import Saver
from tests.conversations.worded import differing, follow
from tests.house import Open
from tests.sync.storm import storm


@pytest.fixture
async def connection(database: str) -> AsyncGenerator[asyncpg.Connection, None]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def _count(connection: asyncpg.Connection, table: str = "message_words") -> int:
    count: int = await connection.fetchval(f"select count(*) from {table}")
    return count


async def test_what_was_there_and_what_comes(connection: asyncpg.Connection, database: str) -> None:
    saver = Saver(connection, Random(1))
    for number in range(130):
        await saver.save(Chat(f"u{number % 3}", f"c{number % 40}", "shop"))
    assert await follow(database, is_on=False) == 0
    assert await _count(connection) == 0
    assert await follow(database) == 260
    assert (await status(connection)).is_complete
    assert not await differing(connection)
    assert await follow(database) == 0
    await saver.save(Chat("u0", "c0", "shop"))
    await saver.save(Chat("new", "c0", "shop"))
    assert len(await differing(connection)) == 4
    assert await follow(database) == 4
    assert not await differing(connection)
    await connection.execute("""
        update messages set content = 'another', seq = 10000
        where user_id = 'u0' and id = (select max(id) from messages where user_id = 'u0')
    """)
    await connection.execute("update sync_head set seq = 10000 where user_id = 'u0'")
    assert await follow(database) == 1
    assert not await differing(connection)


async def test_each_pass_looks_at_so_many_users(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on where it was, until all have been looked at."""
    saver = Saver(connection, Random(1))
    for number in range(9):
        await saver.save(Chat(f"u{number}", "c", "shop"))
    monkeypatch.setattr(message_words, "_USERS", 2)
    monkeypatch.setattr(message_words, "_RECENT", "select array[]::text[] where $1 > 0")
    pool = await open_pool(database, 2)
    words = MessageWords(pool, True, looks=1)
    for _ in range(4):
        assert await words.run_once() == 4
        assert not (await status(connection)).is_complete
    assert await words.run_once() == 2
    assert (await status(connection)).is_complete
    await saver.save(Chat("u7", "c", "shop"))
    assert [await words.run_once() for _ in range(5)] == [0, 0, 0, 2, 0]
    assert not await differing(connection)
    pool.terminate()


async def test_where_it_is_turned_off_nothing_is_left(connection: asyncpg.Connection, database: str) -> None:
    await Saver(connection, Random(1)).save(Chat("ann", "c1", "shop"))
    await follow(database)
    now = await status(connection)
    assert (now.is_on, now.is_complete, now.users, now.filled) == (True, True, 1, 1)
    await follow(database, is_on=False)
    now = await status(connection)
    assert (now.is_on, now.is_complete, now.users, now.filled) == (False, False, 0, 0)
    assert (await _count(connection), await _count(connection, "message_word_users")) == (0, 0)


async def test_whom_another_version_has_erased_is_forgotten(connection: asyncpg.Connection, database: str) -> None:
    saver = Saver(connection, Random(1))
    for user in ("ann", "bob", "eve", "eve"):
        await saver.save(Chat(user, "c1", "shop"))
    await follow(database)
    for table in ("messages", "chats", "sync_head"):
        await connection.execute(f"delete from {table} where user_id <> 'bob'")
    await saver.save(Chat("eve", "c2", "shop"))
    await follow(database)
    assert await follow(database) == 2, "eve began anew"
    assert not await differing(connection)
    await connection.execute("delete from message_words where username = 'eve'")
    await connection.execute("delete from message_word_users where username = 'eve'")
    for table in ("message_words", "message_word_users"):
        assert await connection.fetchval(f"select array_agg(distinct username) from {table}") == ["bob"]


async def test_words_of_another_version_are_made_anew(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Saver(connection, Random(1)).save(Chat("ann", "c1", "shop"))
    await follow(database)
    await connection.execute("update message_words set words = 'x'")
    monkeypatch.setattr(message_words, "VERSION", 2)
    assert await follow(database) == 2
    assert not await differing(connection)


async def test_a_deleted_index_has_none_until_it_is_made_anew(connection: asyncpg.Connection, database: str) -> None:
    await Saver(connection, Random(1)).save(Chat("ann", "c1", "shop"))
    await follow(database)
    async with upkeep.alone(database) as alone:
        await upkeep.delete(alone, Actor("command:test"))
        assert (await _count(connection), await follow(database), await _count(connection)) == (0, 0, 0)
        assert await _count(connection, "message_word_users") == 0
        await upkeep.init(alone)
    assert await follow(database) == 2
    assert not await differing(connection)


async def test_long_and_odd_texts(connection: asyncpg.Connection, database: str) -> None:
    """As long as devices may bring them, of ever new words; and the longest of all words."""
    chance = Random(1)
    texts = [
        " ".join(f"{chance.getrandbits(40):x}" for _ in range(100_000)),
        "".join(chr(chance.randrange(0x4E00, 0x9FA5)) for _ in range(300_000)),
        "a" * 1_000_000,
        "ß" * 3_000 + " word",
        "",
        "' & | ! <-> :* \\ U:ann",
    ]
    await connection.execute("insert into chats (user_id, id, title) values ('ann', 'c', '')")
    await connection.executemany(
        "insert into messages (user_id, id, chat_id, content, role, position) values ('ann', $1, 'c', $2, 'user', $3)",
        [(f"m{number}", text, number) for number, text in enumerate(texts)],
    )
    await connection.execute("insert into sync_head (user_id, seq) values ('ann', 1)")
    assert await follow(database) == len(texts)
    assert not await differing(connection)
    last = " ".join(texts[0][:MOST].split()[-3:-1])
    said = "select count(*) from message_words where words @@ phraseto_tsquery('simple', $1)"
    assert await connection.fetchval(said, last) == 1
    assert await connection.fetchval(said, "word") == 1


async def test_whoever_is_killed_leaves_a_place_to_go_on_from(connection: asyncpg.Connection, database: str) -> None:
    saver = Saver(connection, Random(2))
    for number in range(60):
        await saver.save(Chat(f"u{number % 2}", "c", "shop"))
    looked, kills = 0, 0
    for _ in range(100):
        pool = await open_pool(database, 2)
        killed = asyncio.Event()

        def tell(messages: int, killed: asyncio.Event = killed, due: int = 20 * (kills + 1)) -> None:
            nonlocal looked
            looked += messages
            if looked >= due:
                killed.set()

        task = asyncio.create_task(MessageWords(pool, True, piece=4).until(monotonic() + 20, tell))
        waiting = asyncio.create_task(killed.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        pool.terminate()
        if task.done() and not killed.is_set():
            break
        kills += 1
        with suppress(Exception):
            await task
    assert kills >= 5
    assert 120 <= looked <= 120 + 4 * kills, "only a piece is done twice"
    assert not await differing(connection)
    assert (await status(connection)).is_complete


@pytest.mark.parametrize("seed", range(2))
async def test_a_storm_of_writers(connection: asyncpg.Connection, database: str, seed: int) -> None:
    """Devices and runs that write, delete, revive and compact, beside two that follow and are killed now and then."""
    over, chance, passes = asyncio.Event(), Random(seed), 0

    async def keep_following() -> None:
        nonlocal passes
        while not over.is_set():
            pool = await open_pool(database, 2)
            words = MessageWords(pool, True, piece=chance.choice([1, 3, 50]))
            for _ in range(chance.randrange(1, 20)):
                with suppress(TimeoutError):
                    async with asyncio.timeout(chance.choice([0.003, 0.03, 1])):
                        await words.run_once()
                        passes += 1
            pool.terminate()

    async with storm(database) as writers:
        following = [asyncio.create_task(keep_following()) for _ in range(2)]
        assert not await writers.run(seed, rounds=6)
        over.set()
        await asyncio.gather(*following)
    assert passes > 5
    while await follow(database):
        pass
    assert await _count(connection)
    assert not await differing(connection)


async def test_who_is_held_by_another_is_not_ready(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "_PAUSE_S", 0.01)
    saver = Saver(connection, Random(1))
    for number in range(6):
        await saver.save(Chat(f"u{number % 2}", f"c{number}", "shop"))
    lines = filling.fill_messages(Settings(database_url=database, search_messages=True))
    async with follower(connection):
        assert await anext(lines) == ("6 messages; 1 of 2 users are ready", False)
        assert await anext(lines) == ("6 messages; 1 of 2 users are ready", False)
    assert [line async for line in lines][-1] == ("12 messages; 2 of 2 users are ready", True)
    assert not await differing(connection)


@asynccontextmanager
async def follower(connection: asyncpg.Connection) -> AsyncGenerator[None, None]:
    """Somebody who is at a piece of the first user in this block."""
    await connection.execute("update conversation_index set message_words_version = $1", message_words.VERSION)
    await connection.execute("insert into message_word_users select user_id, seq, '' from sync_head")
    async with connection.transaction():
        await connection.execute("select from message_word_users where username = 'u0' for update")
        yield


async def test_the_command(connection: asyncpg.Connection, database: str) -> None:
    await Saver(connection, Random(1)).save(Chat("ann", "c1", "shop"))
    done = await run("index", "messages", DATABASE_URL=database, PARLEY_SEARCH_MESSAGES="true")
    assert (done.code, done.out[-1]) == (0, "2 messages; 1 of 1 users are ready")
    assert not await differing(connection)
    told = await run("index", "status", DATABASE_URL=database)
    assert told.out[-1] == "All messages are searched, of 1 of 1 users older ones, too."
    refused = await run("index", "messages", DATABASE_URL=database)
    assert refused.code == 2
    assert "PARLEY_SEARCH_MESSAGES" in refused.err[-1]


async def test_a_server_does_it_by_itself_and_says_how_far_it_is(house: Open) -> None:
    async with house(search_messages=True) as home:
        await home.row("select from conversation_index where message_words_filled_at is not null")
        stats = (await home.client.get("/api/sync/stats")).json()["messageSearch"]
        assert (stats["enabled"], stats["complete"]) == (True, True)
        assert (await home.client.get("/api/sync/stats?username=ann")).json()["messageSearch"] is None


async def test_a_walk_that_was_begun_before_the_index_was_deleted_says_nothing(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_words, "_USERS", 1)
    saver = Saver(connection, Random(1))
    for number in range(4):
        await saver.save(Chat(f"u{number}", "c", "shop"))
    await connection.execute("update conversations set last_message_at = now() - interval '1 hour'")
    pool = await open_pool(database, 2)
    words = MessageWords(pool, True, looks=2)
    await words.run_once()
    async with upkeep.alone(database) as alone:
        await upkeep.delete(alone, Actor("command:test"))
        await upkeep.init(alone)
    while not (await status(connection)).is_complete:
        await words.run_once()
    assert not await differing(connection)
    await pool.close()


async def test_a_chat_is_compared_message_by_message(connection: asyncpg.Connection) -> None:
    for query, values in ((message_words._UNSHOWN, ()), (message_words._SHOWN_AGAIN, (50,))):
        plan = [row[0] for row in await connection.fetch(f"explain {query}", "ann", ["c"], *values)]
        assert any("SubPlan" in line for line in plan), plan
        assert not any("Anti Join" in line for line in plan), plan
