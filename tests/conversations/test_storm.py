"""The hostile test: whatever writers do, the index is what a full count says. `scripts/hostile_discovery` runs more."""

from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from app.conversations import source_state
from app.conversations.discovery import Discovery
from app.conversations.ranges import Ranges
from app.conversations.source_state import State
from tests.conversations.plain import MADE
from tests.conversations.storm import Storm


async def stormy(database: str, theirs: str, seed: int, *, cache: int = 1, **given: Any) -> Storm:
    connection = await asyncpg.connect(theirs)
    await connection.execute("drop table if exists chat")
    await connection.execute(MADE)
    await connection.execute(f"alter sequence chat_id_seq cache {cache}")
    await connection.close()
    storm = Storm(database, theirs, seed, **given)
    await storm.rage()
    return storm


@pytest.mark.parametrize(("seed", "cache"), [(1, 1), (2, 1), (3, 20)])
async def test_the_index_is_what_a_full_count_says(database: str, empty_database: str, seed: int, cache: int) -> None:
    storm = await stormy(database, empty_database, seed, cache=cache)
    assert await storm.agrees()
    assert storm.lost
    assert storm.prepared
    state = await storm.state()
    if cache == 1:
        assert (state.marks, len(state.seen)) == ([], 0), "everything is settled once the writers have gone"


class ByTheLastId(Discovery):
    """What everybody writes first: read on where the last row was."""

    async def _moved(self, foreign: Any, state: State, batch: Any, *_: Any) -> State:
        last = max([state.settled, *batch.ids])
        return replace(state, settled=last, seen=Ranges(), marks=[])


async def test_reading_on_from_the_last_id_would_lose_rows(database: str, empty_database: str) -> None:
    assert not await (await stormy(database, empty_database, 1, discovery=ByTheLastId)).agrees()


async def test_two_that_do_not_compare_and_swap_would_count_twice(
    database: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_state, "_SWAP", source_state._SWAP.replace("version = $2", "version >= $2 - 1000000"))
    assert not await (await stormy(database, empty_database, 1)).agrees()
