"""The schema's version: which one this build wants, which one a database has, and the way from one to the other."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import asyncpg

from app.errors import Misconfigured
from app.postgres import Connection
from app.roles import make

_PACKAGED = Path(__file__).parent / "_migrations"
MIGRATIONS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "migrations"

# Any constant will do, as long as no other advisory lock of ours uses it.
_MIGRATION_LOCK = 0x7061_726C_6579_0001
# How long a migration waits for a table, and then leaves it to others; how long it comes again, and how soon.
_LOCK_TIMEOUT, _PATIENCE_S, _PAUSE_S = "2s", 60, 1
# Errors of PostgreSQL: a lock that could not be had, a deadlock that was lost.
_LOST = {"55P03", "40P01"}


def wanted() -> list[str]:
    """All revisions of this build, oldest first. Files are named NNNN_what.py, so no import of alembic is needed."""
    return sorted(path.name[:4] for path in (MIGRATIONS / "versions").glob("[0-9][0-9][0-9][0-9]_*.py"))


async def pending(connection: Connection) -> list[str]:
    """The revisions this database still lacks. Raises Misconfigured where it is newer than this build."""
    exists = await connection.fetchval("select to_regclass('alembic_version') is not null")
    current = await connection.fetchval("select version_num from alembic_version") if exists else None
    revisions = wanted()
    if current is None:
        return revisions
    if current > revisions[-1]:
        raise Misconfigured(
            "schema_newer",
            f"The database has schema {current}, this build knows {revisions[-1]}: run the newer Parley.",
        )
    return [revision for revision in revisions if revision > current]


async def require_current(connection: Connection) -> None:
    """Raises Misconfigured naming `parley migrate` where revisions are missing."""
    if missing := await pending(connection):
        raise Misconfigured("schema_old", f"The database lacks migrations {', '.join(missing)}: run `parley migrate`.")


@dataclass(frozen=True, slots=True)
class Migrated:
    """The revisions applied, and why there is no role for users' requests where there is none."""

    revisions: list[str]
    complaint: str | None


async def migrate(dsn: str, *, role: bool = True) -> Migrated:
    """Bring the database to the newest revision, one transaction each, and see to the role of users' requests.

    Several may call it at once: one works under an advisory lock, the others wait and find nothing to do.
    """
    connection = await asyncpg.connect(dsn)
    try:
        await connection.execute("select pg_advisory_lock($1)", _MIGRATION_LOCK)
        missing = await pending(connection)
        if missing:
            await _upgrade(dsn)
        return Migrated(missing, await _without_role(connection) if role else None)
    finally:
        await connection.close()


async def _without_role(connection: Connection) -> str | None:
    try:
        await make(connection)
    except Misconfigured as error:
        return error.detail
    return None


async def _upgrade(dsn: str) -> None:
    # Imported here: a server that finds its schema current never pays for alembic and SQLAlchemy (0.4 s).
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import Connection
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    async def connect() -> "asyncpg.Connection[asyncpg.Record]":
        return await asyncpg.connect(dsn, server_settings={"lock_timeout": _LOCK_TIMEOUT})

    async def run() -> None:
        async with engine.connect() as connection:
            await connection.run_sync(upgrade)
            await connection.commit()

    engine = create_async_engine("postgresql+asyncpg://", async_creator=connect, poolclass=NullPool)
    try:
        await _patiently(run)
    finally:
        await engine.dispose()


async def _patiently(work: Callable[[], Awaitable[None]]) -> None:
    """Again where somebody holds a table for long: whoever waits for all of a table has all others wait behind it."""
    from sqlalchemy.exc import DBAPIError

    until = monotonic() + _PATIENCE_S
    while True:
        try:
            return await work()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) not in _LOST:
                raise
            if monotonic() > until:
                raise Misconfigured(
                    "schema_locked",
                    "Somebody holds a table that a migration changes (a backup, or a long query?): `parley migrate` "
                    "goes on where it stopped; run it again when that has ended.",
                ) from error
        await asyncio.sleep(_PAUSE_S)
