"""A short run of the chaos suite: every kind of fault is somebody's trial in a long one (docs/chaos.md)."""

import asyncio
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


async def test_kills_and_a_zombie_lose_nothing() -> None:
    options = ("--kills", "2", "--stops", "1", "--others", "0", "--quick", "--no-browser", "--replicas", "2")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.chaos", *options, cwd=_ROOT, stdout=-1, stderr=-1
    )
    async with asyncio.timeout(100):
        said, errors = await process.communicate()
    *_, total = said.decode().splitlines()
    assert total.startswith("3 trials, "), said.decode() + errors.decode()
    assert ": lost 0, doubled 0, reordered 0, wrong 0, zombie writes 0;" in total, said.decode() + errors.decode()
    assert process.returncode == 0
