"""`parley index`."""

import sys

import click

from app.commands.running import configure_log, connected, in_loop, kept_up, with_database


@click.group("index")
def index_group() -> None:
    """The index of conversations: look at it, count it anew, build it anew (docs/conversations.md)."""


@index_group.command("status")
def index_status() -> None:
    """Print what is in the index; exit with 1 where it was deleted."""
    from app.conversations.upkeep import stats

    found = connected(with_database(), stats)
    synced = f"synced {found.synced_at:%Y-%m-%d %H:%M}" if found.synced_at else "never synced"
    click.echo(f"{found.conversations:,} conversations, {found.size / 1e6:,.1f} MB, schema {found.version}, {synced}")
    for source, conversations in found.sources.items():
        click.echo(f"{source:<32} {conversations:,}")
    if found.messages is not None and found.messages.is_on:
        messages = found.messages
        click.echo(f"All messages are searched, of {messages.filled:,} of {messages.users:,} users older ones, too.")
    if not found.exists:
        click.echo("The index was deleted; POST /api/sync/init and then `parley index sync`, or `parley index reset`.")
        sys.exit(1)


@index_group.command("sync")
def index_sync() -> None:
    """Count our own conversations anew while messages are saved (of others: `parley discover`); exit with 1 where some
    could not be counted."""
    from app.conversations import upkeep

    done = kept_up(with_database(), upkeep.sync)
    click.echo(f"{done.messages:,} messages of {done.found:,} conversations counted; {done.indexed:,} put right.")
    for failed in done.failed:
        click.echo(f"{failed.source} {failed.id}: {failed.reason}")
    if done.failures:
        click.echo(f"{done.failures:,} could not be counted.", err=True)
        sys.exit(1)


@index_group.command("reconcile")
@click.argument("source", required=False)
def index_reconcile(source: str | None) -> None:
    """Compare the index with what it is made of, and put right what differs: a whole round over SOURCE (our own chats
    are `parley`), or over everything; exit with 1 where something could not be compared."""
    settings = with_database()
    configure_log(settings.model_copy(update={"log_level": "error"}))
    from app.conversations.reconciling import reconcile_all

    async def run() -> bool:
        good = True
        async with reconcile_all(settings, source) as every:
            for one in every:
                async for line in one.lines():
                    click.echo(line)
                good = good and one.is_good
        return good

    if not in_loop(run):
        sys.exit(1)


@index_group.command("messages")
def index_messages() -> None:
    """Make all messages ready for searches now, to the end, where PARLEY_SEARCH_MESSAGES is set (a server does it by
    itself, in some seconds of each minute); exit with 1 where something is left."""
    settings = with_database()
    configure_log(settings.model_copy(update={"log_level": "error"}))
    from app.conversations.filling import fill_messages

    async def run() -> bool:
        is_good = False
        async for line, is_whole in fill_messages(settings):
            click.echo(line)
            is_good = is_whole
        return is_good

    if not in_loop(run):
        sys.exit(1)


@index_group.command("reset")
def index_reset() -> None:
    """Build the index anew beside the one that is read, and put it in its place: lists go on meanwhile."""
    from app.access.audit import operator
    from app.conversations import upkeep

    who = operator()
    found = kept_up(with_database(), lambda connection, tell: upkeep.reset(connection, who, tell))
    click.echo(f"Built anew: {found.conversations:,} conversations.")
