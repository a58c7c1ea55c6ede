"""`parley doctor`: one line per thing that must be right, and what to do where it is not."""

import platform
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import asyncpg

from app import __version__, journal, roles
from app.access.credentials import require_safe
from app.access.keys import all_keys
from app.access.signing import given_keys
from app.errors import Misconfigured, ParleyError
from app.flows import chatbots
from app.flows.rotation import holdings
from app.jobs import runs
from app.jobs.schedule import OPTIONAL, SCHEDULE, crons, misread
from app.jobs.scheduler import complaint
from app.postgres import AWAY, OLDEST, Connection, open_connection, refuse_pooler, why
from app.providers.provider import Deadlines, Endpoint
from app.providers.reach import Reach
from app.providers.registry import Providers
from app.safe import NO_SAFE, Safe
from app.schema import require_current
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class Finding:
    subject: str
    fine: bool
    sentence: str

    def line(self) -> str:
        return f"{'ok  ' if self.fine else 'FAIL'}  {self.subject:<15} {self.sentence}"


async def examine(settings: Settings) -> AsyncGenerator[Finding, None]:
    """Findings as they are made; what cannot be looked at because something before it is wrong is left out."""
    python = platform.python_version()
    yield Finding("versions", True, f"Parley {__version__}, Python {python}, asyncpg {asyncpg.__version__}")
    yield _examine_settings(settings)
    if settings.database_url is None:
        yield Finding("database", False, "DATABASE_URL is not set; `parley serve` needs it (`parley dev` does not).")
        return
    try:
        connection = await open_connection(settings.database_url)
    except Misconfigured as error:
        yield Finding("database", False, error.detail)
        return
    except (*AWAY, asyncpg.PostgresError) as error:
        yield Finding("database", False, why(error))
        return
    try:
        async with aclosing(_examine_database(settings, settings.database_url, connection)) as findings:
            async for finding in findings:
                yield finding
    except Misconfigured as error:
        yield Finding("database", False, error.detail)
    except (*AWAY, asyncpg.PostgresError) as error:
        yield Finding("database", False, why(error))
    finally:
        await connection.close()


def _examine_settings(settings: Settings) -> Finding:
    try:
        require_safe(settings)
        Reach.parse(settings.provider_networks)
        Safe.of(settings.master_key)
        given_keys(settings)
    except Misconfigured as error:
        return Finding("configuration", False, error.detail)
    return Finding("configuration", True, "every setting is valid")


def _safe(settings: Settings) -> Safe:
    try:
        return Safe.of(settings.master_key)
    except Misconfigured:
        return NO_SAFE  # the line of the configuration says so


def _reach(settings: Settings) -> Reach:
    try:
        return Reach.parse(settings.provider_networks)
    except Misconfigured:
        return Reach()  # as well


async def _examine_database(settings: Settings, dsn: str, connection: Connection) -> AsyncGenerator[Finding, None]:
    safe = _safe(settings)
    version = connection.get_server_version()
    # asyncpg counts as before PostgreSQL 10: the second number of today's versions is its third.
    name = f"PostgreSQL {version.major}.{version.micro}"
    if version.major < OLDEST:
        yield Finding("database", False, f"{name} is too old: {OLDEST} or newer is needed.")
        return
    await refuse_pooler(dsn, connection)
    yield Finding("database", True, f"{name} answers")
    try:
        await require_current(connection)
    except Misconfigured as error:
        yield Finding("schema", False, error.detail)
        return
    yield Finding("schema", True, "up to date")
    yield await _examine_access(settings, connection)
    yield await _examine_secrets(safe, connection)
    yield await _examine_row_security(settings, connection)
    for subject, sentence in zip(("answers", "errors"), await journal.last_day(connection), strict=False):
        yield Finding(subject, True, sentence)
    async for finding in _examine_jobs(settings, connection):
        yield finding
    endpoints = await _endpoints(connection)
    if not endpoints:
        yield Finding("chatbots", False, "there are none; write a chatbots file and run `parley apply FILE`.")
    for endpoint in endpoints:
        yield await _examine_provider(endpoint, safe, _reach(settings))


async def _examine_access(settings: Settings, connection: Connection) -> Finding:
    if settings.auth == "open":
        return Finding("access", True, f"anybody who reaches {settings.host} is any user: PARLEY_AUTH=open")
    valid = sum(key.revoked_at is None for key in await all_keys(connection))
    if settings.auth == "keys" and not valid:
        return Finding("access", False, "nobody gets in: make an API key with `parley keys create NAME --scope SCOPE`.")
    return Finding("access", True, f"PARLEY_AUTH={settings.auth}, API keys that are valid: {valid}")


async def _examine_secrets(safe: Safe, connection: Connection) -> Finding:
    found = await holdings(connection)
    if unknown := [key for key in found.sealed if not safe.knows(key)]:
        sentence = f"secrets are encrypted with {', '.join(sorted(unknown))}: name that key in PARLEY_MASTER_KEY, too."
        return Finding("master key", False, sentence)
    if safe.newest is None:
        return Finding("master key", True, "none: providers' keys are references, signing keys are in the database")
    if others := found.others(safe):
        return Finding("master key", True, f"{safe.newest}; {others} secrets lack it: run `parley keys rotate`")
    return Finding("master key", True, f"{safe.newest}, secrets encrypted with it: {found.sealed.total()}")


async def _examine_row_security(settings: Settings, connection: Connection) -> Finding:
    if settings.row_security == "off":
        return Finding("row security", True, "PARLEY_ROW_SECURITY=off: Parley's own queries alone keep users apart")
    try:
        return Finding("row security", True, f"users' requests run as {await roles.find(connection)}")
    except Misconfigured as error:
        return Finding("row security", settings.row_security == "auto", error.detail)


async def _examine_jobs(settings: Settings, connection: Connection) -> AsyncGenerator[Finding, None]:
    now, known = await runs.now(connection), await runs.all_runs(connection)
    since = await runs.serving_since(connection)
    when = {**SCHEDULE, **crons(settings)}
    if settings.enable_background_jobs:
        for variable, used in misread(settings).items():
            yield Finding("schedule", False, f"{variable} cannot be read, and {used} is used; correct it")
    else:
        when = {name: cron for name, cron in when.items() if name not in OPTIONAL}
    wrong = [
        (name, said)
        for name, cron in when.items()
        if (said := complaint(name, known.get(name), now, since=since, cron=cron))
    ]
    for name, said in wrong:
        yield Finding(f"job {name}", False, said)
    if not wrong:
        yield Finding("jobs", True, "none is overdue or failing" if known else "none has run yet: no server has")


async def _endpoints(connection: Connection) -> list[Endpoint]:
    found = await chatbots.all_newest(connection)
    flows = [flow for chatbot in found.values() for flow in chatbot.flows.values()]
    return list(dict.fromkeys(choice.endpoint for flow in flows for choice in flow.choices))


async def _examine_provider(endpoint: Endpoint, safe: Safe, reach: Reach) -> Finding:
    providers = Providers(deadlines=Deadlines(), concurrency=1, safe=safe, reach=reach)
    subject = f"provider {endpoint.name}"
    try:
        return Finding(subject, True, await providers.get(endpoint).check())
    except ParleyError as error:
        return Finding(subject, False, error.detail)
    finally:
        await providers.aclose()
