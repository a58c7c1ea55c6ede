"""What calling the provider costs by itself: the part of a run's start that comes after its message is accepted.

    python -m scripts.bench.calls UPSTREAM MODEL COUNT

Makes the calls one after the other as a gateway does, keeps all of them open until the provider answers, and prints the
CPU seconds from the first call to the last request sent.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import aclosing

import uvloop

from app.providers.openai import OpenAI
from app.providers.provider import Prompt, PromptMessage

# Between two calls: about what a gateway needs for a message.
_PACE_S = 0.003
_SETTLE_S = 0.3


async def _measured(upstream: str, model: str, count: int) -> float:
    provider = OpenAI("bench", upstream)
    # What only the first one costs.
    await _asked(provider, "demo?clock=1&tokens=1&delay_ms=0")
    waiting_s = await _cpu_s(count, lambda: None)
    async with asyncio.TaskGroup() as calls:
        cpu_s = await _cpu_s(count, lambda: calls.create_task(_asked(provider, model)))
    await provider.aclose()
    return cpu_s - waiting_s


async def _cpu_s(count: int, work: Callable[[], object]) -> float:
    before = time.process_time()
    for _ in range(count):
        work()
        await asyncio.sleep(_PACE_S)
    await asyncio.sleep(_SETTLE_S)
    return time.process_time() - before


async def _asked(provider: OpenAI, model: str) -> None:
    async with aclosing(provider.stream(Prompt(model, [PromptMessage("user", "Take your time.")]))) as pieces:
        async for _ in pieces:
            pass


if __name__ == "__main__":
    print(uvloop.run(_measured(sys.argv[1], sys.argv[2], int(sys.argv[3]))), flush=True)
