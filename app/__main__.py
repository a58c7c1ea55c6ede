"""The `parley` command."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from app import __version__
from app.commands import differences
from app.commands.index import index_group
from app.commands.keys import keys
from app.commands.running import configure_log, connected, dsn_of, in_loop, safe_of, with_database
from app.commands.sources import discover, sources
from app.errors import Misconfigured, ParleyError
from app.settings import Settings, load

# Each command imports what it needs: `parley version` should not pay for a web server.
if TYPE_CHECKING:
    from app.conversations.sources.source import SourceChange
    from app.flows.chatbots import Change
    from app.postgres import Connection


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ParleyError as error:
            click.echo(f"parley: {error.detail}", err=True)
            ctx.exit(2 if isinstance(error, Misconfigured) else 1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """A conversation gateway: AI answers as durable, resumable event streams over one PostgreSQL."""


@main.command()
@click.option("--apply", "apply_file", type=click.Path(path_type=Path), help="Apply this chatbots file first.")
def dev(apply_file: Path | None) -> None:
    """Run everything on this machine: embedded PostgreSQL, demo provider, gateway."""
    settings = load()
    if "log_format" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_format": "text"})
    configure_log(settings)
    from app.dev import dev as run_dev

    in_loop(lambda: run_dev(settings, apply_file))


@main.command()
def serve() -> None:
    """Run the gateway over the PostgreSQL of DATABASE_URL."""
    settings = with_database()
    configure_log(settings)
    import structlog

    from app import server

    log = structlog.get_logger(__name__)

    async def serving() -> None:
        leave = server.signals()
        _calm_collector()
        async with server.gateway(settings) as url:
            log.info("listening", url=url)
            if settings.auth == "open":
                log.warning("open_to_anybody", host=settings.host)
            await leave.wait()

    in_loop(serving)


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where migrations are missing.")
def migrate(check: bool) -> None:
    """Bring the database's schema to this version."""
    dsn = dsn_of(settings := with_database())
    from app import schema
    from app.postgres import open_connection, wait_for_database

    async def run() -> list[str]:
        await wait_for_database(dsn, settings.database_wait_s, lambda reason: click.echo(reason, err=True))
        if not check:
            migrated = await schema.migrate(dsn, role=settings.row_security != "off")
            _warn_of_role(settings, migrated.complaint)
            return migrated.revisions
        connection = await open_connection(dsn)
        try:
            return await schema.pending(connection)
        finally:
            await connection.close()

    found = in_loop(run)
    if check and found:
        click.echo(f"Missing: {', '.join(found)}. Run `parley migrate`.")
        sys.exit(1)
    click.echo(f"Applied: {', '.join(found)}." if found else "The schema is up to date.")


def _warn_of_role(settings: Settings, complaint: str | None) -> None:
    if complaint is None:
        return
    if settings.row_security == "require":
        raise Misconfigured("row_security_missing", complaint)
    click.echo(f"Users are kept apart by Parley's own queries only. {complaint}", err=True)


@main.command()
@click.option("--dry-run", is_flag=True, help="Only say what would go (as without any option).")
@click.option("--yes", is_flag=True, help="Delete it, a piece at a time.")
def clean(dry_run: bool, yes: bool) -> None:
    """Say what retention would delete now, or delete it: also what a server leaves to you because it is so much."""
    settings = with_database()
    from app.jobs.cleaning import clean_up, look_ahead

    async def run() -> None:
        async for line in clean_up(settings) if yes and not dry_run else look_ahead(settings):
            click.echo(line)

    in_loop(run)


@main.command()
def doctor() -> None:
    """Examine configuration, database, versions and providers; exit with 1 where something is wrong."""
    settings = load()
    from app.doctor import examine

    async def run() -> bool:
        fine = True
        async for finding in examine(settings):
            click.echo(finding.line())
            fine &= finding.fine
        return fine

    if not in_loop(run):
        sys.exit(1)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show the difference and change nothing.")
