"""The `parley` command."""

import asyncio
import difflib
import sys
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from app import __version__
from app.access.principal import SCOPES, Daily, Scope
from app.errors import Misconfigured, ParleyError
from app.settings import Settings, load

# Each command imports what it needs: `parley version` should not pay for a web server.
if TYPE_CHECKING:
    from app.access.audit import Action
    from app.conversations.sources.source import SourceChange
    from app.conversations.upkeep import Progress, Tell
    from app.flows.chatbots import Change
    from app.postgres import Connection
    from app.safe import Safe

T = TypeVar("T")


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
    _log(settings)
    from app.dev import dev as run_dev

    _run(lambda: run_dev(settings, apply_file))


@main.command()
def serve() -> None:
    """Run the gateway over the PostgreSQL of DATABASE_URL."""
    settings = _with_database()
    _log(settings)
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

    _run(serving)


@main.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 where migrations are missing.")
def migrate(check: bool) -> None:
    """Bring the database's schema to this version."""
    dsn = _dsn(settings := _with_database())
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

    found = _run(run)
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
    settings = _with_database()
    from app.jobs.cleaning import clean_up, look_ahead

    async def run() -> None:
        async for line in clean_up(settings) if yes and not dry_run else look_ahead(settings):
            click.echo(line)

    _run(run)


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

    if not _run(run):
        sys.exit(1)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Show the difference and change nothing.")
def apply(file: Path, dry_run: bool) -> None:
    """Make chatbots and sources what FILE says, showing the difference."""
    settings = _with_database()
    from app.access.audit import operator
    from app.conversations.sources.source import apply_sources
    from app.flows import chatbots
    from app.flows.file import load as load_file
    from app.flows.file import require_reachable
    from app.providers.reach import Reach

    wanted = load_file(file, safe=_safe(settings))
    require_reachable(wanted, Reach.parse(settings.provider_networks))
    who = operator()

    async def run(connection: "Connection") -> tuple[list["Change"], list["SourceChange"]]:
        async with connection.transaction():
            bots = await chatbots.apply(connection, wanted, dry_run=dry_run, actor=who)
            return bots, await apply_sources(connection, wanted.sources, dry_run=dry_run, actor=who)

    changes, of_sources = _connected(settings, run)
    for line in [*map(_difference, changes), *map(_source_difference, of_sources)]:
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
    settings = _with_database()
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

    click.echo(_connected(settings, read), nl=False)


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

    found = load_file(file, safe=_safe(load())).chatbots if file else _connected(_with_database(), chatbots.all_newest)
    if chatbot not in found:
        raise _no_such_chatbot(chatbot, found)
    ask = Ask(message, image, language or found[chatbot].language, flow_type)
    for line in preview(found[chatbot], ask):
        click.echo(line)


@main.group()
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
    settings = _with_database()
    from app.access.audit import operator
    from app.conversations.sources.examination import examined
    from app.conversations.sources.source import apply_sources
    from app.flows.file import parse_source

    wrong = [column for column in columns if "=" not in column]
    if wrong:
        raise Misconfigured("source_column", f"--column {wrong[0]} must be PART=COLUMN, as in session=chat_id.")
    source = parse_source(source_id, given | {"columns": dict(column.split("=", 1) for column in columns)})
    if not unchecked:
        for line in _run(lambda: examined(source)):
            click.echo(line)
    who = operator()
    changes = _connected(settings, lambda connection: apply_sources(connection, [source], actor=who))
    click.echo("\n".join(map(_source_difference, changes)) or "Nothing to change.")


@sources.command("list")
def list_sources() -> None:
    """Print all sources by their ids."""
    from app.conversations.sources.source import all_sources

    for source in _connected(_with_database(), all_sources):
        told = [source.id, source.kind, source.table, source.dsn, f"code {source.code}"]
        told += [f"client {source.client}"] * bool(source.client) + ["disabled"] * (not source.enabled)
        click.echo("  ".join(told))


