"""`parley dev`: everything on one machine, in the foreground, gone without a trace of processes when it stops."""

import asyncio
import os
import shlex
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import click

from app import server
from app.access.credentials import require_safe
from app.conversations.sources.source import apply_sources
from app.demo.server import demo_provider
from app.embedded import EmbeddedPostgres, embedded_postgres
from app.errors import Misconfigured
from app.flows import chatbots, file
from app.gateway.presence import Life
from app.postgres import open_connection
from app.safe import Safe
from app.schema import migrate, require_current
from app.settings import Settings

_DEMO = Path(__file__).parent / "demo" / "chatbots.yaml"
# At a terminal nobody wants to wait as long as a load balancer does.
_DRAIN_S = 2.0

_BLOCK = """
  Parley        {url}
  API docs      {url}/docs
  Health        {url}/api/conversation-health
  Data folder   {data_dir}
  Database      DATABASE_URL={dsn}

  Ask it something, then read the answer as it comes:
{key}
    curl -s {url}/api/process-message{header} -d '{{"user_id":"me","chatbot_id":"demo","message_text":"Hello"}}' \\
      | sed 's/.*"streaming_url":"\\([^"]*\\)".*/\\1/' \\
      | xargs -I@ curl -sN -H 'Accept: text/event-stream' {url}@

Parley is ready: {url}"""
# Where requests are asked for credentials: a key that may send and read, or else the user's own token.
_KEY = """
    KEY=$(DATABASE_URL={dsn} {parley} keys create me --scope process --scope read \\
      | grep -o 'parley_[0-9a-f]*_[A-Za-z0-9_-]*')
"""
_ISSUED = "with a token of your issuer in TOKEN\n"


async def dev(settings: Settings, apply: Path | None) -> None:
    """Run until a signal. Raises Misconfigured where something is in the way, or PostgreSQL dies."""
    settings = _for_dev(settings)
    require_safe(settings)
    leave = server.signals()
    wanted = file.load(apply, safe=Safe.of(settings.master_key)) if apply else file.parse("chatbots: {}")
    async with embedded_postgres(settings.data_dir) as postgres, demo_provider() as demo_url:
        # The demo chatbot's configuration names this variable: the demo provider's port changes with each start.
        os.environ["PARLEY_DEMO_URL"] = demo_url
        await _prepare(postgres.dsn, wanted)
        life = Life()
        mine = settings.model_copy(update={"database_url": postgres.dsn})
        async with server.gateway(mine, life) as url, _watching(postgres, leave) as died:
            await _either(life.serving, leave)
            if not leave.is_set():
                click.echo(_block(mine, url, shlex.quote(postgres.dsn)))
            await leave.wait()
        if died.is_set():
            raise Misconfigured("embedded_died", "PostgreSQL ended unexpectedly; the next start recovers its data.")


def _block(settings: Settings, url: str, dsn: str) -> str:
    key, header = _credentials(settings, dsn)
    return _BLOCK.format(url=url, data_dir=settings.data_dir, dsn=dsn, key=key, header=header)


def _credentials(settings: Settings, dsn: str) -> tuple[str, str]:
    """What comes before the request, and a header of it."""
    if settings.auth == "open":
        return "", ""
    if "keys" in settings.auth:
        parley = sys.argv[0] if Path(sys.argv[0]).name == "parley" else f"{sys.executable} -m app"
        return _KEY.format(dsn=dsn, parley=parley), ' -H "X-API-Key: $KEY"'
    return _ISSUED, ' -H "Authorization: Bearer $TOKEN"'


def _for_dev(settings: Settings) -> Settings:
    usual = {"drain_s": _DRAIN_S, "auth": "open"}
    return settings.model_copy(update={name: usual[name] for name in usual.keys() - settings.model_fields_set})


async def _prepare(dsn: str, wanted: file.File) -> None:
    connection = await open_connection(dsn)
    try:
        try:
            await require_current(connection)
        except Misconfigured:
            await migrate(dsn)
        if "demo" not in await chatbots.all_newest(connection):
            await chatbots.apply(connection, file.load(_DEMO))
        await chatbots.apply(connection, wanted)
        await apply_sources(connection, wanted.sources)
    finally:
        await connection.close()


@asynccontextmanager
async def _watching(postgres: EmbeddedPostgres, leave: asyncio.Event) -> AsyncGenerator[asyncio.Event, None]:
    """Leave when PostgreSQL dies; the event yielded says that it did."""
    died = asyncio.Event()

    async def watch() -> None:
        await postgres.wait()
        died.set()
        leave.set()

    async with asyncio.TaskGroup() as tasks:
        watcher = tasks.create_task(watch())
        try:
            yield died
        finally:
            watcher.cancel()


async def _either(*events: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        waiters = [tasks.create_task(event.wait()) for event in events]
        await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
        for waiter in waiters:
            waiter.cancel()
