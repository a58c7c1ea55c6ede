"""A bounded number of something at once, with a bounded wait for it, and not all of it for one."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import TypedDict

from app.access.principal import Principal
from app.errors import Unavailable


class Shares(TypedDict):
    """Of whom something is held, as `Allowance.take` wants it."""

    user: str
    agent: str


def shares_of(principal: Principal, user_id: str | None = None) -> Shares:
    """Of whoever asks, for the user that the request is about."""
    return Shares(user=principal.user_id or user_id or "", agent=principal.id if principal.user_id is None else "")


class Allowance:
    """At most `total` units, say bytes of bodies, are taken at once; others wait for `wait_s` seconds at most.

    `of` names what takes them. `each`: what one of those who take them may hold; None: everything.
    """

    def __init__(self, total: int, *, of: str, each: int | None = None, wait_s: float = 5) -> None:
        self._total = self._left = total
        self._each = total if each is None else min(each, total)
        self._held: Counter[tuple[str, str]] = Counter()  # of those who hold something now
        self._of = of
        self._wait_s = wait_s
        self._returned = asyncio.Condition()

    @asynccontextmanager
    async def take(self, units: int = 1, *, user: str = "", agent: str = "") -> AsyncGenerator[None, None]:
        """Hold so many units while the block runs. Raises Unavailable where they do not become free soon.

        A `user` holds its share at most; an `agent`, who asks for many users, all but the share of one. Nobody in
        particular (an empty name) has no bound of its own.
        """
        bounds = {("user", user): self._each, ("agent", agent): max(self._each, self._total - self._each)}
        most = {who: units_each for who, units_each in bounds.items() if who[1]}

        def is_free() -> bool:
            return self._left >= units and all(self._held[who] + units <= bound for who, bound in most.items())

        try:
            async with asyncio.timeout(self._wait_s), self._returned:
                await self._returned.wait_for(is_free)
                self._left -= units
                self._held.update(dict.fromkeys(most, units))
        except TimeoutError:
            raise Unavailable("overloaded", f"Too many {self._of} at once; try again soon.", retry_after=2) from None
        try:
            yield
        finally:
            self._left += units
            for who in most:
                self._held[who] -= units
                if not self._held[who]:
                    del self._held[who]
            async with self._returned:
                self._returned.notify_all()

    async def settle(self, within_s: float) -> None:
        """Wait for so long at most until nobody holds anything any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s), self._returned:
                await self._returned.wait_for(lambda: self._left == self._total)
