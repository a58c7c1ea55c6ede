"""A bounded number of something at once, with a bounded wait for it."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from app.errors import Unavailable


class Allowance:
    """At most `total` units, say bytes of bodies, are taken at once; others wait for `wait_s` seconds at most.

    `of` names what takes them.
    """

    def __init__(self, total: int, *, of: str, wait_s: float = 5) -> None:
        self._total = self._left = total
        self._of = of
        self._wait_s = wait_s
        self._returned = asyncio.Condition()

    @asynccontextmanager
    async def take(self, units: int = 1) -> AsyncGenerator[None, None]:
        """Hold so many units while the block runs. Raises Unavailable where they do not become free soon."""
        try:
            async with asyncio.timeout(self._wait_s), self._returned:
                await self._returned.wait_for(lambda: self._left >= units)
                self._left -= units
        except TimeoutError:
            raise Unavailable("overloaded", f"Too many {self._of} at once; try again soon.", retry_after=2) from None
        try:
            yield
        finally:
            self._left += units
            async with self._returned:
                self._returned.notify_all()

    async def settle(self, within_s: float) -> None:
        """Wait for so long at most until nobody holds anything any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s), self._returned:
                await self._returned.wait_for(lambda: self._left == self._total)