@sources.command("check")
@click.argument("source_id", metavar="[ID]...", nargs=-1)
def check_sources(source_id: tuple[str, ...]) -> None:
    """Print what is recognised of sources and ten rows as they would be indexed; exit with 1 where one is refused."""
    from app.conversations.sources.examination import examined
    from app.conversations.sources.source import all_sources, no_such_source

    there = _connected(_with_database(), all_sources)
    if unknown := [name for name in source_id if name not in {source.id for source in there}]:
        raise no_such_source(unknown[0], there)
    refused = False
    for source in [source for source in there if source.id in source_id or not source_id]:
        try:
            click.echo("\n".join(_run(lambda source=source: examined(source))))  # type: ignore[misc]
        except Misconfigured as error:
            refused = True
            click.echo(f"{source.id}: {error.detail}")
    if refused:
        sys.exit(1)


@sources.command("remove")
@click.argument("source_id", metavar="ID")
def remove_source(source_id: str) -> None:
    """Take a table's conversations out of the index. The table itself is not touched."""
    settings = _with_database()
    from app.conversations.forgetting import forget_stale
    from app.conversations.sources.source import remove_source as remove

    _noted(settings, "source.remove", lambda connection: remove(connection, source_id), target=str)
    forgotten = _connected(settings, forget_stale).get(source_id, 0)
    click.echo(f"Removed, with {forgotten} conversations of the index.")


@main.command()
@click.argument("source", required=False)
@click.option("--client", help="Only sources of this client.")
def discover(source: str | None, client: str | None) -> None:
    """Index what is new in SOURCE, or in all sources, to the end; exit with 1 where one cannot be read."""
    settings = _with_database()
    _log(settings.model_copy(update={"log_level": "error"}))
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

    if any(one.error for one in _run(run)):
        sys.exit(1)


@main.group()
def keys() -> None:
    """API keys that servers ask with, the key that signs streaming URLs, and secrets that are stored encrypted."""


@keys.command("create")
@click.argument("name")
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="May be repeated.")
@click.option("--daily-messages", type=click.IntRange(1), help="Quota of its own; default PARLEY_QUOTA_KEY_MESSAGES.")
@click.option("--daily-tokens", type=click.IntRange(1), help="Quota of its own; default PARLEY_QUOTA_KEY_TOKENS.")
def create_key(name: str, scopes: tuple[Scope, ...], daily_messages: int | None, daily_tokens: int | None) -> None:
    """Make a key and print it, this once. NAME is for you."""
    if not (name.isprintable() and 0 < len(name) <= 100):
        raise Misconfigured("key_name", "NAME must be 1 to 100 printable characters.")
    from app.access.keys import create

    daily = Daily(daily_messages, daily_tokens)
    key = _noted(
        _with_database(),
        "key.create",
        lambda connection: create(connection, name, scopes, daily=daily),
        target=lambda key: key.split("_")[1],
        detail=f"{name}: {', '.join(scopes)}",
    )
    click.echo(key)
    click.echo("Keep it where only its user reads it: it is not shown again.", err=True)


@keys.command("list")
def list_keys() -> None:
    """Print all keys by their ids, revoked ones too; a use shows within an hour."""
    from app.access.keys import all_keys

    for key in _connected(_with_database(), all_keys):
        used = f"used {key.used_at:%Y-%m-%d %H:%M}" if key.used_at else "never used"
        ended = f", revoked {key.revoked_at:%Y-%m-%d %H:%M}" if key.revoked_at else ""
        quotas = {"messages": key.daily_messages, "tokens": key.daily_tokens}
        daily = "".join(f", {most} {what} a day" for what, most in quotas.items() if most)
        click.echo(f"{key.id}  {key.created_at:%Y-%m-%d}  {','.join(key.scopes)}  {used}{daily}{ended}  {key.name}")


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
def revoke_key(key_id: str) -> None:
    """Refuse a key from now on: within ten seconds everywhere."""
    from app.access.keys import revoke

    _noted(_with_database(), "key.revoke", lambda connection: revoke(connection, key_id), target=str)
    click.echo("Revoked.")


