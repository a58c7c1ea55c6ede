"""How far a device has read a user's changes, as the opaque text that devices keep. Pure."""

import re
from dataclasses import dataclass

from app.errors import BadRequest

_TEXT = re.compile(r"([0-9a-f]{12})\.(\d{1,18})(?:\.(\d{1,18})\.(\d{1,18}))?(f?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Everything up to `seq` was read. Up to `until` a device is sent its own rows as well: it is in a bootstrap.

    `compacted` is what the compaction had reached when that began; `failed`: whether failed messages were asked for.
    """

    epoch: str
    seq: int
    until: int = 0
    compacted: int = 0
    failed: bool = False

    def at(self, seq: int, *, failed: bool) -> "Cursor":
        """Having read up to there."""
        return Cursor(self.epoch, seq, self.until, self.compacted, failed)

    def __str__(self) -> str:
        until = f".{self.until}.{self.compacted}" if self.until > self.seq else ""
        return f"{self.epoch}.{self.seq}{until}{'f' if self.failed else ''}"


def read(text: str) -> Cursor:
    """Raises BadRequest for anything that is no cursor."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise BadRequest("bad_cursor", "cursor is none of ours; leave it out to be sent everything.")
    epoch, seq, until, compacted, failed = found.groups()
    return Cursor(epoch, int(seq), int(until or 0), int(compacted or 0), failed == "f")
