"""API keys: shown once, stored as a hash, refused soon after they were revoked, and cheap to check."""

import asyncio
import re
from collections.abc import AsyncGenerator
from time import monotonic

import pytest

from app.access.keys import ApiKey, Keys, all_keys, create, revoke
from app.access.principal import Scope
from app.errors import Misconfigured, Unauthorized, Unavailable
from app.postgres import Pool, open_pool
from tests.command import run


@pytest.fixture
async def pool(database: str) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(database, 4)
    yield pool
    pool.terminate()


async def _reads(pool: Pool) -> int:
    """How often the table was looked into by its key, as PostgreSQL counts it."""
    await pool.execute("select pg_stat_force_next_flush()")
    count: int = await pool.fetchval(
        "select coalesce(sum(idx_scan), 0) from pg_stat_user_tables where relname = 'api_keys'"
    )
    return count


async def _make(pool: Pool, *scopes: Scope) -> str:
    async with pool.acquire() as connection:
        return await create(connection, "shop", scopes or ("process",))


async def _listed(pool: Pool) -> list[ApiKey]:
    async with pool.acquire() as connection:
        return await all_keys(connection)


async def _is_refused(keys: Keys, key: str) -> bool:
    try:
        await keys.principal(key)
    except Unauthorized:
        return True
    return False


async def _refused(keys: Keys, key: str) -> None:
    assert await _is_refused(keys, key)


async def test_a_key_says_who_holds_it(pool: Pool) -> None:
    key = await _make(pool, "read", "process", "read")
    assert re.fullmatch(r"parley_[0-9a-f]{16}_[0-9a-f]{64}", key)
    principal = await Keys(pool).principal(key)
    assert (principal.kind, principal.id, principal.user_id) == ("key", f"key:{key[7:23]}", None)
    assert principal.scopes == {"read", "process"}


async def test_what_is_stored_does_not_open_anything(pool: Pool) -> None:
    key = await _make(pool)
    (row,) = await pool.fetch("select * from api_keys")
    assert key.rpartition("_")[2] not in str(row)
    assert row["hash"].hex() not in key


def _nearly(key: str) -> list[str]:
    last = "1" if key[-1] == "0" else "0"
    other_id = key[:7] + "0" * 16 + key[23:]
    return [key[:-1] + last, key + "0", key[:-1], key.upper(), f" {key}", f"{key}\n", other_id, "", "parley_", "é" * 88]


async def test_what_is_nearly_a_key_is_none(pool: Pool) -> None:
    key = await _make(pool)
    keys = Keys(pool)
    for nearly in _nearly(key):
        with pytest.raises(Unauthorized) as caught:
            await keys.principal(nearly)
        assert caught.value.code == "credentials_invalid"
        assert key[24:40] not in repr(caught.value)
    await keys.principal(key)


async def test_a_revoked_key_is_refused_when_its_row_is_read_again(pool: Pool) -> None:
    key, other = await _make(pool), await _make(pool)
    keys = Keys(pool, believed_s=0.3)
    await keys.principal(key)
    async with pool.acquire() as connection:
        await revoke(connection, key[7:23])
        await revoke(connection, key)  # the whole of it means the same, and again is no mistake
    began = monotonic()
    while not await _is_refused(keys, key):
        assert monotonic() - began < 2
    await keys.principal(other)
    await _refused(Keys(pool), key)
    async with pool.acquire() as connection:
        with pytest.raises(Misconfigured, match="keys list"):
            await revoke(connection, "0" * 16)


def test_a_row_is_believed_for_less_than_ten_seconds() -> None:
    assert Keys(None)._believed_s <= 5  # type: ignore[arg-type]


async def test_a_key_in_use_costs_no_reads_and_an_unknown_one_costs_one(pool: Pool) -> None:
    key = await _make(pool)
    keys = Keys(pool)
    await asyncio.gather(*(keys.principal(key) for _ in range(50)))
    before = await _reads(pool)
    for _ in range(20):
        await keys.principal(key)
        await _refused(keys, key[:-1] + "x")  # no shape
        await _refused(keys, key[:24] + "0" * 64)  # known id, wrong secret
    assert await _reads(pool) == before
    unknown = f"parley_{'0' * 16}_{'0' * 64}"
    for _ in range(20):
        await _refused(keys, unknown)
    assert await _reads(pool) == before + 1


