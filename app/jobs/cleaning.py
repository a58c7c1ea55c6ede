"""`parley clean`: what retention would delete, table by table, and the deleting itself with its progress."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from time import monotonic

from app.expiry import Expired, Expiring
from app.flows.chatbots import Chatbots
from app.jobs.retention import COUNTED, Retention
from app.jobs.schedule import expiring
from app.postgres import open_pool
from app.settings import Settings

# Progress is told this often, in seconds.
_TOLD_S = 2


async def look_ahead(settings: Settings) -> AsyncGenerator[str, None]:
    """A line for each table."""
    async with _retention(settings) as retention:
        found = await retention.ahead()
    for table, expired in found:
        yield _line(table, expired)
    if any(expired.rows for _, expired in found):
        yield "Nothing was deleted: `parley clean --yes` does it."


def _line(table: Expiring, expired: Expired) -> str:
    kept = f"{table.table:<32} kept for {table.keep_s / 86400:g} days: "
    if not expired.rows:
        return kept + "nothing to delete"
    rows = f"more than {COUNTED:,} rows" if expired.rows >= COUNTED else f"{expired.rows:,} rows"
    return kept + f"{rows}, due for up to {expired.late_s / 86400:.1f} days"


async def clean_up(settings: Settings) -> AsyncGenerator[str, None]:
    """Delete everything that is due, and say how far it is; may be stopped and begun again at any time."""
    async with _retention(settings) as retention:
        for table in retention.tables:
            total = 0
            while done := await retention.clean([table], until=monotonic() + _TOLD_S):
                total += done
                yield f"{table.table:<32} {total:,} rows deleted"
    yield "Done."


@asynccontextmanager
async def _retention(settings: Settings) -> AsyncGenerator[Retention, None]:
    assert settings.database_url is not None
    pool = await open_pool(settings.database_url, 2)
    try:
        yield Retention(pool, expiring(settings, chatbots=Chatbots(pool)))
    finally:
        await pool.close()
