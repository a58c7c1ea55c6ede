"""A stranger's tool against a real server, for a short while; `scripts/schemathesis` does it for longer."""

import asyncio
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


async def test_every_answer_is_as_the_document_says() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        ROOT / "scripts/schemathesis",
        "--examples",
        "3",
        "--seed",
        "5",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said = (await process.communicate())[0].decode(errors="replace")
    assert process.returncode == 0, said[-10_000:]
    blind, knowing = (int(number) for number in re.findall(r"(\d+) generated, \1 passed", said))
    assert blind > 500
    assert knowing > 200
