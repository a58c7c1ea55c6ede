"""What a transaction has changed, by topic: noted where it is written, told after its commit and not before (G3)."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from uuid import UUID

# By topic the position that it has now, as of a user's chats the number of the last change.
Changes = dict[UUID, int]

# Not an argument: whoever writes knows nothing of those who listen, and nobody shall forget to pass it on.
_CHANGES: ContextVar[Changes | None] = ContextVar("changes", default=None)


@contextmanager
def noting() -> Generator[Changes, None, None]:
    """Collect what is noted in this block, which is one transaction."""
    before = _CHANGES.get()
    changes: Changes = {}
    _CHANGES.set(changes)
    try:
        yield changes
    finally:
        _CHANGES.set(before)


def note(topic: UUID, position: int) -> None:
    """This transaction has changed something. Nobody is told where nobody collects: they look by themselves, too."""
    if (changes := _CHANGES.get()) is not None:
        changes[topic] = position
