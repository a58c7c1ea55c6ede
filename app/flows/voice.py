"""How one flow is heard: its events go to the log, or are held back until it is known whether the flow counts."""

import asyncio
from collections.abc import Mapping
from typing import Any

from app.streams.event import Kind
from app.streams.log import Writer

# Events held back for one flow; then the reading of its provider waits.
_HELD = 10_000


class Voice:
    """A flow's way into its stream. Held back, it is bounded by `_HELD` events and silent until `release`."""

    def __init__(self, writer: Writer, *, held: bool = False) -> None:
        self._writer = writer
        self._held: list[tuple[Kind, Mapping[str, Any]]] | None = [] if held else None
        self._released = asyncio.Event()

    def say(self, kind: Kind, data: Mapping[str, Any]) -> None:
        """Raises Fenced or StreamLost when there is no more writing."""
        if self._held is None:
            self._writer.append(kind, data)
        else:
            self._held.append((kind, data))

    def crowded(self) -> bool:
        return len(self._held) > _HELD if self._held is not None else self._writer.crowded()

    async def room(self) -> None:
        """Wait until there is room for more. Raises Unavailable where the log cannot take it in time."""
        if self._held is not None:
            await self._released.wait()
        if self._writer.crowded():
            await self._writer.room()

    def release(self) -> None:
        """Say what was held back, and be heard from now on."""
        held, self._held = self._held or [], None
        for kind, data in held:
            self._writer.append(kind, data)
        self._released.set()