@keys.command("renew-signing")
def renew_signing_key() -> None:
    """Sign streaming URLs with a new key. Those handed out stay good; do it twice, a minute apart, to end them."""
    settings = _with_database()
    if settings.signing_key:
        raise Misconfigured(
            "signing_key", "PARLEY_SIGNING_KEY names the keys: put a new one in front of the old one there."
        )
    from app.access.signing import renew

    _noted(settings, "signing.renew", lambda connection: renew(connection, _safe(settings)))
    click.echo("Renewed: replicas use the new key within half a minute.")


@keys.command("generate-master")
def generate_master_key() -> None:
    """Print a new master key, which encrypts secrets in the database. Nothing replaces a lost one."""
    from secrets import token_hex

    click.echo(token_hex(32))
    click.echo("Keep it out of the database and its backups; name its place in PARLEY_MASTER_KEY.", err=True)


@keys.command("encrypt")
def encrypt_secret() -> None:
    """Read a provider's key from standard input and print it encrypted, for `api_key` in a chatbots file."""
    safe = _safe(load())
    safe.require()
    secret = click.prompt("Secret", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read(16 * 1024)
    secret = secret.strip()
    if not secret or len(secret) > 8 * 1024 or not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise Misconfigured("secret_refused", "That is no key: it must be one word of printable ASCII, at most 8 KiB.")
    click.echo(safe.seal(secret, "chatbot"))


@keys.command("rotate")
def rotate_keys() -> None:
    """Encrypt all secrets of the database with the newest master key. Only then leave the older one away."""
    settings = _with_database()
    safe = _safe(settings)
    from app.access.audit import note, operator
    from app.flows.rotation import Holdings, holdings, rotate

    async def run(connection: "Connection") -> tuple[int, Holdings]:
        changed = await rotate(connection, safe)
        # Not in one transaction: it may be cut anywhere, and each piece is right.
        await note(connection, operator(), "secrets.rotate", target=safe.newest or "", detail=f"{changed} rows")
        return changed, await holdings(connection)

    changed, found = _connected(settings, run)
    click.echo(f"{changed} rows encrypted anew; {found.sealed.total()} values have the master key {safe.newest} now.")


@main.group("index")
def index_group() -> None:
    """The index of conversations: look at it, count it anew, build it anew (docs/conversations.md)."""


@index_group.command("status")
def index_status() -> None:
    """Print what is in the index; exit with 1 where it was deleted."""
    from app.conversations.upkeep import stats

    found = _connected(_with_database(), stats)
    synced = f"synced {found.synced_at:%Y-%m-%d %H:%M}" if found.synced_at else "never synced"
    click.echo(f"{found.conversations:,} conversations, {found.size / 1e6:,.1f} MB, schema {found.version}, {synced}")
    for source, conversations in found.sources.items():
        click.echo(f"{source:<32} {conversations:,}")
    if not found.exists:
        click.echo("The index was deleted; POST /api/sync/init and then `parley index sync`, or `parley index reset`.")
        sys.exit(1)


@index_group.command("sync")
def index_sync() -> None:
    """Count our own conversations anew while messages are saved (of others: `parley discover`); exit with 1 where some
    could not be counted."""
    from app.conversations import upkeep

    done = _kept_up(_with_database(), upkeep.sync)
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
    settings = _with_database()
    _log(settings.model_copy(update={"log_level": "error"}))
    from app.conversations.reconciling import reconcile_all

    async def run() -> bool:
        good = True
        async with reconcile_all(settings, source) as every:
            for one in every:
                async for line in one.lines():
                    click.echo(line)
                good = good and one.is_good
        return good

    if not _run(run):
        sys.exit(1)


@index_group.command("reset")
def index_reset() -> None:
    """Build the index anew beside the one that is read, and put it in its place: lists go on meanwhile."""
    from app.access.audit import operator
    from app.conversations import upkeep

    who = operator()
    found = _kept_up(_with_database(), lambda connection, tell: upkeep.reset(connection, who, tell))
    click.echo(f"Built anew: {found.conversations:,} conversations.")


@main.command()
@click.option("--last", "most", default=50, show_default=True, type=click.IntRange(1, 10_000), help="How many.")
def audit(most: int) -> None:
    """Print what administrators did, the newest first: when, who, what, to what."""
    from app.access.audit import last

    for entry in _connected(_with_database(), lambda connection: last(connection, most)):
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

    _run(serving)


@main.command()
def version() -> None:
    """Print the version."""
    click.echo(f"parley {__version__}")


def _with_database() -> Settings:
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


def _dsn(settings: Settings) -> str:
    assert settings.database_url is not None
    return settings.database_url


def _connected(settings: Settings, work: Callable[["Connection"], Coroutine[None, None, T]]) -> T:
    """Do something with a connection to a database that is there and fits."""
    from app.postgres import open_connection, wait_for_database
    from app.schema import require_current

    dsn = _dsn(settings)

    async def run() -> T:
        await wait_for_database(dsn, settings.database_wait_s, lambda reason: click.echo(reason, err=True))
        connection = await open_connection(dsn)
        try:
            await require_current(connection)
            return await work(connection)
        finally:
            await connection.close()

    return _run(run)


def _noted(
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

    return _connected(settings, run)


def _kept_up(settings: Settings, work: "Callable[[Connection, Tell], Coroutine[None, None, T]]") -> T:
    """Do something with the whole index that nobody else does meanwhile, with a bar of its progress."""
    from app.conversations.upkeep import alone

    _log(settings.model_copy(update={"log_level": "error"}))

    async def run(_: "Connection") -> T:
        async with alone(_dsn(settings)) as connection:
            with click.progressbar(length=1, label="begin", file=sys.stderr, width=40) as bar:

                def tell(progress: "Progress") -> None:
                    bar.label, bar.length = f"{progress.phase:<8}", max(progress.of, 1)
                    bar.update(min(progress.done, bar.length) - bar.pos)

                return await work(connection, tell)

    return _connected(settings, run)


def _no_such_chatbot(name: str, found: Mapping[str, Any]) -> Misconfigured:
    known = ", ".join(sorted(found)) or "none"
    return Misconfigured("chatbot_missing", f"There is no chatbot named {name!r} ({known}).")


def _safe(settings: Settings) -> "Safe":
    from app.safe import Safe

    return Safe.of(settings.master_key)


def _log(settings: Settings) -> None:
    from app.telemetry import configure_logging

    configure_logging(settings.log_level, settings.log_format)


def _calm_collector() -> None:
    """Leave what the start has made out of every garbage collection, and look through the rest more rarely.

    With a thousand open streams a full collection stopped everything for half a second (docs/benchmarks.md). Cycles
    are rare here, and are still collected.
    """
    import gc

    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def _run(work: Callable[[], Coroutine[None, None, T]]) -> T:
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


def _difference(change: "Change") -> str:
    from app.flows.config import Chatbot
    from app.flows.export import to_yaml

    def lines(value: dict[str, Any] | None) -> list[str]:
        """The chatbot in the shape of its file."""
        return [] if value is None else to_yaml({change.chatbot_id: Chatbot.from_json(value)}).splitlines()

    title = f"chatbot {change.chatbot_id}"
    names = (f"{title} version {change.version - 1}" if change.before else "(new)", f"{title} version {change.version}")
    return "\n".join(difflib.unified_diff(lines(change.before), lines(change.after), *names, lineterm=""))


def _source_difference(change: "SourceChange") -> str:
    from app.flows.export import sources_to_file, to_text

    before = to_text(sources_to_file([change.before])).splitlines() if change.before else []
    after = to_text(sources_to_file([change.after])).splitlines()
    title = f"source {change.after.id}"
    names = (f"{title} before" if before else "(new)", title)
    return "\n".join(difflib.unified_diff(before, after, *names, lineterm=""))


if __name__ == "__main__":
    main(prog_name="parley")
