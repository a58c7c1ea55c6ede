"""A bounded number of something at once, with a bounded wait for it, and not all of it for one."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from app.errors import Unavailable


class Allowance:
    """At most `total` units, say bytes of bodies, are taken at once; others wait for `wait_s` seconds at most.

    `of` names what takes them. `each`: what one of those who take them may hold; None: everything.
    """

    def __init__(self, total: int, *, of: str, each: int | None = None, wait_s: float = 5) -> None:
        self._total = self._left = total
        self._each = total if each is None else min(each, total)
        self._held: Counter[str] = Counter()  # of those who hold something now
        self._of = of
        self._wait_s = wait_s
        self._returned = asyncio.Condition()

    @asynccontextmanager
    async def take(self, units: int = 1, *, who: str = "", many: bool = False) -> AsyncGenerator[None, None]:
        """Hold so many units while the block runs. Raises Unavailable where they do not become free soon.

        `who` holds them, if it is anybody in particular; `many`: it acts for many users, and may hold all but the share
        of one.
        """
        most = self._most(who, many=many)
        try:
            async with asyncio.timeout(self._wait_s), self._returned:
                await self._returned.wait_for(lambda: self._left >= units and self._held[who] + units <= most)
                self._left -= units
                self._held[who] += units
        except TimeoutError:
            raise Unavailable("overloaded", f"Too many {self._of} at once; try again soon.", retry_after=2) from None
        try:
            yield
        finally:
            self._left += units
            self._held[who] -= units
            if not self._held[who]:
                del self._held[who]
            async with self._returned:
                self._returned.notify_all()

    def _most(self, who: str, *, many: bool) -> int:
        if not who:
            return self._total
        return max(self._each, self._total - self._each) if many else self._each

    async def settle(self, within_s: float) -> None:
        """Wait for so long at most until nobody holds anything any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s), self._returned:
                await self._returned.wait_for(lambda: self._left == self._total)