def apply(file: Path, dry_run: bool) -> None:
    """Make chatbots and sources what FILE says, showing the difference."""
    settings = with_database()
    from app.access.audit import operator
    from app.conversations.sources.source import apply_sources
    from app.flows import chatbots
    from app.flows.file import load as load_file
    from app.flows.file import require_reachable
    from app.providers.reach import Reach

    wanted = load_file(file, safe=safe_of(settings))
    require_reachable(wanted, Reach.parse(settings.provider_networks))
    who = operator()

    async def run(connection: "Connection") -> tuple[list["Change"], list["SourceChange"]]:
        async with connection.transaction():
            bots = await chatbots.apply(connection, wanted, dry_run=dry_run, actor=who)
            return bots, await apply_sources(connection, wanted.sources, dry_run=dry_run, actor=who)

    changes, of_sources = connected(settings, run)
    for line in [*map(differences.of_chatbot, changes), *map(differences.of_source, of_sources)]:
        click.echo(line)
    done = "would change" if dry_run else "changed"
    if changes:
        click.echo(f"{len(changes)} of {len(wanted.chatbots)} chatbots {done}.")
    if of_sources:
        click.echo(f"{len(of_sources)} of {len(wanted.sources)} sources {done}.")
    if not (changes or of_sources):
        click.echo("Nothing to change.")


@main.command()
@click.argument("chatbot", nargs=-1)
def export(chatbot: tuple[str, ...]) -> None:
    """Print chatbots as a file that `parley apply` takes back unchanged: those named, or all with all sources."""
    settings = with_database()
    from app.conversations.sources.source import all_sources
    from app.flows import chatbots
    from app.flows.export import to_yaml

    async def read(connection: "Connection") -> str:
        found = await chatbots.all_newest(connection)
        if unknown := [name for name in chatbot if name not in found]:
            raise _no_such_chatbot(unknown[0], found)
        wanted = {name: found[name] for name in chatbot or found}
        sources = [] if chatbot else await all_sources(connection)
        return to_yaml(wanted, newest=await chatbots.newest_templates(connection), sources=sources)

    click.echo(connected(settings, read), nl=False)


@main.command()
@click.argument("chatbot")
@click.argument("message")
@click.option("--file", type=click.Path(path_type=Path), help="A chatbots file, instead of the database.")
@click.option("--image", is_flag=True, help="As if a picture came with the message.")
@click.option("--language", default="", help="As if the message asked for this language.")
@click.option("--flow-type", help="As if the message asked for this flow.")
def plan(chatbot: str, message: str, file: Path | None, image: bool, language: str, flow_type: str | None) -> None:
    """Print which flows MESSAGE would set in motion, and why, without calling anyone."""
    from app.flows import chatbots
    from app.flows.conditions import Ask
    from app.flows.file import load as load_file
    from app.flows.preview import preview

    found = load_file(file, safe=safe_of(load())).chatbots if file else connected(with_database(), chatbots.all_newest)
    if chatbot not in found:
        raise _no_such_chatbot(chatbot, found)
    ask = Ask(message, image, language or found[chatbot].language, flow_type)
    for line in preview(found[chatbot], ask):
        click.echo(line)


@main.command()
@click.option("--last", "most", default=50, show_default=True, type=click.IntRange(1, 10_000), help="How many.")
def audit(most: int) -> None:
    """Print what administrators did, the newest first: when, who, what, to what."""
    from app.access.audit import last

    for entry in connected(with_database(), lambda connection: last(connection, most)):
        line = f"{entry.at:%Y-%m-%d %H:%M:%S}  {entry.actor}  {entry.action}  {entry.target}  {entry.detail}"
        click.echo(f"{line}  {entry.request_id}" if entry.request_id else line.rstrip())


@main.command("demo-provider")
@click.option("--port", default=8081, show_default=True, help="0 picks a free one.")
def demo_provider(port: int) -> None:
    """Run the demo provider alone: an OpenAI-compatible server with faults on request."""
    from app import server
    from app.demo.server import demo_provider as provider

    async def serving() -> None:
        leave = server.signals()
        try:
            async with provider(port=port) as url:
                click.echo(f"The demo provider is ready: {url}")
                await leave.wait()
        except OSError as error:
            raise Misconfigured(
                "port_taken", f"Cannot listen on port {port} ({error.strerror}); give another --port."
            ) from None

    in_loop(serving)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"parley {__version__}")


def _no_such_chatbot(name: str, found: Mapping[str, Any]) -> Misconfigured:
    known = ", ".join(sorted(found)) or "none"
    return Misconfigured("chatbot_missing", f"There is no chatbot named {name!r} ({known}).")


def _calm_collector() -> None:
    """Leave what the start has made out of every garbage collection, and look through the rest more rarely.

    With a thousand open streams a full collection stopped everything for half a second (docs/benchmarks.md). Cycles
    are rare here, and are still collected.
    """
    import gc

    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


for _command in (sources, discover, keys, index_group):
    main.add_command(_command)

if __name__ == "__main__":
    main(prog_name="parley")
