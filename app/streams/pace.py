"""When to flush: at once while little arrives, with a pause under load; docs/decisions/0003 has the figures."""

import asyncio
from math import exp
from time import perf_counter


class Pace:
    """Flush at once while little arrives; under load leave a gap, so that one commit carries several events."""

    _WINDOW_S = 0.2
    _CALM, _BUSY = 600.0, 800.0  # events per second between which the gap grows from nothing to all of it

    def __init__(self, gap_s: float) -> None:
        self._gap_s = gap_s
        self._rate = 0.0
        self._last = self._measured = 0.0

    async def wait(self) -> None:
        load = min(1.0, max(0.0, (self._rate - self._CALM) / (self._BUSY - self._CALM)))
        pause = self._last + self._gap_s * load - perf_counter()
        self._last = perf_counter() + max(pause, 0.0)
        if pause > 0:
            await asyncio.sleep(pause)

    def flushed(self, events: int) -> None:
        """Fold a flush into the rate: an average that forgets with the window's time constant."""
        now = perf_counter()
        self._rate = self._rate * exp((self._measured - now) / self._WINDOW_S) + events / self._WINDOW_S
        self._measured = now
