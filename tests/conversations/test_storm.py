"""The hostile test: whatever writers do, the index is what a full count says. `scripts/hostile_discovery` runs more."""

from dataclasses import replace
from typing import Any

import pytest

from app.conversations import serial, source_state
from app.conversations.batch import Batch
from app.conversations.foreign import Foreign
from app.conversations.ranges import Ranges
from app.conversations.source_state import State
from tests.conversations.storm import Kind, Storm


async def stormy(database: str, theirs: str, seed: int, kind: Kind = "serial") -> Storm:
    storm = Storm(database, theirs, seed, kind)
    await storm.rage()
    return storm


@pytest.mark.parametrize(("seed", "kind"), [(1, "serial"), (2, "cached"), (3, "uuids")])
async def test_the_index_is_what_a_full_count_says(database: str, empty_database: str, seed: int, kind: Kind) -> None:
    storm = await stormy(database, empty_database, seed, kind)
    assert await storm.agrees()
    assert storm.lost
    assert storm.prepared
    state = await storm.state()
    if kind == "serial":
        assert (state.marks, len(state.seen)) == ([], 0), "everything is settled once the writers have gone"


async def by_the_last_id(foreign: Foreign, state: State, _: Any, **bounds: Any) -> tuple[Batch, State]:
    """What everybody writes first: read on where the last row was."""
    batch, ids, _ = await serial._read(foreign, state, **bounds)
    return batch, replace(state, settled=max([state.settled, *ids]), seen=Ranges(), marks=[])


async def test_reading_on_from_the_last_id_would_lose_rows(
    database: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serial, "next_batch", by_the_last_id)
    assert not await (await stormy(database, empty_database, 1)).agrees()


async def test_two_that_do_not_compare_and_swap_would_count_twice(
    database: str, empty_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        source_state, "_SWAP", source_state._SWAP.replace("version = $2", "version >= $2::bigint - 1000000")
    )
    assert not await (await stormy(database, empty_database, 1)).agrees()