async def test_what_is_remembered_is_bounded_and_strangers_push_nobody_out(pool: Pool) -> None:
    key = await _make(pool)
    keys = Keys(pool, remembered=10)
    await keys.principal(key)
    for number in range(30):
        await _refused(keys, f"parley_{number:016x}_{'0' * 64}")
    assert len(keys._unknown) == 10
    before = await _reads(pool)
    await keys.principal(key)
    assert await _reads(pool) == before
    for _ in range(15):
        await keys.principal(await _make(pool))
    assert len(keys._known) == 10


async def test_guesses_do_not_delay_the_keys_that_are_known(pool: Pool) -> None:
    key = await _make(pool)
    keys = Keys(pool, believed_s=0)
    await keys.principal(key)
    other = await pool.acquire()
    async with other.transaction():
        await other.execute("lock table api_keys")
        guesses = [f"parley_{number:016x}_{'0' * 64}" for number in range(50)]
        asked = [asyncio.create_task(_refused(keys, guess)) for guess in guesses]
        await asyncio.sleep(0)  # all of them stand in line
        refresh = asyncio.create_task(keys.principal(key))
        async with asyncio.timeout(0.9):
            while await other.fetchval("select count(*) from pg_locks where not granted") < 3:
                pass
    await refresh
    await pool.release(other)
    await asyncio.gather(*asked, return_exceptions=True)  # some may have waited too long


async def test_a_use_is_noted_once_an_hour(pool: Pool) -> None:
    key = await _make(pool)
    assert (await _listed(pool))[0].used_at is None
    for _ in range(2):
        await Keys(pool).principal(key)
    used = (await _listed(pool))[0].used_at
    assert used is not None
    await pool.execute("update api_keys set used_at = used_at - interval '2 hours'")
    await Keys(pool).principal(key)
    again = (await _listed(pool))[0].used_at
    assert again is not None
    assert again > used


async def test_without_the_database_nobody_gets_in_and_is_told_soon(pool: Pool) -> None:
    key = await _make(pool)
    nowhere = await open_pool("postgresql://nobody@127.0.0.1:9/none", 4)
    began = monotonic()
    asked = await asyncio.gather(*(Keys(nowhere).principal(key) for _ in range(20)), return_exceptions=True)
    assert monotonic() - began < 2
    assert {getattr(error, "code", "") for error in asked} == {"database_unavailable"}
    assert all(key[24:40] not in repr(error) for error in asked)
    nowhere.terminate()


async def test_a_database_that_was_not_migrated_yet(pool: Pool, empty_database: str) -> None:
    empty = await open_pool(empty_database, 1)
    with pytest.raises(Unavailable, match="parley migrate") as caught:
        await Keys(empty).principal(await _make(pool))
    assert caught.value.code == "starting"
    await empty.close()


async def test_a_lookup_that_was_possible_is_not_refused_because_its_use_cannot_be_noted(pool: Pool) -> None:
    key = await _make(pool)
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("select 1 from api_keys for update")
        await asyncio.wait_for(Keys(pool).principal(key), 5)


# -- the command


async def test_the_commands(database: str) -> None:
    made = await run(
        *("keys", "create", "the shop's back end", "--scope", "process", "--scope", "read"),
        *("--daily-messages", "500", "--daily-tokens", "90000"),
        DATABASE_URL=database,
    )
    (key,) = made.out
    assert made.code == 0
    listed = await run("keys", "list", DATABASE_URL=database)
    (line,) = listed.out
    key_id = key[7:23]
    assert line.startswith(f"{key_id}  ")
    assert "process,read  never used, 500 messages a day, 90000 tokens a day  the shop's back end" in line
    assert key[24:] not in line
    assert (await run("keys", "revoke", key_id, DATABASE_URL=database)).out == ["Revoked."]
    assert ", revoked 20" in (await run("keys", "list", DATABASE_URL=database)).out[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("create", "x"), "--scope"),
        (("create", "x", "--scope", "everything"), "everything"),
        (("create", "two\nlines", "--scope", "read"), "printable"),
        (("revoke", "nobody"), "keys list"),
    ],
)
async def test_what_the_commands_do_not_take(database: str, words: tuple[str, ...], told: str) -> None:
    done = await run("keys", *words, DATABASE_URL=database)
    assert (done.code, told in " ".join(done.err)) == (2, True)
