"""The demonstration shows what it says: two devices at two replicas, and both end equal."""

import asyncio
import sys

from tests.command import ROOT


async def test_two_devices_at_two_replicas_end_equal() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "scripts/demo_sync", cwd=ROOT, stdout=-1, stderr=-1)
    async with asyncio.timeout(180):
        said, errors = await process.communicate()
    shown = said.decode()
    assert process.returncode == 0, shown + errors.decode()
    assert "it is 'Trip to Oslo' on both now" in shown
    assert "at the first token (the answer is active)" in shown
    assert "see the same" in shown
