"""`parley index reconcile`: whole rounds by hand, and what they have found so far."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from time import monotonic

from app.conversations import rounds
from app.conversations.batch import Bounds
from app.conversations.discovering import sources_there
from app.conversations.passes import Passes
from app.conversations.reconcile import Reconcile
from app.conversations.sources.source import Source, no_such_source
from app.postgres import open_pool
from app.settings import Settings
from app.telemetry import Metrics

# Pieces are short so that there is something to tell.
_PIECE_S = 2.0


class Reconciling:
    """One source, or our own chats."""

    def __init__(self, reconcile: Reconcile, name: str, source: Source | None) -> None:
        self.is_good = True
        self._reconcile = reconcile
        self._name = name
        self._source = source

    async def lines(self) -> AsyncGenerator[str, None]:
        """How far it is, until the round ends."""
        before: rounds.Place | None = None
        while True:
            piece = await self._reconcile.run(self._name, self._source, until=monotonic() + _PIECE_S)
            now = (await rounds.rounds(self._reconcile.pool)).get(self._name, rounds.Round(self._name))
            if piece is None:
                self.is_good = False
                yield f"{self._name}: {now.error or 'somebody else is at it; see GET /api/discovery/status'}"
                return
            self.is_good = self.is_good and not piece.unsure
            unsure = f", {piece.unsure:,} could not be compared" if piece.unsure else ""
            yield f"{self._name}: {now.compared:,} conversations compared, {now.drift:,} put right{unsure}"
            if piece.place is None:
                return
            if piece.place == before:
                self.is_good = False
                yield f"{self._name}: it is not read to its end yet; run `parley discover {self._name}` first"
                return
            before = piece.place


@asynccontextmanager
async def reconcile_all(settings: Settings, name: str | None) -> AsyncGenerator[Sequence[Reconciling], None]:
    """Our own chats and every source that is switched on, or one of them. Raises Misconfigured for an unknown one."""
    there = await sources_there(settings)
    assert settings.database_url is not None
    pool = await open_pool(settings.database_url, 4)
    try:
        passes = Passes(pool=pool, bounds=Bounds(), metrics=Metrics(), failing=set())
        reconcile = Reconcile(pool=pool, passes=passes, metrics=passes.metrics)
        sources = await reconcile.sources()
        if name is not None and name not in sources:
            raise no_such_source(name, there)
        yield [Reconciling(reconcile, one, source) for one, source in sources.items() if name in (None, one)]
    finally:
        await pool.close()
