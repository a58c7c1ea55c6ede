"""Which other replicas have readers of which streams, as they said themselves. Who does not repeat it is forgotten."""

from collections.abc import Callable, Iterable
from time import monotonic
from uuid import UUID


class Interests:
    """At most `most` pairs of a stream and a channel; more are not taken, and their readers poll."""

    def __init__(self, *, lasts_s: float, most: int, clock: Callable[[], float] = monotonic) -> None:
        self._lasts_s = lasts_s
        self._most = most
        self._clock = clock
        self._pairs = 0
        # Looked at for each commit, so it is the same dict for life.
        self.channels: dict[UUID, dict[str, float]] = {}

    def note(self, channel: str, streams: Iterable[UUID]) -> list[UUID]:
        """A replica wants to hear of these; those it did not want before."""
        until = self._clock() + self._lasts_s
        new = []
        for stream_id in streams:
            known = self.channels.get(stream_id, {})
            if channel not in known:
                if self._pairs == self._most:
                    continue
                self._pairs += 1
                known = self.channels.setdefault(stream_id, {})
                new.append(stream_id)
            known[channel] = until
        return new

    def forget_old(self) -> None:
        now = self._clock()
        for stream_id, known in list(self.channels.items()):
            for channel in [channel for channel, until in known.items() if until < now]:
                del known[channel]
                self._pairs -= 1
            if not known:
                del self.channels[stream_id]
