"""A connection to a source's database that cannot write, whatever is asked of it."""

import asyncpg

from app.errors import Misconfigured
from app.postgres import AWAY, Connection, why
from app.references import resolve

# Beside what PostgreSQL allows the user: the last wall is a role with SELECT only.
_SESSION = {
    "application_name": "parley-sources",
    "default_transaction_read_only": "on",
    "statement_timeout": "30s",
    "lock_timeout": "2s",
    "idle_in_transaction_session_timeout": "60s",
}


async def open_source(dsn: str, *, timeout_s: float = 5) -> Connection:
    """To the database that a reference names. Raises Misconfigured, which never holds what is behind the reference."""
    resolved = resolve(dsn)
    try:
        connection = await asyncpg.connect(
            resolved, timeout=timeout_s, command_timeout=35, server_settings=_SESSION, statement_cache_size=20
        )
    except (ValueError, asyncpg.ClientConfigurationError):
        # What asyncpg says holds parts of the URL.
        raise Misconfigured("source_dsn", f"What {dsn} holds is no PostgreSQL URL.") from None
    except (*AWAY, asyncpg.PostgresError) as error:
        raise away(dsn, error) from None
    await _require_read_only(connection, dsn)
    return connection


def away(dsn: str, error: Exception) -> Misconfigured:
    """What a database said, or did not, in words for an operator."""
    return Misconfigured("source_database", _told(dsn, error))


def _told(dsn: str, error: Exception) -> str:
    if isinstance(error, asyncpg.ProtocolViolationError):
        return f"The database of {dsn} is behind a pooler that takes no settings; name PostgreSQL itself."
    if isinstance(error, asyncpg.LockNotAvailableError):
        return f"The database of {dsn}: somebody holds a lock on the table that keeps readers out; try again."
    if isinstance(error, asyncpg.QueryCanceledError):
        return f"The database of {dsn}: looking at the table took over 30 s; try again."
    if isinstance(error, asyncpg.PostgresError):
        # Some name the user or the database; none of them names the password.
        return f"The database of {dsn}: {why(error).replace('DATABASE_URL', dsn)}"
    return f"The database of {dsn}: {why(error).replace('DATABASE_URL', dsn) if _is_plain(error) else 'it is away.'}"


def _is_plain(error: Exception) -> bool:
    return isinstance(error, ConnectionRefusedError | TimeoutError)


async def _require_read_only(connection: Connection, dsn: str) -> None:
    """A pooler may have dropped the setting."""
    if await connection.fetchval("show default_transaction_read_only") != "on":
        await connection.close()
        raise Misconfigured(
            "source_database",
            f"The database of {dsn} is behind a pooler that keeps no settings; name PostgreSQL itself.",
        )
