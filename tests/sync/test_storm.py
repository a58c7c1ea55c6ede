"""After any storm all devices and the server agree; with other ways to number changes they do not."""

import asyncpg
import pytest

from tests.conversations.counted import agreed
from tests.sync.storm import Plain, Timestamps, storm

_SEEDS = 20
# A control may be lucky for so many seeds.
_MOST = 20


async def test_all_agree_after_a_storm(database: str) -> None:
    async with storm(database) as weather:
        wrong = [one for seed in range(_SEEDS) for one in await weather.run(seed)]
    assert wrong == []
    connection = await asyncpg.connect(database)
    try:
        await agreed(connection)
    finally:
        await connection.close()


@pytest.mark.parametrize("kind", [Plain, Timestamps])
async def test_other_numbers_lose_changes(database: str, kind: type[Plain]) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("create sequence control increment by 1000")
    await connection.execute("grant usage on sequence control to public")
    await connection.close()
    async with storm(database, kind) as weather:
        for seed in range(_MOST):
            if await weather.run(seed):
                return
    pytest.fail("it lost nothing")
