"""Rows of a source that are read and counted together, and how many of them at most."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from app.conversations.sources.shape import Shape, Skipped
from app.conversations.summary import KEYS, Said, Summaries, fold
from app.conversations.watermark import Look


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one pass over one source, and of one batch of it. `grace_s`: see `Mark.is_settled`."""

    seconds: float = 30
    sessions: int = 500
    rows: int = 20_000
    grace_s: float = 10
    standby_grace_s: float = 60

    def grace_of(self, look: Look) -> float:
        return self.standby_grace_s if look.is_standby else self.grace_s


@dataclass(slots=True)
class Batch:
    """`rows` counts those that are skipped, too. `is_complete`: everything that was there has been read. `is_stuck`:
    nothing was, and nothing has moved.
    """

    most_keys: int
    summaries: Summaries = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    is_complete: bool = False
    is_stuck: bool = False

    @classmethod
    def of(cls, shape: Shape) -> "Batch":
        """Keys are kept where a conversation's rows cannot be found by its id, or where they tell what was counted."""
        by_id = shape.session is not None and shape.session.is_indexed
        return cls(0 if by_id and shape.key.is_serial else KEYS)

    def add(self, rows: Iterable[Said | Skipped]) -> None:
        said: list[Said] = []
        for row in rows:
            self.rows += 1
            if isinstance(row, Skipped):
                self.skipped[row.reason] += 1
            else:
                said.append(row)
        fold(said, into=self.summaries, most_keys=self.most_keys)

    def is_full(self, bounds: Bounds) -> bool:
        return len(self.summaries) >= bounds.sessions or self.rows >= bounds.rows


@dataclass(slots=True)
class Found:
    """What a pass over a source has found so far. `sessions` in which something was new, `created` new ones."""

    rows: int = 0
    sessions: int = 0
    created: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    is_complete: bool = False
    is_stuck: bool = False

    def add(self, batch: Batch, created: int) -> None:
        self.rows += batch.rows
        self.sessions += len(batch.summaries)
        self.created += created
        self.skipped += batch.skipped
        self.is_complete, self.is_stuck = batch.is_complete, batch.is_stuck


# Told after every batch.
Progress = Callable[[Found], None]
