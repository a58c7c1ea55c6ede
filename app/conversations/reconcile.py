"""The nightly comparison of the index with what it is made of: our chats' messages, and the tables of the sources.

A piece of bounded time after the other, each from where the last one ended, until a round has come to its end.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

import structlog

from app.conversations import index, rounds
from app.conversations.foreign import Foreign
from app.conversations.foreign_drift import ForeignDrift
from app.conversations.index import OWN
from app.conversations.listing import require_index
from app.conversations.own_drift import own_piece
from app.conversations.passes import Passes, what_of
from app.conversations.rounds import Piece, Place, Round
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.conversations.sources.source import Source, all_sources
from app.postgres import Pool
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# A pass of the job, and the longest piece of one source in it, in seconds.
_PASS_S, _PIECE_S = 60.0, 20.0
_IS_THERE = "select is_there from conversation_index"
# Told after every piece.
Tell = Callable[[str, Piece], None]


@dataclass(slots=True, kw_only=True)
class Reconcile:
    """Over our own chats and every source that is switched on, one at a time; beside discovery, in turns with it."""

    pool: Pool
    passes: Passes
    metrics: Metrics
    pass_s: float = _PASS_S
    piece_s: float = _PIECE_S

    async def run_once(self) -> int:
        """The job: a piece of every round that is due, the one that ended first coming first; how many conversations
        were compared."""
        if not await self.pool.fetchval(_IS_THERE):
            return 0
        sources = await self.sources()
        await rounds.forget_others(self.pool, list(sources))
        known = await rounds.rounds(self.pool)
        due = [known.get(name, Round(name)) for name in sources if name not in known or known[name].is_due]
        until, compared = monotonic() + self.pass_s, 0
        for one in sorted(due, key=lambda one: (one.ended_at is not None, one.ended_at, one.source)):
            if monotonic() < until:
                piece = await self.run(one.source, sources[one.source], until=min(until, monotonic() + self.piece_s))
                compared += piece.compared if piece else 0
        return compared

    async def sources(self) -> dict[str, Source | None]:
        """By name; our own chats are None."""
        async with self.pool.acquire() as connection:
            found = await all_sources(connection)
        return {OWN: None} | {source.id: source for source in found if source.enabled}

    async def run(self, name: str, source: Source | None, *, until: float) -> Piece | None:
        """The next piece of a round, or the first one of another; None where somebody else is at it, or it failed.

        What a source does wrong is recorded.
        """
        async with self.passes.turn(name, alone=True) as is_mine:
            if not is_mine:
                return None
            try:
                async with self.pool.acquire() as connection:
                    await require_index(connection)
                await rounds.begin(self.pool, name)
                place = (await rounds.rounds(self.pool))[name].place or {}
                piece = await (
                    own_piece(self.pool, place, until=until) if source is None else self._foreign(source, place, until)
                )
                if piece.place is None and await index.put_total_right(self.pool, name):
                    log.warning("index_total_wrong", source=name)
            except Exception as error:  # noqa: BLE001  one piece of one source; the others have theirs
                code, detail = what_of(error)
                log.warning("reconcile_failed", source=name, code=code, detail=detail)
                await rounds.fail(self.pool, name, code, detail)
                return None
            await rounds.move(self.pool, name, piece)
        self._tell(name, piece)
        return piece

    async def _foreign(self, source: Source, place: Place, until: float) -> Piece:
        connection = await open_source(source.dsn)
        try:
            foreign = Foreign(connection, await recognise(connection, source))
            return await ForeignDrift(self.pool, source.id, foreign).piece(place, until=until)
        finally:
            connection.terminate()

    def _tell(self, name: str, piece: Piece) -> None:
        self.metrics.reconcile_compared.labels(name).inc(piece.compared)
        self.metrics.reconcile_drift.labels(name).inc(piece.drift)
        if piece.drift or piece.unsure:
            log.warning("index_drift", source=name, conversations=piece.drift, unsure=piece.unsure)
        if piece.place is None:
            log.info("reconcile_done", source=name)

    async def tell(self) -> None:
        """What the table says, whichever replica compared."""
        for one in (await rounds.rounds(self.pool)).values():
            self.metrics.index_drift.labels(one.source).set(one.drift)
            if one.ended_at is not None:
                self.metrics.reconcile_last.labels(one.source).set(one.ended_at.timestamp())
