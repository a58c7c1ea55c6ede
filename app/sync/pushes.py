"""Pushes of one user that come while another is being written wait for it in a line; the next transaction takes them
together, in the order in which they came. Each has an answer of its own, as if it had come alone.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import structlog

from app.errors import ParleyError, Unavailable
from app.sync.exchange import Answer, Asked
from app.sync.merge import AddMessage
from app.wall import Reach, reach

log = structlog.get_logger(__name__)

# Pushes of one user that wait on one replica, each of a body's size at most.
MOST_WAITING = 100
# What is taken together: pushes, their operations, and characters of their texts and attachments.
_MOST, _MOST_OPS, _MOST_TEXT = 32, 100, 1 << 20


@dataclass(slots=True, eq=False)
class Push:
    """One that waits, with the context of its request. `outcome`: what it is told once that is committed, or why it
    is refused.
    """

    asked: Asked
    context: Context = field(default_factory=copy_context)
    outcome: Answer | ParleyError | None = None
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait(self) -> None:
        """Until it has its outcome or is the first of those who wait."""
        await self._woken.wait()

    def wake(self) -> None:
        self._woken.set()

    def told(self) -> Answer:
        assert self.outcome is not None
        if isinstance(self.outcome, ParleyError):
            raise self.outcome
        return self.outcome


Line = list[Push]
# Takes them, once it has their user's lock, and gives the first its outcome, and as many of the others as it can. Where
# it raises, nothing was written, or nobody knows.
Write = Callable[[str, Callable[[], Line]], Awaitable[None]]


class Pushes:
    """Those of all users that are under way on one replica: as many as requests are."""

    def __init__(self, write: Write) -> None:
        self._write = write
        # The first of a line writes, or is about to; the others wait. Those that reach less do not go with those
        # that reach more.
        self._lines: dict[tuple[str, Reach], Line] = {}

    async def write(self, user_id: str, asked: Asked) -> Answer:
        """Raises what it alone is refused for, or Unavailable, which then concerns others as well.

        Whoever gives up leaves the line: what it was writing for others is written by the next of them.
        """
        whose = (user_id, reach())
        line = self._lines.setdefault(whose, [])
        if len(line) >= MOST_WAITING:
            raise Unavailable("overloaded", "Too many pushes of this user at once; try again soon.", retry_after=2)
        line.append(push := Push(asked))
        try:
            if line[0] is not push:
                await push.wait()
            while push.outcome is None:
                await self._lead(user_id, line)
        finally:
            self._leave(whose, line, push)
        return push.told()

    async def _lead(self, user_id: str, line: Line) -> None:
        taken: Line = []

        def take() -> Line:
            taken[:] = _together(line)
            return taken[:]

        try:
            await self._write(user_id, take)
        except Unavailable as away:
            for push in line:
                push.outcome = away
        except Exception as error:
            if len(taken) < 2:
                raise
            # It may be what one of them is about, or all of them at once: whose fault it is comes out alone.
            log.warning("pushes_apart", pushes=len(taken), error=type(error).__name__, detail=str(error)[:300])
            await self._write(user_id, lambda: line[:1])
        done = [push for push in line if push.outcome is not None]
        line[:] = [push for push in line if push.outcome is None]
        # Who writes next goes ahead of those who are only told.
        for push in (*line[:1], *done):
            push.wake()

    def _leave(self, whose: tuple[str, Reach], line: Line, push: Push) -> None:
        if push in line:  # it gives up
            line.remove(push)
        if line:
            line[0].wake()
        elif self._lines.get(whose) is line:
            del self._lines[whose]


def _together(line: Line) -> Line:
    """The first, and those behind it while all of them are about as large as one may be, up to one that names what
    another one is likely to write: it would be left for the next transaction anyway, and looked at twice.
    """
    if len(line) == 1:
        return line[:]
    ops = text = 0
    written: set[str] = set()
    for many, push in enumerate(line[:_MOST]):
        more = [op for mutation in push.asked.push for op in mutation.ops]
        added = [op for op in more if isinstance(op, AddMessage)]
        ops += len(more)
        text += sum(len(op.content) + len(op.attachments) for op in added)
        its = {op.id for op in more}
        is_apart = written.isdisjoint(its) and written.isdisjoint([op.chat_id for op in added])
        if many and not (is_apart and ops <= _MOST_OPS and text <= _MOST_TEXT):
            return line[:many]
        written |= its
    return line[:_MOST]
