"""What is seen of a source, in lines for a terminal: what was recognised, and examples as they would be indexed."""

from collections import Counter
from collections.abc import Iterator

import asyncpg

from app.conversations.sources.reading import away, open_source
from app.conversations.sources.recognition import newest, recognise
from app.conversations.sources.shape import Shape, Skipped
from app.conversations.sources.source import Source
from app.conversations.summary import Said
from app.postgres import AWAY

EXAMPLES = 10
_READ = 100
_WRITTEN = {
    "written": "of when a row was written",
    "transaction": "of when the transaction began that wrote the row",
    "began": "of when the request began; the row is written at its end",
}


async def examined(source: Source) -> list[str]:
    """Raises Misconfigured where its database is away or its table is not recognised."""
    connection = await open_source(source.dsn)
    try:
        shape = await recognise(connection, source)
        rows = [shape.said(row) for row in await newest(connection, shape, _READ)]
    except (*AWAY, asyncpg.PostgresError) as error:
        raise away(source.dsn, error) from None
    finally:
        await connection.close()
    return [f"{source.id}: {shape.table} of {source.dsn}", *_recognised(shape, source), *_examples(rows)]


def _recognised(shape: Shape, source: Source) -> Iterator[str]:
    yield f"  kind          {shape.kind}, {'recognised' if source.kind == 'auto' else 'as configured'}"
    counts = "a sequence" if shape.key.is_serial else "no sequence"
    yield f"  key           {shape.key.column}, filled by {counts}"
    time = shape.time
    said = f"{time.column}, {_WRITTEN[time.means]}, {_indexed(time.is_indexed)}" if time else "none to compare"
    yield f"  time          {said}"
    session = shape.session
    said = f"{session.column}, {_indexed(session.is_indexed)}" if session else "in the JSON of a row"
    yield f"  conversation  {said}"


def _indexed(is_indexed: bool) -> str:
    return "with an index" if is_indexed else "without an index"


def _examples(rows: list[Said | Skipped]) -> Iterator[str]:
    reasons = Counter(row.reason for row in rows if isinstance(row, Skipped))
    skipped = "".join(f", {count} {reason}" for reason, count in reasons.most_common())
    yield f"  rows          {len(rows)} read, {reasons.total()} of them skipped{skipped}"
    for said in [row for row in rows if isinstance(row, Said)][:EXAMPLES]:
        at = f"{said.at:%Y-%m-%d %H:%M:%S}" if said.at else "-"
        parts = (said.conversation_id[:36], said.username[:24] or "-", at, said.role, said.model[:30] or "-")
        yield f"    {'  '.join(map(_plain, parts))}  {_plain(said.question[:60])}".rstrip()


def _plain(text: str) -> str:
    """Without what a terminal would take as a command."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)
