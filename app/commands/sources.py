"""`parley sources` and `parley discover`."""

import sys
from typing import Any

import click

from app.commands import differences
from app.commands.running import configure_log, connected, in_loop, noted, with_database
from app.errors import Misconfigured


@click.group()
def sources() -> None:
    """Other programs' tables with conversations, which are indexed and never written to (docs/sources.md)."""


@sources.command("add")
@click.argument("source_id", metavar="ID")
@click.option("--dsn", required=True, help="Where the database's URL is: env:NAME or file:/path.")
@click.option("--table", required=True, help="A table, or schema.table.")
@click.option("--kind", default="auto", show_default=True, help="What wrote it, where that is not recognised.")
@click.option("--column", "columns", multiple=True, metavar="PART=COLUMN", help="May be repeated.")
@click.option("--conversation", default="", help="Where the id is in a proxy's JSON, as in metadata.chat_id.")
@click.option("--code", help="What webhooks call it; default ID.")
@click.option("--client", help="Whose it is, for `parley discover --client`.")
@click.option("--unchecked", is_flag=True, help="Do not look at the table before.")
def add_source(source_id: str, columns: tuple[str, ...], unchecked: bool, **given: Any) -> None:
    """Look at a table, and index it from now on. What ID was before is replaced."""
    settings = with_database()
    from app.access.audit import operator
    from app.conversations.sources.examination import examined
    from app.conversations.sources.source import apply_sources
    from app.flows.file import parse_source

    wrong = [column for column in columns if "=" not in column]
    if wrong:
        raise Misconfigured("source_column", f"--column {wrong[0]} must be PART=COLUMN, as in session=chat_id.")
    source = parse_source(source_id, given | {"columns": dict(column.split("=", 1) for column in columns)})
    if not unchecked:
        for line in in_loop(lambda: examined(source)):
            click.echo(line)
    who = operator()
    changes = connected(settings, lambda connection: apply_sources(connection, [source], actor=who))
    click.echo("\n".join(map(differences.of_source, changes)) or "Nothing to change.")


@sources.command("list")
def list_sources() -> None:
    """Print all sources by their ids."""
    from app.conversations.sources.source import all_sources

    for source in connected(with_database(), all_sources):
        told = [source.id, source.kind, source.table, source.dsn, f"code {source.code}"]
        told += [f"client {source.client}"] * bool(source.client) + ["disabled"] * (not source.enabled)
        click.echo("  ".join(told))


@sources.command("check")
@click.argument("source_id", metavar="[ID]...", nargs=-1)
def check_sources(source_id: tuple[str, ...]) -> None:
    """Print what is recognised of sources and ten rows as they would be indexed; exit with 1 where one is refused."""
    from app.conversations.sources.examination import examined
    from app.conversations.sources.source import all_sources, no_such_source

    there = connected(with_database(), all_sources)
    if unknown := [name for name in source_id if name not in {source.id for source in there}]:
        raise no_such_source(unknown[0], there)
    refused = False
    for source in [source for source in there if source.id in source_id or not source_id]:
        try:
            click.echo("\n".join(in_loop(lambda source=source: examined(source))))  # type: ignore[misc]
        except Misconfigured as error:
            refused = True
            click.echo(f"{source.id}: {error.detail}")
    if refused:
        sys.exit(1)


@sources.command("remove")
@click.argument("source_id", metavar="ID")
def remove_source(source_id: str) -> None:
    """Take a table's conversations out of the index. The table itself is not touched."""
    settings = with_database()
    from app.conversations.forgetting import forget_stale
    from app.conversations.sources.source import remove_source as remove

    noted(settings, "source.remove", lambda connection: remove(connection, source_id), target=str)
    forgotten = connected(settings, forget_stale).get(source_id, 0)
    click.echo(f"Removed, with {forgotten} conversations of the index.")


@click.command()
@click.argument("source", required=False)
@click.option("--client", help="Only sources of this client.")
def discover(source: str | None, client: str | None) -> None:
    """Index what is new in SOURCE, or in all sources, to the end; exit with 1 where one cannot be read."""
    settings = with_database()
    configure_log(settings.model_copy(update={"log_level": "error"}))
    from app.conversations.discovering import Seen, discover_all

    async def run() -> list[Seen]:
        seen = []
        async with discover_all(settings, source, client) as sources:
            for each in sources:
                with click.progressbar(length=await each.ahead(), label=each.source.id, file=sys.stderr) as bar:
                    async for rows in each.rows():
                        bar.update(rows)
                seen.append(each.seen)
                click.echo(each.seen.line())
        return seen

    if any(one.error for one in in_loop(run)):
        sys.exit(1)
