"""`parley keys`."""

import sys
from typing import TYPE_CHECKING

import click

from app.access.principal import SCOPES, Daily, Scope
from app.commands.running import connected, noted, safe_of, with_database
from app.errors import Misconfigured
from app.settings import load

# Each command imports what it needs: `parley version` should not pay for a web server.
if TYPE_CHECKING:
    from app.postgres import Connection


@click.group()
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
    key = noted(
        with_database(),
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

    for key in connected(with_database(), all_keys):
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

    noted(with_database(), "key.revoke", lambda connection: revoke(connection, key_id), target=str)
    click.echo("Revoked.")


@keys.command("renew-signing")
def renew_signing_key() -> None:
    """Sign streaming URLs with a new key. Those handed out stay good; do it twice, a minute apart, to end them."""
    settings = with_database()
    if settings.signing_key:
        raise Misconfigured(
            "signing_key", "PARLEY_SIGNING_KEY names the keys: put a new one in front of the old one there."
        )
    from app.access.signing import renew

    noted(settings, "signing.renew", lambda connection: renew(connection, safe_of(settings)))
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
    safe = safe_of(load())
    safe.require()
    secret = click.prompt("Secret", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read(16 * 1024)
    secret = secret.strip()
    if not secret or len(secret) > 8 * 1024 or not (secret.isascii() and secret.isprintable() and " " not in secret):
        raise Misconfigured("secret_refused", "That is no key: it must be one word of printable ASCII, at most 8 KiB.")
    click.echo(safe.seal(secret, "chatbot"))


@keys.command("rotate")
def rotate_keys() -> None:
    """Encrypt all secrets of the database with the newest master key. Only then leave the older one away."""
    settings = with_database()
    safe = safe_of(settings)
    from app.access.audit import note, operator
    from app.flows.rotation import Holdings, holdings, rotate

    async def run(connection: "Connection") -> tuple[int, Holdings]:
        changed = await rotate(connection, safe)
        # Not in one transaction: it may be cut anywhere, and each piece is right.
        await note(connection, operator(), "secrets.rotate", target=safe.newest or "", detail=f"{changed} rows")
        return changed, await holdings(connection)

    changed, found = connected(settings, run)
    click.echo(f"{changed} rows encrypted anew; {found.sealed.total()} values have the master key {safe.newest} now.")
