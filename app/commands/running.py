"""What commands share: settings, a database that is there and fits, and a loop to run in."""

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, TypeVar

import click

from app.errors import Misconfigured, ParleyError
from app.settings import Settings, load

# Each command imports what it needs: `parley version` should not pay for a web server.
if TYPE_CHECKING:
    from app.access.audit import Action
    from app.conversations.upkeep import Progress, Tell
    from app.postgres import Connection
    from app.safe import Safe

T = TypeVar("T")


def with_database() -> Settings:
    """Raises Misconfigured where no PostgreSQL is named."""
    settings = load()
    if settings.database_url is None:
        raise Misconfigured(
            "database_missing",
            "DATABASE_URL is not set. Name a PostgreSQL, as in"
            " DATABASE_URL=postgresql://user:password@host:5432/parley, or try things out with `parley dev`.",
        )
    if not settings.database_url.startswith(("postgresql://", "postgres://")):
        # Never the value itself, which may hold a password.
        raise Misconfigured("database_url", "DATABASE_URL does not begin with postgresql://; correct it.")
    return settings


def dsn_of(settings: Settings) -> str:
    """Of settings `with_database`."""
    assert settings.database_url is not None
    return settings.database_url


def connected(settings: Settings, work: Callable[["Connection"], Coroutine[None, None, T]]) -> T:
    """Do something with a connection to a database that is there and fits."""
    from app.postgres import open_connection, wait_for_database
    from app.schema import require_current

    dsn = dsn_of(settings)

    async def run() -> T:
        await wait_for_database(dsn, settings.database_wait_s, lambda reason: click.echo(reason, err=True))
        connection = await open_connection(dsn)
        try:
            await require_current(connection)
            return await work(connection)
        finally:
            await connection.close()

    return in_loop(run)


def noted(
    settings: Settings,
    action: "Action",
    work: Callable[["Connection"], Coroutine[None, None, T]],
    *,
    target: Callable[[T], str] = lambda _: "",
    detail: str = "",
) -> T:
    """As `_connected`, in one transaction with its row in the audit."""
    from app.access.audit import note, operator

    async def run(connection: "Connection") -> T:
        async with connection.transaction():
            done = await work(connection)
            await note(connection, operator(), action, target=target(done), detail=detail)
        return done

    return connected(settings, run)


def kept_up(settings: Settings, work: "Callable[[Connection, Tell], Coroutine[None, None, T]]") -> T:
    """Do something with the whole index that nobody else does meanwhile, with a bar of its progress."""
    from app.conversations.upkeep import alone

    configure_log(settings.model_copy(update={"log_level": "error"}))

    async def run(_: "Connection") -> T:
        async with alone(dsn_of(settings)) as connection:
            with click.progressbar(length=1, label="begin", file=sys.stderr, width=40) as bar:

                def tell(progress: "Progress") -> None:
                    bar.label, bar.length = f"{progress.phase:<8}", max(progress.of, 1)
                    bar.update(min(progress.done, bar.length) - bar.pos)

                return await work(connection, tell)

    return connected(settings, run)


def safe_of(settings: Settings) -> "Safe":
    """What opens and seals secrets. Raises Misconfigured for a master key that is none."""
    from app.safe import Safe

    return Safe.of(settings.master_key)


def configure_log(settings: Settings) -> None:
    """Log as the settings say."""
    from app.telemetry import configure_logging

    configure_logging(settings.log_level, settings.log_format)


def in_loop(work: Callable[[], Coroutine[None, None, T]]) -> T:
    """Run it to its end; exits with 130 when it is interrupted."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(work())
        except KeyboardInterrupt:
            sys.exit(130)
        except BaseExceptionGroup as group:
            # A task group wraps even the one sentence that is meant for the operator.
            if said := group.subgroup(ParleyError):
                raise _first(said) from group
            raise


def _first(group: BaseExceptionGroup[ParleyError]) -> ParleyError:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first
