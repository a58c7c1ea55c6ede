"""What something costs: how long it takes, and the CPU of Python and of PostgreSQL that is in it.

On a machine that others use, too, the time says much of them and the CPU does not.
"""

import time
from collections.abc import Awaitable, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Cost(NamedTuple):
    """In ms."""

    took: float
    cpu: float


async def weighed(work: Awaitable[T], servers: Sequence[int]) -> tuple[T, Cost]:
    """`servers` are the processes that serve our connections."""
    spent, began = time.process_time() + served_s(servers), time.perf_counter()
    result = await work
    took = time.perf_counter() - began
    return result, Cost(took * 1000, (time.process_time() + served_s(servers) - spent) * 1000)


def served_s(servers: Sequence[int]) -> float:
    """How long these have been on a processor so far."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in servers) / 1e9


def at(share: float, times: Sequence[float]) -> str:
    """The time that such a share of all stays within."""
    found = sorted(times)[ceil(len(times) * share) - 1]
    return f"{found:.0f}" if found >= 10 else f"{found:.1f}"


def told(costs: Sequence[Cost]) -> str:
    """p50, p99 and the p99 of the CPU, as cells of a table."""
    took = [cost.took for cost in costs]
    return f"{at(0.5, took)} | {at(0.99, took)} | {at(0.99, [cost.cpu for cost in costs])}"
