"""`parley discover`: passes over sources until they have no more, and how far they are."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from app.conversations import source_state
from app.conversations.batch import Bounds
from app.conversations.passes import Passes, Result
from app.conversations.sources.reading import open_source
from app.conversations.sources.recognition import recognise
from app.conversations.sources.source import Source, all_sources, no_such_source
from app.errors import Misconfigured
from app.postgres import open_connection, open_pool, wait_for_database
from app.schema import require_current
from app.settings import Settings
from app.telemetry import Metrics

# Passes are short so that there is something to tell.
_PASS_S = 1.0
_ESTIMATE = "select greatest(reltuples, 0)::bigint from pg_class where oid = $1::text::regclass"


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of a source."""

    source: str
    rows: int
    new: int
    skipped: int
    error: str | None
    is_busy: bool

    def line(self) -> str:
        if self.is_busy:
            return f"{self.source}: somebody else is at it; see GET /api/discovery/status"
        told = f"{self.source}: {self.rows:,} rows, {self.new:,} new conversations, {self.skipped:,} rows skipped"
        return f"{told}; {self.error}" if self.error else told


class Discovering:
    """One source."""

    def __init__(self, passes: Passes, source: Source) -> None:
        self.source = source
        self._passes = passes
        self.seen = Seen(source.id, 0, 0, 0, None, False)

    async def ahead(self) -> int:
        """About how many rows are left."""
        try:
            connection = await open_source(self.source.dsn)
        except Misconfigured:
            return 0
        try:
            shape = await recognise(connection, self.source)
            rows: int = await connection.fetchval(_ESTIMATE, shape.table)
        except Misconfigured:
            return 0
        finally:
            connection.terminate()
        told = [one for one in await source_state.told(self._passes.pool) if one.source == self.source.id]
        return max(0, rows - (told[0].row_count if told else 0))

    async def rows(self) -> AsyncGenerator[int, None]:
        """Read to the end, and say now and then how many rows more there were."""
        more = True
        while more:
            result = await self._passes.run(self.source, seconds=_PASS_S)
            self._add(result)
            more = result.has_more
            yield result.found.rows

    def _add(self, result: Result) -> None:
        found, seen = result.found, self.seen
        self.seen = Seen(
            *(seen.source, seen.rows + found.rows, seen.new + found.created, seen.skipped + found.skipped.total()),
            *(result.error, result.is_busy),
        )


async def sources_there(settings: Settings) -> Sequence[Source]:
    """All sources of a database that is there and fits, for a command. Raises Misconfigured."""
    assert settings.database_url is not None
    await wait_for_database(settings.database_url, settings.database_wait_s, lambda _: None)
    connection = await open_connection(settings.database_url)
    try:
        await require_current(connection)
        return await all_sources(connection)
    finally:
        await connection.close()


@asynccontextmanager
async def discover_all(
    settings: Settings, source_id: str | None, client: str | None
) -> AsyncGenerator[Sequence[Discovering], None]:
    """Sources that are switched on: this one, those of a client, or all. Raises Misconfigured where there are none."""
    there = await sources_there(settings)
    if source_id is not None and source_id not in {source.id for source in there}:
        raise no_such_source(source_id, there)
    chosen = [source for source in there if source.enabled and source_id in (None, source.id)]
    chosen = [source for source in chosen if client in (None, source.client)]
    if not chosen:
        raise Misconfigured("source_missing", "There is no such source that is switched on: see `parley sources list`.")
    assert settings.database_url is not None
    pool = await open_pool(settings.database_url, 4)
    try:
        bounds = Bounds(sessions=settings.discovery_batch)
        passes = Passes(pool=pool, bounds=bounds, metrics=Metrics(), failing=set())
        await passes.forget()
        yield [Discovering(passes, source) for source in chosen]
    finally:
        await pool.close()
